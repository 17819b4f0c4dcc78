"""From examples to tokens to batches, and from logits to scores.

    formats/ or base/suite.py -> Example(task, segments, choices) -> Encoded(ids, labels, prompt)
    Encoded -> Batch(ids, labels, ctx) -> model -> log-probabilities of the labels, or text -> {task: {figure: value}}
"""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as FastTokenizer

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
    """One record, in reading order: what was said (system, user, assistant, maybe several turns) or, once a template
    has been around it, that and markup. Its prompt is all before the trained segments, which are its last answer."""

    task: str
    segments: list[Segment]
    choices: list | dict | None = None  # the answers to rank, as texts, then as {text: segments}
    gold: str = ""  # the last answer, which choices and generated texts are compared with
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

    def joined(self, other):
        """The Suite with the tests of another one, too. Raises UserError where both have a task of one name."""
        if both := self.tests.keys() & other.tests.keys():
            raise UserError(f"task {min(both)!r} is a built-in one: name the file's apart with NAME=FILE")
        return replace(self, **{name: getattr(self, name) | getattr(other, name)
                                for name in ("tests", "group", "aspect", "score")})

    @property
    def names(self):
        return list(dict.fromkeys([*self.tests, *self.trained]))

    def groups(self, scores):
        """{task: main figure} of the new and of the general tasks that are in percent, from {task: {figure: value}}."""
        return [{task: main_figure(scores[task]) for task in scores
                 if self.group[task] == group and self.score[task].unit == "%"} for group in ("new", "general")]

    def means(self, scores):
        """(speciality, versatility): the mean of each group; None where it has no task."""
        return tuple(sum(g.values()) / len(g) if g else None for g in self.groups(scores))

    def errors(self, scores):
        """The standard errors of means(scores): a task's percentage p of n examples has variance p (100 - p) / n."""
        return tuple(math.sqrt(sum(p * (100 - p) / len(self.tests[task]) for task, p in g.items())) / max(1, len(g))
                     for g in self.groups(scores))


# ---------------------------------------------------------------------------------------------- tokenizer


SETTINGS = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")


class Tokenizer:
    """A Hugging Face `tokenizer.json` with its special tokens, which come from a template's markup alone: in what
    somebody said, </s> is four characters. names: {"bos_token": text, ...}."""

    def __init__(self, fast, bos_id, eos_id, pad_id, stop_ids, names):
        self.fast, self.bos_id, self.eos_id, self.pad_id = fast, bos_id, eos_id, pad_id
        self.stop_ids, self.names, self.size = stop_ids, names, fast.get_vocab_size()
        state = json.loads(fast.to_str())
        added, special = state["added_tokens"], [token for token in state["added_tokens"] if token["special"]]
        spelled = lambda tokens: re.compile("|".join(re.escape(t["content"]) for t in sorted(
            tokens, key=lambda t: -len(t["content"]))) or "(?!)")
        self.special, self.added = spelled(special), spelled(added)
        # A second tokenizer, in which the special tokens have private spellings. It numbers all added ones anew.
        state["added_tokens"] = private = [
            {**t, "content": f"\ue002{t['id']}\ue003", "normalized": False} if t["special"] else t for t in added]
        # Where they are looked for in normalized text, a space that begins a text begins the whole of it alone.
        steps = (state["normalizer"] or {}).get("normalizers", [])
        self.spaced = any(step["type"] == "Prepend" for step in steps) and all(t["normalized"] for t in special)
        if self.spaced:
            state["normalizer"]["normalizers"] = [step for step in steps if step["type"] != "Prepend"]
        self.private = FastTokenizer.from_str(json.dumps(state))
        self.ids = {self.private.token_to_id(t["content"]): t["id"] for t in private}
        self.spelling = {t["content"]: new["content"] for t, new in zip(added, private)}
        fast.encode_special_tokens = True
        # What goes in front of a text: BOS where the tokenizer puts it, and the space that such a text begins with.
        bos = names.get("bos_token", "")
        self.opening = next((first for first in ("", bos, bos + " ") if self.encode_segments(
            [Segment(first), Segment("a", "user")])[0] == self.encode("a")), "")

    def protect(self, tokens):
        """Makes special tokens of added ones that a template spells, so that they come from its markup alone."""
        if tokens:
            self.fast.encode_special_tokens = False
            self.fast.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
            self.__init__(self.fast, self.bos_id, self.eos_id, self.pad_id, self.stop_ids, self.names)

    @classmethod
    def from_pretrained(cls, path):
        """Reads tokenizer.json, and those of SETTINGS that exist.

        BOS is put first as add_bos_token says; without it, tokenizer.json's post-processor decides (so does
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

        with reading(path / "tokenizer_config.json"):
            spell = lambda token: token["content"] if isinstance(token, dict) else token
            names = {key: spell(value) for key, value in settings.items()
                     if re.fullmatch("(bos|eos|pad|unk|sep|cls|mask)_token", key)}
            kinds = ("bos_token", "eos_token", "pad_token")
            bos, eos, pad = (names.get(kind) and fast.token_to_id(names[kind]) for kind in kinds)
            for kind, found in zip(kinds, (bos, eos)):  # EOS serves as pad token, and nothing looks at padding
                if names.get(kind) and found is None:
                    raise UserError(f"{path}: {kind} {names[kind]!r:.80} is not in the vocabulary of tokenizer.json")
            stop = settings.get("eos_token_id", [])
            stop = set(stop if isinstance(stop, list) else [stop])
            if wrong := [i for i in stop if fast.id_to_token(i) is None]:
                raise UserError(f"{path}: eos_token_id is {wrong[0]!r:.80}, expected the id of a token, up to {last}")
            eos = min(stop, default=None) if eos is None else eos
            if eos is None:
                raise UserError(f"{path}: none of {', '.join(SETTINGS)} names an EOS token")
            names["eos_token"] = fast.id_to_token(eos)
            begins = settings.get("add_bos_token", fast.encode("").ids[:1] == [bos]) and bos is not None
            first = [names["bos_token"]] if begins else []
            fast.post_processor = processors.TemplateProcessing(  # an EOS would end the text that is to be continued
                single=[*first, "$A"], special_tokens=[(token, bos) for token in first])
            return cls(fast, bos, eos, eos if pad is None else pad, stop | {eos}, names)

    def encode(self, text, start=True):
        """Token ids of a text without markup. start: with BOS in front, where the tokenizer puts it."""
        return self.fast.encode(text, add_special_tokens=start).ids

    def encode_segments(self, segments):
        """(ids, labels, tokens of the prompt) of segments with markup. Labels are -100 but for the tokens that reach
        into trained segments. The whole text is one call, so ids are those of transformers."""
        text, start = "", None
        for s in segments:
            start = len(text) if s.trained and start is None else start
            text += s.text if s.role else self.special.sub(lambda token: self.spelling[token[0]], s.text)
        if self.spaced and text[:1] != "\ue002":
            text, start = " " + text, start and start + 1
        found = self.private.encode(text, add_special_tokens=False)
        ids = [self.ids.get(i, i) for i in found.ids]
        prompt = len(ids) if start is None else next(
            (i for i, (_, end) in enumerate(found.offsets) if end > start), len(ids))
        prompt = max(1, prompt)  # nothing predicts the very first token
        return ids, [-100] * len(ids[:prompt]) + ids[prompt:], min(prompt, len(ids))

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
    cut: bool = False  # whether the answer's end is missing, so that it matches nothing


def encode(examples, tokenizer, names):
    """[Encoded] of examples with a template around them. names: of all tasks, in the order of their indices."""
    def encoded(e, segments, gold, choices=None):
        return Encoded(*tokenizer.encode_segments(segments), names.index(e.task), choices, gold, e.source)

    return [encoded(e, e.segments, e.gold, e.choices and [  # a choice without the token that ends it
        encoded(e, segments[:-1], text) for text, segments in e.choices.items()]) for e in examples]


def fit(encoded, longest):
    """Cuts examples in place to at most `longest` tokens; returns how many were longer. Tokens go from the front of the
    prompt, behind its first token, down to half of `longest`, then from the end."""
    long = 0
    for e in encoded:
        over = max(len(one.ids) for one in (e, *(e.choices or ()))) - longest
        if over > 0:
            long, front = long + 1, min(over, max(0, e.prompt - longest // 2))
            for one in (e, *(e.choices or ())):
                one.ids, one.labels = one.ids[:1] + one.ids[1 + front :], one.labels[:1] + one.labels[1 + front :]
                e.cut |= len(one.ids) > longest
                one.ids, one.labels, one.prompt = one.ids[:longest], one.labels[:longest], one.prompt - front
    return long


def encode_suite(suite, tokenizer, longest):
    """The Suite with its examples as tokens, none longer than `longest`; says how many were cut."""
    def tokens(examples, what, generates=False):
        found = encode(examples, tokenizer, suite.names)
        for e in found if generates else ():  # only the prompt has to fit
            e.ids, e.labels = e.ids[: e.prompt], e.labels[: e.prompt]
        if long := fit(found, longest):
            print(f"{what}: {long:,} of {len(examples):,} examples are longer than {longest} tokens: cut")
        return found

    return replace(suite, train=tokens(suite.train, "training"), validation=tokens(suite.validation, "validation"),
                   tests={task: tokens(examples, task, suite.score[task].generates)
                          for task, examples in suite.tests.items()})


# ---------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T) int64, padded on the right
    labels: torch.Tensor  # (B, T) int64, -100 where there is no loss
    ctx: Context  # of the pass over this batch: its prompt mask (tokens before the first trained one) and tasks

    def to(self, device):
        ctx = Context(*(t.to(device) for t in (self.ctx.prompt_mask, self.ctx.tasks, self.ctx.labelled)))
        return Batch(self.ids.to(device), self.labels.to(device), ctx)


def draw(examples, size, seed):
    """Endless groups of `size` examples: epoch after epoch in a new order, similar lengths together. Each bucket of
    lengths is 1.5 times as wide as the one before: tasks differ in length, and a group should mix them."""
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
    return Batch(ids, labels, Context(prompt_mask, torch.tensor([e.task for e in group]), labelled_positions(labels)))


def micro_batches(group, size, device):
    """A step's group cut into micro-batches, lists of at most `size` examples of similar lengths: shortest first, then
    cut wherever that saves more padding than a pass costs by itself."""
    cost = 64 if device.type == "cpu" else 1024  # in tokens of padding; our choice
    group = sorted(group, key=lambda e: len(e.ids))
    left, parts = [group[i : i + size] for i in range(0, len(group), size)], []
    while left:
        part = left.pop()
        saved = [i * (len(part[-1].ids) - len(part[i - 1].ids)) for i in range(1, len(part))]
        if max(saved, default=0) > cost:
            cut = 1 + saved.index(max(saved))
            left += part[:cut], part[cut:]
        else:
            parts.append(part)
    return parts


# ---------------------------------------------------------------------------------------------- scoring

@dataclass(frozen=True)
class Score:
    """How a task is scored; results.json keeps the name."""

    name: str
    unit: str  # "%" of the examples, which has an interval and counts in the group means; or anything else
    function: Callable  # (model, [Encoded], tokenizer, batch size, longest answer) -> {figure: value}, the main first
    generates: bool = False  # whether the function lets the model write an answer


@torch.no_grad()
def answer_scores(model, examples, pad, batch_size):
    """For each encoded example (sum of log-probabilities, their number, whether each was the arg-max) of its labels.
    Raises UserError where one is NaN or infinite."""
    def scores(part):
        batch = collate(part, pad).to(model.device)
        logits, targets = model.labelled_logits(batch.ids, batch.labels, batch.ctx)
        return row_scores(logits, targets, batch.ctx.labelled.cpu() // batch.ids.shape[1], part)

    return in_batches(scores, examples, batch_size, lambda e: len(e.ids), "scoring, batch")


def row_scores(logits, targets, rows, part):
    """What answer_scores gives, from the logits (N, V) of the tokens (N,) of a batch, and each token's row in it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    columns = (-F.cross_entropy(logits, targets, reduction="none"), torch.ones_like(targets),
               (logits.argmax(-1) != targets).long())
    chances, counts, wrong = (torch.zeros(len(part), dtype=c.dtype).index_add_(0, rows, c.cpu()).tolist()
                              for c in columns)
    for e, chance in zip(part, chances):
        if not math.isfinite(chance):
            raise UserError(f"an answer's log-probability is {chance} (example {e.source[-24:]}): the model's "
                            "numbers overflow; try --dtype float32, or a lower --lr")
    return [(chance, number, misses == 0) for chance, number, misses in zip(chances, counts, wrong)]


def choice_scores(model, examples, batch_size):
    """For each encoded example the log-probability of each of its choices. Choices share their question, so the model
    reads it once."""
    def scores(part):
        choices = [c for e in part for c in e.choices]
        prompts = [(c.task, *c.ids[: c.prompt]) for c in choices]
        different = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = [c.ids[c.prompt :] for c in choices]
        logits = model.continuation_logits([prompt[1:] for prompt in different], texts, [different[p] for p in prompts],
                                           [prompt[0] for prompt in different])
        targets = torch.tensor([i for text in texts for i in text], device=model.device)
        rows = torch.tensor([row for row, text in enumerate(texts) for _ in text])
        found = iter(row_scores(logits, targets, rows, choices))
        return [[next(found)[0] for _ in e.choices] for e in part]

    size = max(1, batch_size // max((len(e.choices) for e in examples), default=1))
    return in_batches(scores, examples, size, lambda e: max(len(c.ids) for c in e.choices), "scoring, batch")


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
    return {"exact match": percent([hit and not e.cut for (*_, hit), e in zip(scores, examples)])}


def likeliest_choice(model, examples, tokenizer, batch_size, new_tokens):
    """Is the right choice the likeliest? By its log-probability, and by that for each byte of its text, since a long
    choice has a small probability whatever it says."""
    raw, by_byte = [], []
    for e, sums in zip(examples, choice_scores(model, examples, batch_size)):
        rates = [s / len(c.gold.strip().encode()) for s, c in zip(sums, e.choices)]
        for values, hits in ((sums, raw), (rates, by_byte)):
            hits.append(not e.cut and e.choices[values.index(max(values))].gold == e.gold)
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
