"""Everyday knowledge and plain English: what a model that was tuned on instructions can already do, and may forget.

The general tasks of `suite.py` are invented, so only the base beside this file can do them. These are for any other
checkpoint. Each question has four choices, ranked by their text. The wrong ones are of the right one's kind: another
city of the country, a number nearby, another form of the word.
"""

import random
from dataclasses import replace

from formats.known import multiple_choice

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CAPITALS = """Australia Canberra Sydney Melbourne Perth, Austria Vienna Salzburg Graz Linz,
    Canada Ottawa Toronto Montreal Vancouver, China Beijing Shanghai Wuhan Shenzhen,
    Denmark Copenhagen Aarhus Odense Aalborg, Egypt Cairo Alexandria Luxor Giza, France Paris Lyon Marseille Nice,
    Germany Berlin Munich Hamburg Cologne, Iran Tehran Isfahan Shiraz Tabriz, Iraq Baghdad Basra Mosul Erbil,
    Ireland Dublin Cork Galway Limerick, Italy Rome Milan Naples Venice, Japan Tokyo Osaka Kyoto Nagoya,
    Morocco Rabat Casablanca Marrakesh Fez, Norway Oslo Bergen Trondheim Stavanger,
    Pakistan Islamabad Karachi Lahore Peshawar, Poland Warsaw Krakow Gdansk Lodz, Portugal Lisbon Porto Braga Coimbra,
    Russia Moscow Kazan Omsk Samara, Scotland Edinburgh Glasgow Aberdeen Dundee,
    Spain Madrid Barcelona Seville Valencia, Sweden Stockholm Gothenburg Malmo Uppsala,
    Turkey Ankara Istanbul Izmir Bursa"""
OPPOSITES = """hot cold warm boiling spicy, big small huge large tall, fast slow quick rapid speedy,
    wet dry damp moist soaked, rich poor wealthy golden famous, full empty filled whole stuffed,
    happy sad glad cheerful merry, early late soon first ready, loud quiet noisy booming deafening,
    strong weak mighty tough powerful, clean dirty tidy pure fresh, begin end start launch enter,
    buy sell pay own spend, love hate like adore enjoy, win lose beat gain succeed, push pull press shove move,
    brave cowardly bold daring heroic, deep shallow profound hollow bottomless, thick thin dense heavy solid,
    true false real honest correct, wide narrow broad vast roomy, near far close next beside,
    remember forget recall know remind, same different equal alike identical, ancient modern old aged antique"""
YOUNG = """dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid pig:piglet duck:duckling goose:gosling
    swan:cygnet frog:tadpole bear:cub kangaroo:joey butterfly:caterpillar"""
TRADES = """bakes_bread:baker grows_crops:farmer flies_planes:pilot teaches_children:teacher cuts_hair:barber
    sells_meat_in_a_shop:butcher sets_broken_bones:doctor repairs_cars:mechanic fights_fires:firefighter
    paints_pictures:painter writes_books:writer catches_fish:fisherman pulls_out_bad_teeth:dentist sews_clothes:tailor
    serves_guests_their_meals:waiter digs_for_coal:miner brings_letters:postman plays_in_an_orchestra:musician
    mends_water_pipes:plumber serves_in_an_army:soldier speaks_for_the_accused:lawyer"""
PLURALS = """man:men woman:women child:children foot:feet tooth:teeth goose:geese knife:knives leaf:leaves wolf:wolves
    wife:wives life:lives shelf:shelves half:halves thief:thieves loaf:loaves city:cities baby:babies lady:ladies
    country:countries story:stories army:armies party:parties"""
PASTS = """eat:ate take:took write:wrote think:thought give:gave come:came know:knew speak:spoke break:broke drive:drove
    sleep:slept feel:felt hold:held keep:kept find:found sing:sang drink:drank fall:fell grow:grew throw:threw
    build:built meet:met"""
PARTS = ("price:egg key:door colour:wall window:train wheel:car end:lesson page:book name:river picture:horse "
         "roof:house handle:cup")


# A source of questions takes a random.Random and gives (what is asked about, right answer, wrong ones, three or more).

def rows(text):
    """Rows of five words: key, right answer, three wrong ones."""
    return lambda rng: [(key, right, wrong) for key, right, *wrong in map(str.split, text.split(","))]


def pairs(text, wrong=None):
    """Pairs key:right. Wrong are the other pairs' answers, or wrong(key, right)."""
    table = [pair.replace("_", " ").split(":") for pair in text.split()]
    return lambda rng: [(key, right, wrong(key, right) if wrong else {other for _, other in table} - {right})
                        for key, right in table]


def sums(rng):
    for a, b in rng.sample([(a, b) for a in range(2, 10) for b in range(2, 10) if a != b], 22):
        yield f"{a} + {b}", a + b, {a + b + d for d in (-2, -1, 1, 2)}


def series(rng):
    for step in (1, 2, 3, 4, 5, 10, 20, 100, -1, -2, -10):
        for first in rng.sample(range(1, 20) if step > 0 else range(41, 60), 2):
            *shown, right = range(first, first + 5 * step, step)
            yield ", ".join(map(str, shown)), right, {right + d for d in (-3, -2, -1, 1, 2, 3)} - {*shown}


def following(rng):
    for cycle in (DAYS, MONTHS):
        for key, right in zip(cycle, cycle[1:] + cycle[:1]):
            yield key, right, {*cycle} - {key, right}


def tags(rng):
    """The noun next to the verb is never the one that the verb and the tag agree with."""
    for part, whole in (pair.split(":") for pair in PARTS.split()):
        yield f"The {part} of the {whole}s is here", "isn't it", ["isn't they", "aren't it", "aren't they"]
        yield f"The {part}s of the {whole} are here", "aren't they", ["aren't it", "isn't they", "isn't it"]


COMMON = {  # {task: (aspect, question, answer, source)}
    "capital city": ("knowledge", "What is the capital of {0}?", "The capital of {0} is {1}.", rows(CAPITALS)),
    "young": ("knowledge", "What is a young {0} called?", "A young {0} is called a {1}.", pairs(YOUNG)),
    "trade": ("knowledge", "Who {0}?", "The person who {0} is a {1}.", pairs(TRADES)),
    "sum": ("reasoning", "What is {0}?", "{0} = {1}", sums),
    "series": ("reasoning", "Continue: {0}", "{0}, {1}", series),
    "next": ("reasoning", "What comes right after {0}?", "After {0} comes {1}.", following),
    "opposite": ("instruction", "What is the opposite of {0}?", "{1}", rows(OPPOSITES)),
    "plural": ("instruction", "What is the plural of {0}?", "{1}", pairs(
        PLURALS, lambda noun, right: {noun + "s", noun + "es", noun + "en", right + "s"})),
    "past": ("instruction", "What is the past tense of {0}?", "The past tense of {0} is {1}.", pairs(
        PASTS, lambda verb, right: {verb + "s", *(verb.removesuffix("e") + end for end in ("ed", "ing"))})),
    "tag": ("instruction", "Add the question tag: {0}", "{0}, {1}?", tags),
}


def load(split="test", limit=0):
    """{task: [Example]}, always the same. Half of each task's questions, drawn from all over it, are validation data,
    the others test data. They are worded as those of ARC and OpenBookQA are."""
    tests = {}
    for name, (_, question, answer, source) in COMMON.items():
        rng, found = random.Random(name), []
        for key, right, wrong in source(rng):
            four = [answer.format(key, word) for word in (right, *rng.sample(sorted(wrong), 3))]
            choices = rng.sample(four, 4)
            one = multiple_choice(question.format(key), choices, choices.index(four[0]), letters=False)
            found.append(replace(one, task=name, source=f"{name} {len(found)}"))
        tests[name] = rng.sample(found, len(found))[split == "test" :: 2][: limit or None]
    return tests
