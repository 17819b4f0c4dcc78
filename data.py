"""From examples to tokens to batches, and from logits to scores.

    file or generator -> Example(task, segments, choices) -> Encoded(ids, labels, prompt) -> Batch(ids, labels, ctx)
    Batch -> model -> log-probabilities of the labels, or generated text -> {task: {figure: value}}

Read in this order: examples, the tokenizer, encoding, batches, scoring. Examples come from files (`formats/`) or from
the built-in suite (`base/suite.py`).
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from engine import devices
from engine.table import main_figure
from model import Context, UserError, labelled_positions, read_json, reading

# ---------------------------------------------------------------------------------------------- examples


@dataclass
class Segment:
    """A piece of an example's text: what somebody said, or a template's markup around it."""

    text: str
    role: str | None = None  # "system", "user", "input" (Alpaca's), "assistant"; None: markup
    trained: bool = False  # whether there is a loss on its tokens


@dataclass
class Example:
    """One record. Its segments are in reading order, so that several assistant turns fit; the prompt is all before the
    first trained one. choices: the answers to rank, the right one being that of the last trained text, or None. gold:
    what a generated answer is compared with; None: the last trained text. end: the token behind each answer where a
    template spells its own BOS as well; None: EOS, and BOS in front as the tokenizer's files say."""

    task: str
    segments: list[Segment]
    choices: list[str] | None = None
    gold: str | None = None
    end: str | None = None
    source: str = ""  # file:line, or task and number of the built-in suite


@dataclass
class Suite:
    """What a run learns and is scored on, as examples or, once `encode_suite` has been over it, as tokens."""

    trained: list[str]  # names of the tasks in `train`
    train: list  # [Example] or [Encoded]
    tests: dict  # {task: [Example] or [Encoded]}
    group: dict  # {task: "new" | "general"}
    aspect: dict  # {task: kind of task}
    score: dict  # {task: Score}, see "scoring" below
    validation: list = field(default_factory=list)  # of the trained tasks, for --eval-every

    @property
    def names(self):
        return list(dict.fromkeys([*self.tests, *self.trained]))

    def groups(self, scores):
        """{task: main figure} of the new tasks that are scored in percent, and of the general ones, from {task:
        {figure: value}}."""
        return [{task: main_figure(scores[task]) for task in scores
                 if self.group[task] == group and self.score[task].unit == "%"} for group in ("new", "general")]

    def means(self, scores):
        """(speciality, versatility): the mean of each group; None where it has no task."""
        return tuple(sum(g.values()) / len(g) if g else None for g in self.groups(scores))

    def errors(self, scores):
        """The standard errors of means(scores): a task's percentage p of n examples has variance p (100 - p) / n."""
        variance = lambda task, p: p * (100 - p) / len(self.tests[task])
        return tuple(math.sqrt(sum(variance(*item) for item in g.items())) / max(1, len(g))
                     for g in self.groups(scores))


# ---------------------------------------------------------------------------------------------- tokenizer


BOS, EOS = "<bos>", "<eos>"  # in a template's markup, whatever the tokenizer calls them
SETTINGS = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")


class Tokenizer:
    """A Hugging Face `tokenizer.json` with its special tokens. Its post-processor puts BOS first where files say so."""

    def __init__(self, fast, bos_id, eos_id, pad_id, stop_ids, template=None):
        self.fast, self.bos_id, self.eos_id, self.pad_id = fast, bos_id, eos_id, pad_id
        self.stop_ids, self.template, self.size = stop_ids, template, fast.get_vocab_size()
        self.special = {token.content: i for i, token in fast.get_added_tokens_decoder().items()}
        self.special |= {name: i for name, i in ((BOS, bos_id), (EOS, eos_id)) if i is not None}
        self.markup = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        # Llama 2's normalizer puts a space before any text, also before one that continues another. A line break in
        # front takes that space on itself, and is taken off again.
        spaced = re.search(r'"Prepend"|"prepend_scheme":\s*"(first|always)"', fast.to_str())
        self.lead = fast.encode("\n", add_special_tokens=False).ids if spaced else []
        behind = [fast.encode(text, add_special_tokens=False).ids for text in (fast.id_to_token(eos_id) + "a", "a")]
        self.respaced = behind[0][-len(behind[1]) :] == behind[1]  # whether text behind a special token gets it too
        fast.encode_special_tokens = True  # </s> in a text is five characters; special tokens are put in by number

    @classmethod
    def from_pretrained(cls, path):
        """Reads tokenizer.json, and the files named in SETTINGS where they exist.

        BOS is put first as add_bos_token says; without that setting, tokenizer.json's post-processor decides (so does
        transformers 4 for a Llama; 5 ignores the setting). Where no file names a pad token, EOS serves. Raises
        UserError for an absent tokenizer.json, a broken file, a vocabulary larger than the model's, and where no file
        names an EOS token.
        """
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            found = ", only tokenizer.model: load and save it with transformers, which writes tokenizer.json"
            raise UserError(f"{path} has no tokenizer.json{found if (path / 'tokenizer.model').exists() else ''}")
        with reading(path / "tokenizer.json"):
            fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
        fast.no_truncation()  # a file may remember how its training pipeline cut and padded
        fast.no_padding()
        sources, settings = [path / name for name in SETTINGS if (path / name).exists()], {}
        for file in sources:  # later files override earlier ones
            settings |= {key: value for key, value in read_json(file).items() if value is not None}
        token, last = max(fast.get_vocab().items(), key=lambda item: item[1])
        with reading(path / "config.json"):
            if last >= (size := settings.get("vocab_size", math.inf)):
                raise UserError(f"{path / 'tokenizer.json'}: token {token!r} has id {last}, expected less than "
                                f"vocab_size {size} of config.json: the tokenizer belongs to another model")

        def token_id(kind):
            token = settings.get(f"{kind}_token")
            token = token["content"] if isinstance(token, dict) else token
            found = token and fast.token_to_id(token)
            if token and found is None and kind != "pad":  # EOS serves, and nothing looks at padding
                raise UserError(f"{path}: {kind}_token {token!r:.80} is not in the vocabulary of tokenizer.json")
            return found

        with reading(path / "tokenizer_config.json"):
            bos, eos, pad = token_id("bos"), token_id("eos"), token_id("pad")
            stop = settings.get("eos_token_id", [])
            stop = set(stop if isinstance(stop, list) else [stop])
            if wrong := [i for i in stop if fast.id_to_token(i) is None]:
                raise UserError(f"{path}: eos_token_id is {wrong[0]!r:.80}, expected the id of a token, up to {last}")
        eos = min(stop, default=None) if eos is None else eos
        if eos is None:
            raise UserError(f"{path}: none of {', '.join(SETTINGS)} names an EOS token")
        with reading(path / "tokenizer.json"):
            if "add_bos_token" in settings:  # an EOS that it might add too would end the text that is to be continued
                first = [fast.id_to_token(bos)] if settings["add_bos_token"] and bos is not None else []
                fast.post_processor = processors.TemplateProcessing(
                    single=[*first, "$A"], special_tokens=[(token, bos) for token in first])
            return cls(fast, bos, eos, eos if pad is None else pad, stop | {eos}, settings.get("template"))

    def encode(self, text, start=True, spaced=False):
        """Token ids of a text. start: with what the tokenizer puts before a sequence (BOS). spaced: keep the space that
        the tokenizer puts before any text; with start it is kept anyway."""
        ids = self.fast.encode(text, add_special_tokens=start).ids
        if start or spaced or not self.lead:
            return ids
        after = self.fast.encode("\n" + text, add_special_tokens=False).ids
        n = len(self.lead)  # where the line break merges with the text, there is nothing to take off
        return after[n:] if after[:n] == self.lead else ids

    def decode(self, ids):
        return self.fast.decode(list(ids))


# ---------------------------------------------------------------------------------------------- encoding


@dataclass
class Encoded:
    """An example as tokens. labels: the id where it is trained on, else -100. prompt: its number of tokens."""

    ids: list
    labels: list
    prompt: int
    task: int
    choices: list | None = None  # an Encoded for each choice, labelled on the choice alone, without EOS
    gold: str = ""  # the answer as text
    source: str = ""  # as an Example's


def pieces(example, tokenizer):
    """[(text or id of a special token; trained?; arguments of Tokenizer.encode)] of an example, with the token that
    ends each answer. Only markup holds special tokens. Neighbouring segments with the same `trained` are one text."""
    found, end = [], tokenizer.special.get(example.end or EOS)
    if end is None:
        raise UserError(f"the tokenizer has no token {example.end!r}, which ends an answer: choose another --template")
    for trained, run in groupby(example.segments, key=lambda s: s.trained):
        parts = [""]
        for segment in run:
            at = 0
            for token in tokenizer.markup.finditer(segment.text) if segment.role is None else ():
                parts[-1] += segment.text[at : token.start()]
                parts, at = [*parts, tokenizer.special[token[0]], ""], token.end()
            parts[-1] += segment.text[at:]
        for part in [part for part in parts if part != "" or len(parts) == 1] + [end] * trained:
            how = (False, tokenizer.respaced and type(found[-1][0]) is int) if found else (example.end is None, True)
            found.append((part, trained, how))
    return found


def encode(examples, tokenizer, names):
    """[Encoded] for examples, in order. names: all task names, whose order gives the task index.

    Prompts and answers are tokenized apart, so that no token reaches across their border; the token that ends an answer
    is trained too. The very first token is never trained on: nothing predicts it.
    """
    ids_of = cache(lambda part, how: [part] if isinstance(part, int) else tokenizer.encode(part, *how))
    out = []
    for e in examples:
        parts = pieces(e, tokenizer)
        tokens = [ids_of(part, how) for part, _, how in parts]
        labels = [i if trained else -100 for piece, (_, trained, _) in zip(tokens, parts) for i in piece]
        labels[:1] = [-100]
        prompt = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        before, ids, task, choices = sum(tokens[:-2], []), sum(tokens, []), names.index(e.task), None
        if e.choices:  # tokenized as the answer is, the piece before the last one
            texts = {c: ids_of(c, parts[-2][2]) for c in e.choices}
            choices = [Encoded(before + texts[c], [-100] * len(before) + texts[c], prompt, task, gold=c,
                               source=e.source) for c in e.choices]
        last = next((part for part, *_ in reversed(parts) if isinstance(part, str)), "")
        out.append(Encoded(ids, labels, prompt, task, choices, last if e.gold is None else e.gold, e.source))
    return out


def fit(encoded, longest):
    """Cuts examples in place to at most `longest` tokens; returns how many were longer. Tokens go from the front of the
    prompt, behind its first token, down to half of `longest`, then from the end."""
    long = 0
    for e in encoded:
        over = max(len(one.ids) for one in (e, *(e.choices or ()))) - longest
        if over <= 0:
            continue
        long, front = long + 1, min(over, max(0, e.prompt - longest // 2))
        for one in (e, *(e.choices or ())):
            one.ids, one.labels = one.ids[:1] + one.ids[1 + front :], one.labels[:1] + one.labels[1 + front :]
            one.ids, one.labels, one.prompt = one.ids[:longest], one.labels[:longest], one.prompt - front
    return long


def encode_suite(suite, tokenizer, longest):
    """The Suite with its examples as tokens, none longer than `longest`; says how many were cut."""
    def tokens(examples, what):
        found = encode(examples, tokenizer, suite.names)
        if long := fit(found, longest):
            print(f"{what}: {long:,} of {len(examples):,} examples are longer than {longest} tokens: cut")
        return found

    return replace(suite, train=tokens(suite.train, "training"), validation=tokens(suite.validation, "validation"),
                   tests={task: tokens(examples, task) for task, examples in suite.tests.items()})


# ---------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T) int64, padded on the right
    labels: torch.Tensor  # (B, T) int64, -100 where there is no loss
    ctx: Context  # of the pass over this batch: its prompt mask (tokens before the first trained one) and tasks

    def to(self, device):
        ctx = Context(*(t.to(device) for t in (self.ctx.prompt_mask, self.ctx.tasks, self.ctx.labelled)))
        return Batch(self.ids.to(device), self.labels.to(device), ctx)


SAVED = {"cpu": 64, "cuda": 1024}  # tokens of padding that are worth another pass; our choice


def draw(examples, size, seed):
    """Endless groups of `size` examples: epoch after epoch in a new order, similar lengths together.

    Lengths are similar when they fall into one bucket, each 1.5 times as wide as the one before. Sorting by the exact
    length would save a little more padding, but tasks differ in length, and a group should mix them.
    """
    rng, pool = random.Random(seed), []
    groups = max(1, min(32, max(len(examples), 100_000) // size))  # 32, unless that were many times the data
    while True:
        while len(pool) < groups * size:
            pool += rng.sample(examples, len(examples))
        chunk, pool = pool[: groups * size], pool[groups * size :]
        chunk.sort(key=lambda e: int(math.log(len(e.ids), 1.5)))
        parts = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        rng.shuffle(parts)
        yield from parts


def collate(group, pad):
    """Batch of encoded examples, padded on the right: a causal model never looks there, so no mask is needed."""
    T = max(len(e.ids) for e in group)
    ids = torch.tensor([e.ids + [pad] * (T - len(e.ids)) for e in group])
    labels = torch.tensor([e.labels + [-100] * (T - len(e.ids)) for e in group])
    prompt_mask = torch.arange(T) < torch.tensor([e.prompt for e in group])[:, None]
    tasks = torch.tensor([e.task for e in group])
    return Batch(ids, labels, Context(prompt_mask, tasks, labelled_positions(labels)))


def micro_batches(group, size, device):
    """A step's group cut into micro-batches, lists of at most `size` examples of similar lengths.

    Shortest first; then each cut that saves more padding than a pass costs by itself (SAVED tokens) is made.
    """
    group = sorted(group, key=lambda e: len(e.ids))
    left, parts = [group[i : i + size] for i in range(0, len(group), size)], []
    while left:
        part = left.pop()
        saved = [i * (len(part[-1].ids) - len(part[i - 1].ids)) for i in range(1, len(part))]
        if max(saved, default=0) > SAVED.get(device.type, SAVED["cuda"]):
            cut = 1 + saved.index(max(saved))
            left += part[:cut], part[cut:]
        else:
            parts.append(part)
    return parts


# ---------------------------------------------------------------------------------------------- scoring

@dataclass(frozen=True)
class Score:
    """How a task is scored; results.json keeps the name.

    function(model, encoded examples, tokenizer, batch size, longest generated answer) -> {figure: value}, the main one
    first. unit: "%" of the examples, which has an interval and counts in the group means; or anything else.
    """

    name: str
    unit: str
    function: Callable


@torch.no_grad()
def answer_scores(model, examples, pad, batch_size):
    """For each encoded example (sum of log-probabilities, their number, whether each was the arg-max) of its labels.
    Raises UserError where one is NaN or infinite."""
    def scores(part):
        batch = collate(part, pad).to(model.device)
        logits, targets = model.labelled_logits(batch.ids, batch.labels, batch.ctx)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = batch.ctx.labelled // batch.ids.shape[1]
        columns = (-F.cross_entropy(logits, targets, reduction="none"), torch.ones_like(targets),
                   (logits.argmax(-1) != targets).long())
        chances, counts, wrong = (torch.zeros(len(part), dtype=c.dtype, device=c.device).index_add_(0, rows, c).tolist()
                                  for c in columns)
        for e, chance in zip(part, chances):
            if not math.isfinite(chance):
                raise UserError(f"an answer's log-probability is {chance} (example {e.source[-24:]}): the model's "
                                "numbers overflow; try --dtype float32, or a lower --lr")
        return [(chance, number, misses == 0) for chance, number, misses in zip(chances, counts, wrong)]

    return in_batches(scores, examples, batch_size, lambda e: len(e.ids), "scoring, batch")


def in_batches(function, examples, size, key, what):
    """[result for each example] of a function of batches. Examples with similar keys share a batch, and the batches are
    dealt out to the processes. what: see engine.progress."""
    order = sorted(range(len(examples)), key=lambda i: key(examples[i]))
    batches = [[examples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    results = dict(zip(order, chain.from_iterable(devices.map_over_processes(function, batches, what))))
    return [results[i] for i in range(len(examples))]


def percent(hits):
    return 100 * sum(hits) / len(hits)


def exact_match(model, examples, tokenizer, batch_size, new_tokens):
    """Greedy exact match. No generation is needed: an answer is what greedy decoding gives exactly when each of its
    tokens, EOS included, is the arg-max after the true tokens before it."""
    scores = answer_scores(model, examples, tokenizer.pad_id, batch_size)
    return {"exact match": percent([hit for *_, hit in scores])}


def likeliest_choice(model, examples, tokenizer, batch_size, new_tokens):
    """Is the right choice the likeliest? By its log-probability, and by that for each byte of its text, since a long
    choice has a small probability whatever it says."""
    every = [c for e in examples for c in e.choices]
    scores = iter(answer_scores(model, every, tokenizer.pad_id, batch_size))
    raw, by_byte = [], []
    for e in examples:
        sums = [next(scores)[0] for _ in e.choices]
        rates = [s / len(c.gold.strip().encode()) for s, c in zip(sums, e.choices)]
        for values, hits in ((sums, raw), (rates, by_byte)):
            hits.append(e.choices[values.index(max(values))].gold == e.gold)
    return {"choice": percent(raw), "choice, by byte": percent(by_byte)}


def mean_loss(model, examples, tokenizer, batch_size, new_tokens):
    """Mean over all trained tokens of their negative log-probability in nats, and its exponential."""
    scores = answer_scores(model, examples, tokenizer.pad_id, batch_size)
    value = -sum(s for s, *_ in scores) / sum(n for _, n, _ in scores)
    return {"loss": value, "perplexity": math.exp(min(value, 700))}


exact = Score("exact", "%", exact_match)
choice = Score("choice", "%", likeliest_choice)
loss = Score("loss", "nats", mean_loss)


def evaluate(model, suite, tokenizer, batch_size=48, new_tokens=256):
    """{task: {figure: value}}, the main figure first, of an encoded suite's tests."""
    model.eval()
    with model.autocast():
        return {task: suite.score[task].function(model, examples, tokenizer, batch_size, new_tokens)
                for task, examples in suite.tests.items()}
