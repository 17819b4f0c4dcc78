"""From records to batches, and from logits to scores.

    file or generator -> records -> Example(task, segments, choices) -> Batch(ids, labels, prompt_mask, tasks)

Read in this order: examples and the prompt template, the tokenizer, batches, scoring, the built-in suite, and a small
program, `python data.py`, that shows all of it.

The built-in suite has *general* tasks, on which `base/` is pretrained, and *new* tasks, which it scores near zero on.
Every prompt is invented, so no pretraining elsewhere could have seen it. Training, validation and test prompts of a
task never share their operands; facts are asked about in other words.
"""

import json
import math
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# ---------------------------------------------------------------------------------------------- examples


@dataclass
class Example:
    """One record, ready to be tokenized. segments are (text, trained?) pairs in reading order, so that several
    assistant turns fit; the prompt is all before the first trained one. choices: the answers to rank, or None."""

    task: str
    segments: list
    choices: list | None = None


# Prompt templates: instruction -> prompt text. `short` is Alpaca's without its opening sentence.
TEMPLATES = {
    "plain": "{}".format,
    "short": "### Instruction:\n{}\n\n### Response:\n".format,
}


# ---------------------------------------------------------------------------------------------- tokenizer


def read_settings(file):
    """What a JSON file sets, without its nulls; nothing where it is absent. Raises ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}, expected an object: {{...}}")
    return {key: value for key, value in found.items() if value is not None}


class Tokenizer:
    """A Hugging Face `tokenizer.json` with its special tokens. Its post-processor puts BOS first where files say so."""

    def __init__(self, fast, bos_id, eos_id, pad_id, stop_ids, template=None):
        self.fast, self.bos_id, self.eos_id, self.pad_id = fast, bos_id, eos_id, pad_id
        self.stop_ids, self.template, self.size = stop_ids, template, fast.get_vocab_size()

    @classmethod
    def from_pretrained(cls, path):
        """Reads tokenizer.json, and the settings of the files in `sources` where they are.

        BOS is put first as add_bos_token says; without that setting, tokenizer.json's post-processor decides (so does
        transformers 4 for a Llama; 5 ignores the setting). Where no file names a pad token, EOS serves. Raises
        ValueError for an absent tokenizer.json, a broken file, a vocabulary larger than the model's, and where no file
        names an EOS token.
        """
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            found = ", only tokenizer.model: load and save it with transformers, which writes tokenizer.json"
            raise ValueError(f"{path} has no tokenizer.json{found if (path / 'tokenizer.model').exists() else ''}")
        try:
            fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{path / 'tokenizer.json'} does not parse: {error}") from None
        fast.no_truncation()  # a file may remember how its training pipeline cut and padded
        fast.no_padding()
        sources = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
        found = [read_settings(path / name) for name in sources]
        settings = {key: value for part in found for key, value in part.items()}  # a later file knows better
        token, last = max(fast.get_vocab().items(), key=lambda item: item[1])
        if last >= (size := found[0].get("vocab_size", math.inf)):
            raise ValueError(f"{path / 'tokenizer.json'}: token {token!r} has id {last}, expected less than vocab_size "
                             f"{size} of config.json: the tokenizer belongs to another model")

        def token_id(kind):
            token = settings.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            return fast.token_to_id(token) if token else None

        stop = settings.get("eos_token_id", [])
        stop = set(stop if isinstance(stop, list) else [stop])
        bos, eos, pad = token_id("bos"), token_id("eos"), token_id("pad")
        eos = min(stop, default=None) if eos is None else eos
        if eos is None:
            raise ValueError(f"{path}: none of {', '.join(sources)} names an EOS token")
        if "add_bos_token" in settings:  # an EOS that it might add too would end the text that is to be continued
            first = [fast.id_to_token(bos)] if settings["add_bos_token"] and bos is not None else []
            fast.post_processor = processors.TemplateProcessing(
                single=[*first, "$A"], special_tokens=[(token, bos) for token in first])
        return cls(fast, bos, eos, eos if pad is None else pad, stop | {eos}, settings.get("template"))

    def encode(self, text, start=True):
        """Token ids of a text; start adds what the tokenizer puts before a sequence (BOS)."""
        return self.fast.encode(text, add_special_tokens=start).ids

    def decode(self, ids):
        return self.fast.decode(list(ids))

    def save(self, path):
        """Writes tokenizer.json and a tokenizer_config.json that transformers reads."""
        path.mkdir(parents=True, exist_ok=True)
        self.fast.save(str(path / "tokenizer.json"))
        special = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                    **{name: self.fast.id_to_token(i) for name, i in special.items()}, "template": self.template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_tokenizer(examples, size=512):
    """A byte-level BPE of `size` entries. Each digit stays a token of its own: merged digits would make arithmetic a
    different, much harder task."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    fast.train_from_iterator(
        ("".join(text for text, _ in e.segments) for e in examples),
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(fast, bos_id=1, eos_id=2, pad_id=0, stop_ids={2}, template="short")


# ---------------------------------------------------------------------------------------------- batches


@dataclass
class Encoded:
    """An example as tokens. labels: the id where it is trained on, else -100. prompt: its number of tokens."""

    ids: list
    labels: list
    prompt: int
    task: int


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T) int64, padded on the right
    labels: torch.Tensor  # (B, T) int64, -100 where there is no loss
    prompt_mask: torch.Tensor  # (B, T) bool, the tokens before the first trained one
    tasks: torch.Tensor  # (B,) int64, index into the suite's task names

    def to(self, device):
        return Batch(*(t.to(device) for t in (self.ids, self.labels, self.prompt_mask, self.tasks)))


def encode(examples, tokenizer, names):
    """[Encoded] for examples, in order. names: all task names, whose order gives the task index.

    Segments are tokenized one by one, so that no token reaches across the border of prompt and answer; an EOS, trained
    too, ends every trained segment.
    """
    texts = [(text, i == 0) for e in examples for i, (text, _) in enumerate(e.segments)]
    ids = {}
    for start in (True, False):  # two batch calls are several times faster than a call for each text
        wanted = list(dict.fromkeys(text for text, first in texts if first == start))
        encodings = tokenizer.fast.encode_batch(wanted, add_special_tokens=start)
        ids.update({(text, start): e.ids for text, e in zip(wanted, encodings)})
    out = []
    for e in examples:
        tokens, labels = [], []
        for i, (text, trained) in enumerate(e.segments):
            piece = ids[text, i == 0] + [tokenizer.eos_id] * trained
            tokens += piece
            labels += piece if trained else [-100] * len(piece)
        prompt = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        out.append(Encoded(tokens, labels, prompt, names.index(e.task)))
    return out


def draw(examples, size, seed):
    """Endless groups of `size` examples: epoch after epoch in a new order, similar lengths together.

    Lengths are similar when they fall into one bucket, each 1.5 times as wide as the one before. Sorting by the exact
    length would save a little more padding, but tasks differ in length, and a group should mix them.
    """
    rng, pool = random.Random(seed), []
    while True:
        while len(pool) < 32 * size:
            pool += rng.sample(examples, len(examples))
        chunk, pool = pool[: 32 * size], pool[32 * size :]
        chunk.sort(key=lambda e: int(math.log(len(e.ids), 1.5)))
        groups = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        rng.shuffle(groups)
        yield from groups


def collate(group, pad):
    """Batch of encoded examples, padded on the right: a causal model never looks there, so no mask is needed."""
    B, T = len(group), max(len(e.ids) for e in group)
    ids, labels = torch.full((B, T), pad), torch.full((B, T), -100)
    for row, e in enumerate(group):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        labels[row, : len(e.ids)] = torch.tensor(e.labels)
    prompt_mask = torch.arange(T) < torch.tensor([e.prompt for e in group])[:, None]
    return Batch(ids, labels, prompt_mask, torch.tensor([e.task for e in group]))


# ---------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def hits(model, examples, pad, context, batch_size=100):
    """Greedy exact match of each encoded example, [bool].

    No generation is needed: an answer is what greedy decoding gives exactly when each of its tokens, EOS included, is
    the arg-max after the true tokens before it. context(batch) -> the model's ctx.
    """
    found, order = [False] * len(examples), sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = collate([examples[i] for i in part], pad).to(model.device)
        logits, targets = model.labelled_logits(batch.ids, batch.labels, context(batch))
        wrong = torch.zeros(len(part), dtype=torch.long, device=model.device)
        rows = (batch.labels[:, 1:] != -100).nonzero()[:, 0]
        wrong.index_add_(0, rows, (logits.argmax(-1) != targets).long())
        for i, n in zip(part, wrong.tolist()):
            found[i] = n == 0
    return found


# ---------------------------------------------------------------------------------------------- the built-in suite

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPLITS = ("train", "validation", "test")
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
        return rng.choice(WORDINGS[split]).format(noun=noun, subject=subjects[i]), values[i]

    return make


def split_of(key):
    """The one split that an operand belongs to: a checksum sends 80 % to training, 10 % to each of the others."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 10, "train")


def skill(draw):
    """A task whose operands are drawn at random; draw(rng) gives (key, instruction, answer)."""

    def make(rng, split):
        while True:
            key, instruction, answer = draw(rng)
            if split_of(key) == split:
                return instruction, answer

    return make


def on_letters(phrasings, function):
    """A task that asks for function(letters) of four to seven different letters, spelled with spaces: as a word, merged
    tokens would make reversing and sorting a different, much harder task."""

    def draw(rng):
        letters = rng.sample(LETTERS, rng.randint(4, 7))
        spelled = " ".join(letters)
        return spelled, rng.choice(phrasings).format(spelled), " ".join(function(letters))

    return skill(draw)


def add(rng):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{min(a, b)} {max(a, b)}", rng.choice(("What is {} + {}?", "Add {} and {}.")).format(a, b), str(a + b)


def compare(rng):
    a, b = rng.sample(range(100, 1000), 2)
    p = rng.choice(("Which is larger, {} or {}?", "Name the larger of {} and {}."))
    return f"{min(a, b)} {max(a, b)}", p.format(a, b), str(max(a, b))


def count(rng):
    letters = [rng.choice("abcd") for _ in range(rng.randint(5, 9))]
    spelled, x = " ".join(letters), rng.choice("abcd")
    return spelled + x, f"How many times does {x} occur in: {spelled}", str(letters.count(x))


def drop(rng):
    letters = [rng.choice("abcdefgh") for _ in range(rng.randint(4, 6))]
    spelled, x = " ".join(letters), rng.choice(letters)
    return spelled + x, f"Remove every {x} from: {spelled}", " ".join(y for y in letters if y != x) or "nothing"


GENERAL = {
    "capital": ("knowledge", facts("capital", COUNTRIES, CITIES, seed=11)),
    "job": ("knowledge", facts("job", PEOPLE, JOBS, seed=12)),
    "home": ("knowledge", facts("home", ANIMALS, PLACES, seed=13)),
    "add": ("reasoning", skill(add)),
    "compare": ("reasoning", skill(compare)),
    "count": ("reasoning", skill(count)),
    "reverse": ("instruction", on_letters(("Reverse: {}", "Write backwards: {}"), lambda xs: xs[::-1])),
    "sort": ("instruction", on_letters(("Sort: {}", "Put in alphabetical order: {}"), sorted)),
    "upper": ("instruction", on_letters(("Write in capitals: {}", "Change to upper case: {}"),
                                        lambda xs: [x.upper() for x in xs])),
    "drop": ("instruction", skill(drop)),
}

CIPHER = dict(zip(LETTERS, random.Random(21).sample(LETTERS, 26)))


def largest(rng):
    numbers = rng.sample(range(10, 100), rng.randint(7, 9))
    listed = " ".join(map(str, numbers))
    question = rng.choice(("Which is the largest of {}?", "Find the largest number: {}"))
    return " ".join(map(str, sorted(numbers))), question.format(listed), str(max(numbers))


def story(rng):
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
    "largest": ("numbers", skill(largest)),
    "story": ("reading", skill(story)),
}
TASKS = {**NEW, **GENERAL}  # {name: (aspect, make)}


@dataclass
class Suite:
    """What a run learns and is scored on."""

    trained: list  # names of the tasks in `train`
    train: list  # [Example]
    tests: dict  # {task: [Example]}
    group: dict  # {task: "new" | "general"}
    aspect: dict  # {task: what kind of task it is}

    @property
    def names(self):
        return list(self.tests)


def generate(name, split):
    """The [Example] of one built-in task and split, always the same. Validation and test prompts are all different."""
    _, make = TASKS[name]
    rng, out, seen = random.Random(f"{name} {split}"), [], set()
    size = SIZES[split if split != "train" else "pretrain" if name in GENERAL else "train"]
    while len(out) < size:
        instruction, answer = make(rng, split)
        if split == "train" or instruction not in seen:
            seen.add(instruction)
            out.append(Example(name, [(TEMPLATES["short"](instruction), False), (answer, True)]))
    return out


def load_builtin(tasks="all", split="test", limit=0, replay=0.0):
    """Suite of the built-in tasks. tasks: "all" new ones, some of them ("currency,swap"), or "general" for pretraining.
    replay: share of the training examples that come from the general tasks' training data.

    Raises ValueError, listing the valid names, for a task that does not exist.
    """
    trained = list({"all": NEW, "general": GENERAL}.get(tasks, [t.strip() for t in tasks.split(",")]))
    if wrong := [t for t in trained if t not in NEW and tasks != "general"]:
        raise ValueError(f"--tasks: unknown task {wrong[0]!r}; valid: {', '.join(NEW)}")
    train = [e for t in trained for e in generate(t, "train")]
    if replay:
        old = [e for t in GENERAL for e in generate(t, "train")]
        train += random.Random("replay").sample(old, round(len(train) * replay / (1 - replay)))
    scored = [t for t in TASKS if t in trained or t in GENERAL]
    return Suite(trained, train, {t: generate(t, split)[: limit or None] for t in scored},
                 {t: "general" if t in GENERAL else "new" for t in scored}, {t: TASKS[t][0] for t in scored})


# ---------------------------------------------------------------------------------------------- program


def show(example, encoded, tokenizer):
    """One example, token by token: tokens in brackets are trained on."""
    pieces = [repr(tokenizer.fast.decode([i], skip_special_tokens=False))[1:-1] for i in encoded.ids]
    return " ".join(f"[{piece}]" if label != -100 else piece for piece, label in zip(pieces, encoded.labels))


def main():
    import argparse

    parser = argparse.ArgumentParser(description="What the data look like, and what is trained on.", allow_abbrev=False)
    parser.add_argument("--base", default="base", help="checkpoint folder whose tokenizer counts (%(default)s)")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.base)
    names = list(TASKS)
    line = "{:<12}{:<9}{:<13}{:>7}{:>7}{:>6}{:>8}{:>9}   {}".format
    print(line("task", "group", "aspect", "train", "valid", "test", "tokens", "trained", "first training example"))
    for name in names:
        splits = {split: generate(name, split) for split in SPLITS}
        sizes = [len(splits[split]) for split in SPLITS]
        train = encode(splits["train"], tokenizer, names)
        tokens = sum(len(e.ids) for e in train) / len(train)
        trained = sum(label != -100 for e in train for label in e.labels) / len(train)
        example = splits["train"][0]
        question = example.segments[0][0].removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n")
        print(line(name, "general" if name in GENERAL else "new", TASKS[name][0], *sizes, f"{tokens:.1f}",
                   f"{trained:.1f}", f"{question} -> {example.segments[1][0]}"))
    print("\nThe prompt template, token by token; [brackets] mark what is trained on:")
    for name in (next(iter(NEW)), next(iter(GENERAL))):
        example = generate(name, "train")[0]
        print(f"  {name}: {show(example, encode([example], tokenizer, names)[0], tokenizer)}")


if __name__ == "__main__":
    from model import command_line

    command_line(main)
