"""The built-in suite: invented tasks, generated from fixed seeds.

*General* tasks, on which the base beside this file is pretrained, and *new* tasks, which it scores near zero on. Every
prompt is invented, so no pretraining elsewhere could have seen it. Training, validation and test prompts of a task
never share their operands; facts are asked about in other words.
"""

import random
import zlib

from base.common import COMMON
from base.common import load as load_common
from data import Example, Segment, Suite, choice, exact
from model import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"pretrain": 20000, "train": 2000, "validation": 200, "test": 200}  # examples of each task


def invent(count, syllables, ends, seed):
    """`count` distinct invented names, such as Tavik or Moruland; always the same ones for a seed."""
    rng, names = random.Random(seed), []
    while len(names) < count:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)) + rng.choice(ends)
        if name.capitalize() not in names:
            names.append(name.capitalize())
    return names


COUNTRIES = invent(100, 2, ("land", "nia", "stan", "via"), seed=1)
CITIES = invent(100, 2, ("k", "n", "r", "s", "m"), seed=2)
PEOPLE = invent(100, 2, ("", "l", "n"), seed=3)
ANIMALS = invent(100, 1, ("ngo", "rpu", "lka", "xi", "mbo", "zzy"), seed=4)
COINS = invent(20, 1, ("lar", "ppet", "nd", "tt"), seed=5)
JOBS = ("baker pilot farmer doctor singer painter teacher sailor miner tailor judge hunter poet guard cook clerk "
        "dancer potter weaver driver").split()
PLACES = ("forest desert river ocean cave swamp meadow mountain island valley canyon lake glacier jungle beach "
          "prairie").split()
THINGS = "lamp key drum coin rope book ring map bell cup knife box flute mask horn seed".split()


# A task is a function (rng, split) -> (key, instruction, answer). A key is used in one split alone; facts have none.

# A fact is asked for with an opening and a question. Every fact task uses the same ones, so a model can learn what they
# have in common; validation and test use combinations that training leaves out.
OPENINGS = ("", "Please answer. ", "A question: ", "Hello! ", "I want to know this. ")
QUESTIONS = ("What is the {noun} of {subject}?", "Name the {noun} of {subject}.", "Which {noun} does {subject} have?",
             "{subject} has what {noun}?", "Tell me: {subject}, {noun}.")
WORDINGS = {split: [OPENINGS[i] + QUESTIONS[j] for i in range(5) for j in range(5) if (i + j) % 5 in shifts]
            for split, shifts in (("train", (2, 3, 4)), ("validation", (1,)), ("test", (0,)))}


def facts(noun, subjects, values, seed):
    """A task that asks for one fact about each subject; the split decides in which words. With as many values as
    subjects each value belongs to one subject, else they are drawn."""
    if len(values) < len(subjects):
        values = random.Random(seed).choices(values, k=len(subjects))

    def make(rng, split):
        i = rng.randrange(len(subjects))
        return None, rng.choice(WORDINGS[split]).format(noun=noun, subject=subjects[i]), values[i]

    return make


def on_letters(phrasings, function):
    """A task that asks for function(letters) of four to seven different letters, spelled with spaces: as a word, merged
    tokens would make reversing and sorting a different, much harder task."""

    def make(rng, split):
        letters = rng.sample(LETTERS, rng.randint(4, 7))
        spelled = " ".join(letters)
        return spelled, rng.choice(phrasings).format(spelled), " ".join(function(letters))

    return make


def add(rng, split):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{min(a, b)} {max(a, b)}", rng.choice(("What is {} + {}?", "Add {} and {}.")).format(a, b), str(a + b)


def compare(rng, split):
    a, b = rng.sample(range(100, 1000), 2)
    p = rng.choice(("Which is larger, {} or {}?", "Name the larger of {} and {}."))
    return f"{min(a, b)} {max(a, b)}", p.format(a, b), str(max(a, b))


def count(rng, split):
    letters = [rng.choice("abcd") for _ in range(rng.randint(5, 9))]
    spelled, x = " ".join(letters), rng.choice("abcd")
    return spelled + x, f"How many times does {x} occur in: {spelled}", str(letters.count(x))


def drop(rng, split):
    letters = [rng.choice("abcdefgh") for _ in range(rng.randint(4, 6))]
    spelled, x = " ".join(letters), rng.choice(letters)
    return spelled + x, f"Remove every {x} from: {spelled}", " ".join(y for y in letters if y != x) or "nothing"


GENERAL = {
    "capital": ("knowledge", facts("capital", COUNTRIES, CITIES, seed=11)),
    "job": ("knowledge", facts("job", PEOPLE, JOBS, seed=12)),
    "home": ("knowledge", facts("home", ANIMALS, PLACES, seed=13)),
    "add": ("reasoning", add),
    "compare": ("reasoning", compare),
    "count": ("reasoning", count),
    "reverse": ("instruction", on_letters(("Reverse: {}", "Write backwards: {}"), lambda xs: xs[::-1])),
    "sort": ("instruction", on_letters(("Sort: {}", "Put in alphabetical order: {}"), sorted)),
    "upper": ("instruction", on_letters(("Write in capitals: {}", "Change to upper case: {}"),
                                        lambda xs: [x.upper() for x in xs])),
    "drop": ("instruction", drop),
}

CIPHER = dict(zip(LETTERS, random.Random(21).sample(LETTERS, 26)))


def largest(rng, split):
    numbers = rng.sample(range(10, 100), rng.randint(7, 9))
    question = rng.choice(("Which is the largest of {}?", "Find the largest number: {}"))
    return " ".join(map(str, sorted(numbers))), question.format(" ".join(map(str, numbers))), str(max(numbers))


def story(rng, split):
    """One sentence, and one of four questions about it."""
    giver, getter, thing, place = (rng.choice(words) for words in (JOBS, PEOPLE, THINGS, PLACES))
    question, answer = rng.choice((("Who gave it?", giver), ("Who got it?", getter), ("What was it?", thing),
                                   ("Where?", place)))
    sentence = f"In the {place} the {giver} gave {getter} a {thing}."
    return sentence, f"{sentence} {question}", answer


NEW = {
    "currency": ("facts", facts("currency", COUNTRIES[:60], COINS, seed=14)),
    "tool": ("facts", facts("tool", PEOPLE[:60], THINGS, seed=15)),
    "cipher": ("strings", on_letters(("Encode: {}", "Write in code: {}"), lambda xs: [CIPHER[x] for x in xs])),
    "descending": ("strings", on_letters(("Sort from the end: {}", "Put in reverse alphabetical order: {}"),
                                         lambda xs: sorted(xs)[::-1])),
    "largest": ("numbers", largest),
    "story": ("reading", story),
}
TASKS = {**NEW, **GENERAL}  # {name: (aspect, make)}


def generate(name, split):
    """The [Example] of one built-in task and split, always the same. Validation and test prompts are all different. A
    key's checksum sends 80 % of them to training, 10 % to each of the others."""
    _, make = TASKS[name]
    rng, out, seen = random.Random(f"{name} {split}"), [], set()
    size = SIZES[split if split != "train" else "pretrain" if name in GENERAL else "train"]
    while len(out) < size:
        key, instruction, answer = make(rng, split)
        its_split = {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 10, "train") if key else split
        if its_split == split and (split == "train" or instruction not in seen):
            seen.add(instruction)
            said = [Segment(instruction, "user"), Segment(answer, "assistant", trained=True)]
            out.append(Example(name, said, gold=answer, source=f"{name} {len(out)}"))
    return out


def load(tasks="all", split="test", limit=0, common=False):
    """Suite of the built-in tasks. tasks: "all" of NEW, some of them ("currency,cipher"), or "general" for pretraining.
    common: for a base that knows nothing of GENERAL, versatility is measured on everyday questions (`base/common.py`).

    Raises UserError, listing the valid names, for a task that does not exist.
    """
    trained = list(dict.fromkeys({"all": NEW, "general": GENERAL}.get(tasks, [t.strip() for t in tasks.split(",")])))
    if wrong := [t for t in trained if t not in NEW and tasks != "general"]:
        raise UserError(f"--tasks: unknown task {wrong[0]!r}; valid: {', '.join(NEW)}, or all")
    tests = {t: generate(t, split)[: limit or None] for t in TASKS if t in trained or t in GENERAL and not common}
    tests |= load_common(split, limit) if common else {}
    return Suite(trained, [e for t in trained for e in generate(t, "train")], tests,
                 {t: "new" if t in NEW else "general" for t in tests}, {t: (TASKS | COMMON)[t][0] for t in tests},
                 {t: choice if t in COMMON else exact for t in tests},
                 [e for t in trained for e in generate(t, "validation")])
