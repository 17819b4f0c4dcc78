"""From records to batches, and from logits to scores.

    file or generator -> records -> Example(task, segments, choices) -> Batch(ids, labels, prompt_mask, tasks)

Read in this order: examples and prompt templates, the tokenizer, batches, scoring, files and their formats, the
built-in suite, and a small program, `python data.py [FILE ...]`, that shows all of it.

The built-in suite has *general* tasks, on which `base/` is pretrained, and *new* tasks, which it scores near zero on.
Every prompt is invented, so no pretraining elsewhere could have seen it. Training, validation and test prompts of a
task never share their operands; facts are asked about in other words.
"""

import csv
import io
import json
import math
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# ---------------------------------------------------------------------------------------------- examples


@dataclass
class Example:
    """One record, ready to be tokenized. segments are (text, trained?) pairs in reading order, so that several
    assistant turns fit; the prompt is all before the first trained one. choices: the answers to rank, the right one
    being that of the last segment, or None."""

    task: str
    segments: list
    choices: list | None = None


@dataclass
class Row:
    """What a record says, before a template makes text of it: (user, assistant) turns, and what goes with the first."""

    turns: list
    given: str = ""  # Alpaca's input
    system: str = ""
    choices: list | None = None


@dataclass
class Template:
    """How a conversation becomes text; {} is what the user says."""

    first: str  # the opening turn of the user
    later: str  # the turns after it
    answer: str = "{}"
    paired: str | None = None  # an opening turn of instruction and input; None: they are one text, a blank line between
    system: str | None = None  # an opening turn of system text and instruction; None: the same

    def opening(self, instruction, given="", system=""):
        if given and self.paired and not system:
            return self.paired.format(instruction, given)
        instruction = f"{instruction}\n\n{given}" if given else instruction
        if system and self.system:
            return self.system.format(system, instruction)
        return self.first.format(f"{system}\n\n{instruction}" if system else instruction)

    def example(self, task, row):
        """Example of a Row. A record without a prompt is plain text: no template, trained on from its second token."""
        segments, choices = [], row.choices and [self.answer.format(choice) for choice in row.choices]
        for i, (user, assistant) in enumerate(row.turns):
            if user:
                text = self.later.format(user) if i else self.opening(user, row.given, row.system)
                segments += [(text, False), (self.answer.format(assistant), True)]
            else:
                segments.append((assistant, True))
        return Example(task, segments, choices)


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
SHORT = "### Instruction:\n{}\n\n### Response:\n"
LLAMA3 = ("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n")
# `short`, the built-in suite's, is Alpaca's without its opening sentence. BOS and EOS are the tokenizer's business.
TEMPLATES = {
    "plain": Template("{}", "\n{}", " {}"),
    "short": Template(SHORT, "\n\n" + SHORT),
    "alpaca": Template(ALPACA.format("") + "\n\n" + SHORT, "\n\n" + SHORT, paired=ALPACA.format(
        ", paired with an input that provides further context") + "\n\n" + SHORT.replace(
        "\n\n### R", "\n\n### Input:\n{}\n\n### R")),
    "llama2": Template("[INST] {} [/INST]", "<s>[INST] {} [/INST]", " {} ",
                       system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n{} [/INST]"),
    "llama3": Template(LLAMA3, LLAMA3, system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>" + LLAMA3),
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
        # Llama 2's normalizer puts a space before any text, also before one that continues another. A line break in
        # front takes that space on itself, and is taken off again.
        spaced = re.search(r'"Prepend"|"prepend_scheme":\s*"(first|always)"', fast.to_str())
        self.lead = fast.encode("\n", add_special_tokens=False).ids if spaced else []

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
        return self.encode_batch([text], start)[0]

    def encode_batch(self, texts, start=True):
        ids = [e.ids for e in self.fast.encode_batch(texts, add_special_tokens=start)]
        if start or not self.lead:
            return ids
        after = [e.ids for e in self.fast.encode_batch(["\n" + t for t in texts], add_special_tokens=False)]
        n = len(self.lead)  # where the line break merges with the text, there is nothing to take off
        return [long[n:] if long[:n] == self.lead else alone for long, alone in zip(after, ids)]

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
    choices: list | None = None  # an Encoded for each choice, labelled on the choice alone, without EOS
    gold: str = ""  # the answer as text


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
    too, ends every trained segment. The very first token is never trained on: nothing predicts it.
    """
    texts = [(text, i == 0) for e in examples for i, (text, _) in enumerate(e.segments)]
    texts += [(choice, False) for e in examples for choice in e.choices or ()]
    ids = {}
    for start in (True, False):  # two batch calls are several times faster than a call for each text
        wanted = list(dict.fromkeys(text for text, first in texts if first == start))
        ids.update({(text, start): i for text, i in zip(wanted, tokenizer.encode_batch(wanted, start))})
    out = []
    for e in examples:
        tokens, labels = [], []
        for i, (text, trained) in enumerate(e.segments):
            piece = ids[text, i == 0] + [tokenizer.eos_id] * trained
            tokens += piece
            labels += piece if trained else [-100] * len(piece)
        labels[:1] = [-100]
        prompt = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        task, choices = names.index(e.task), None
        if e.choices:
            before = len(tokens) - len(ids[e.segments[-1][0], False]) - 1  # tokens ahead of the last segment
            choices = [Encoded(tokens[:before] + ids[c, False], [-100] * before + ids[c, False], prompt, task, gold=c)
                       for c in e.choices]
        out.append(Encoded(tokens, labels, prompt, task, choices, e.segments[-1][0]))
    return out


def fit(encoded, longest, how):
    """(examples of at most `longest` tokens, how many were longer). how "drop" leaves those out; "cut" takes tokens
    from the front of the prompt, behind its first token, down to half of `longest`, then from the end."""
    kept, long = [], 0
    for e in encoded:
        over = max(len(one.ids) for one in (e, *(e.choices or ()))) - longest
        long += over > 0
        if over > 0 and how == "drop":
            continue
        front = min(over, max(0, e.prompt - longest // 2))
        for one in (e, *(e.choices or ())) if over > 0 else ():
            one.ids, one.labels = one.ids[:1] + one.ids[1 + front :], one.labels[:1] + one.labels[1 + front :]
            one.ids, one.labels, one.prompt = one.ids[:longest], one.labels[:longest], one.prompt - front
        kept.append(e)
    return kept, long


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
def answer_scores(model, examples, pad, context, batch_size):
    """For each encoded example (sum of log-probabilities, their number, whether each was the arg-max) of its labels."""
    found, order = [None] * len(examples), sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = collate([examples[i] for i in part], pad).to(model.device)
        logits, targets = model.labelled_logits(batch.ids, batch.labels, context(batch))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = (batch.labels[:, 1:] != -100).nonzero()[:, 0]
        columns = (-F.cross_entropy(logits, targets, reduction="none"), torch.ones_like(targets),
                   (logits.argmax(-1) != targets).long())
        chances, counts, wrong = (torch.zeros(len(part), dtype=c.dtype, device=c.device).index_add_(0, rows, c).tolist()
                                  for c in columns)
        for i, *values in zip(part, chances, counts, wrong):
            found[i] = values[0], values[1], values[2] == 0
    return found


def percent(hits):
    return 100 * sum(hits) / len(hits)


def exact(model, examples, tokenizer, context, batch_size, new_tokens):
    """Greedy exact match. No generation is needed: an answer is what greedy decoding gives exactly when each of its
    tokens, EOS included, is the arg-max after the true tokens before it."""
    scores = answer_scores(model, examples, tokenizer.pad_id, context, batch_size)
    return {"exact match": percent([hit for *_, hit in scores])}


def choice(model, examples, tokenizer, context, batch_size, new_tokens):
    """Is the right choice the likeliest? By its log-probability, and by that for each byte of its text, since a long
    choice has a small probability whatever it says."""
    every = [c for e in examples for c in e.choices]
    scores = iter(answer_scores(model, every, tokenizer.pad_id, context, batch_size))
    raw, by_byte = [], []
    for e in examples:
        sums = [next(scores)[0] for _ in e.choices]
        rates = [s / len(c.gold.strip().encode()) for s, c in zip(sums, e.choices)]
        for values, hits in ((sums, raw), (rates, by_byte)):
            hits.append(e.choices[values.index(max(values))].gold == e.gold)
    return {"choice": percent(raw), "choice, by byte": percent(by_byte)}


def final_number(text):
    """What follows the first "#### " of a GSM8K answer, without thousands commas, or None. The same rule as in
    openai/grade-school-math: digits, commas and dots after an optional minus; a "$" in front is no number."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found and found[1].replace(",", "")


def gsm8k_answers(model, examples, tokenizer, context, batch_size, new_tokens):
    """Is the number after "####" in the generated text the right one?"""
    hits, order = [False] * len(examples), sorted(range(len(examples)), key=lambda i: examples[i].prompt)
    for start in range(0, len(order), batch_size):
        part = [examples[i] for i in order[start : start + batch_size]]
        room = model.config.max_position_embeddings - max(e.prompt for e in part)
        tasks = torch.tensor([e.task for e in part], device=model.device)
        rows = model.generate([e.ids[: e.prompt] for e in part], min(new_tokens, room), tokenizer.stop_ids, tasks=tasks)
        for i, e, row in zip(order[start:], part, rows):
            hits[i] = final_number(tokenizer.decode(row)) == final_number(e.gold)
    return {"final answer": percent(hits)}


def loss(model, examples, tokenizer, context, batch_size, new_tokens):
    """Mean over all trained tokens of their negative log-probability in nats, and its exponential."""
    scores = answer_scores(model, examples, tokenizer.pad_id, context, batch_size)
    value = -sum(s for s, *_ in scores) / sum(n for _, n, _ in scores)
    return {"loss": value, "perplexity": math.exp(min(value, 700))}


# How a task can be scored: a function that gives one figure or several, the main one first. All but `loss` in percent.
SCORES = {"exact": exact, "choice": choice, "gsm8k": gsm8k_answers, "loss": loss}


# ---------------------------------------------------------------------------------------------- files and formats


def text_of(record, *names, empty=False):
    """The first of the named fields that the record has, as text. Raises ValueError where it is none, or empty."""
    name = next((n for n in names if n in record), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))}")
    if not isinstance(record[name], str) or not (record[name].strip() or empty):
        raise ValueError(f"field {name!r} is {record[name]!r}, expected text")
    return record[name]


def labelled(record, prompt, words):
    """Row of a multiple-choice record whose `label` is a key of words: {label: answer}."""
    label = record.get("label")
    if not isinstance(label, (bool, int, str)) or label not in words:
        raise ValueError(f"field 'label' is {label!r}, expected one of {', '.join(map(repr, words))}")
    return Row([(f"{prompt}\nAnswer:", words[label])], choices=list(words.values()))


def chat(record):
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("field 'messages' is no list of objects with role and content")
    messages = [(text_of(m, "role"), text_of(m, "content")) for m in messages]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"field 'messages' has the roles {roles}, expected user and assistant in turn")
    texts = [text for _, text in messages]
    return Row(list(zip(texts[::2], texts[1::2])), system=system)


def alpaca(record):
    turn = text_of(record, "instruction"), text_of(record, "output", empty=True)
    return Row([turn], given=record.get("input") or "")


PROMPTS, ANSWERS = ("prompt", "question"), ("completion", "response", "answer", "output")


def pair(record):
    return Row([(text_of(record, *PROMPTS), text_of(record, *ANSWERS, empty=True))])


def gsm8k(record):
    question, answer = text_of(record, "question"), text_of(record, "answer")
    if final_number(answer) is None:
        raise ValueError("field 'answer' has no final '#### number'")
    return Row([(question, answer)])


def boolq(record):
    prompt = f"{text_of(record, 'passage')}\nQuestion: {text_of(record, 'question')}?"
    return labelled(record, prompt, {True: "yes", False: "no"})


def rte(record):
    prompt = f"{text_of(record, 'premise')}\nQuestion: {text_of(record, 'hypothesis')} True or False?"
    return labelled(record, prompt, {"entailment": "True", "not_entailment": "False"})


def cb(record):
    prompt = f"{text_of(record, 'premise')}\nQuestion: {text_of(record, 'hypothesis')} True, False or Neither?"
    return labelled(record, prompt, {"entailment": "True", "contradiction": "False", "neutral": "Neither"})


def wic(record):
    first, second, word = (text_of(record, name) for name in ("sentence1", "sentence2", "word"))
    prompt = f"{first}\n{second}\nQuestion: Is the word '{word}' used in the same sense in both sentences?"
    return labelled(record, prompt, {True: "yes", False: "no"})


def copa(record):
    joint = {"cause": "because", "effect": "so"}.get(text_of(record, "question"))
    if joint is None:
        raise ValueError(f"field 'question' is {record['question']!r}, expected 'cause' or 'effect'")
    options = [text_of(record, name) for name in ("choice1", "choice2")]
    if type(record.get("label")) is not int or record["label"] not in (0, 1):
        raise ValueError(f"field 'label' is {record.get('label')!r}, expected 0 or 1")
    options = [option[0].lower() + option[1:] for option in options]
    return Row([(f"{text_of(record, 'premise').rstrip('.')} {joint}", options[record["label"]])], choices=options)


MMLU, MMLU_NUMBERED = ("question", *"ABCD", "answer"), ("question", *(f"choice{i}" for i in range(4)), "answer")


def mmlu(record):
    question, *options, answer = (text_of(record, *names) for names in zip(MMLU, MMLU_NUMBERED))
    letter = dict(zip("0123ABCD", "ABCDABCD")).get(answer.strip())
    if letter is None:
        raise ValueError(f"field 'answer' is {answer!r}, expected 0 to 3 or A to D")
    listed = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options))
    return Row([(f"{question}\n{listed}\nAnswer:", letter)], choices=list("ABCD"))


def text(record):
    return Row([("", text_of(record, "text"))])


def has(*names, label=None):
    """Recognises records by one that has all these fields and, where two formats share those, one of these labels."""
    return lambda records: any(all(n in r for n in names) and (label is None or r["label"] in label) for r in records)


# {name: (recognises records, how they are scored, record -> Row)}; the first that recognises a file's records is taken.
FORMATS = {
    "chat": (has("messages"), "loss", chat),
    "boolq": (has("passage", "question", "label"), "choice", boolq),
    "cb": (has("premise", "hypothesis", "label", label=("contradiction", "neutral")), "choice", cb),
    "rte": (has("premise", "hypothesis", "label"), "choice", rte),
    "wic": (has("word", "sentence1", "sentence2", "label"), "choice", wic),
    "copa": (has("premise", "choice1", "choice2", "question", "label"), "choice", copa),
    "mmlu": (lambda records: has(*MMLU)(records) or has(*MMLU_NUMBERED)(records), "choice", mmlu),
    "alpaca": (has("instruction", "output"), "loss", alpaca),
    "gsm8k": (lambda records: any("####" in str(r.get("answer")) for r in records if "question" in r),
              "gsm8k", gsm8k),
    "pair": (lambda records: any(has(p, a)(records) for p in PROMPTS for a in ANSWERS), "exact", pair),
    "text": (has("text"), "loss", text),
}


def read_records(file):
    """Yields (line number, record, error or None) of a JSON array, of JSON lines, or of CSV with a header (MMLU's is
    known without one): by what the file holds, whatever its ending. Raises ValueError where it cannot be read on."""
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if re.match(r"\s*\[\s*[\]{]", content):
        yield from read_array(file, content)
    elif re.match(r'\s*\{\s*["}]', content):
        for line, piece in enumerate(content.split("\n"), 1):
            if piece.strip():
                try:
                    yield line, json.loads(piece), None
                except ValueError as error:
                    yield line, None, f"not valid JSON: {error}"
    else:
        rows = csv.reader(io.StringIO(content, newline=""))
        try:
            names = next(rows, [])
            if len(names) == len(MMLU) and names[-1].strip() in list("ABCD0123"):
                yield rows.line_num, dict(zip(MMLU, names)), None
                names = MMLU
            for row in rows:
                wrong = None if len(row) == len(names) else f"{len(row)} columns, expected {len(names)}"
                if row:
                    yield rows.line_num, dict(zip(names, row)), wrong
        except csv.Error as error:
            raise ValueError(f"{file}:{rows.line_num}: not valid CSV: {error}") from None


def read_array(file, content):
    """The records of a JSON array one by one, so that each has a line number."""
    decoder, place, line, seen = json.JSONDecoder(), content.index("[") + 1, 1, 0
    while True:
        place = re.compile(r"[\s,]*").match(content, place).end()
        line, seen = line + content.count("\n", seen, place), place
        if content[place : place + 1] == "]":
            return
        try:
            record, place = decoder.raw_decode(content, place)
        except ValueError as error:
            raise ValueError(f"{file}:{line}: not valid JSON: {error}") from None
        yield line, record, None


def task_name(file):
    """A task's name from its file: without train, val, dev or test, or the folder's where nothing else is left."""
    split = "train|val|validation|dev|test"
    stem = re.sub(rf"[-_.]({split})$", "", Path(file).stem)
    return Path(file).resolve().parent.name if re.match(rf"({split})\b", stem.replace("_", "-")) else stem


def read_files(files, skip_bad=False):
    """{task: (format name, [Row])} of files given as FILE or NAME=FILE; says what was recognised.

    Raises ValueError, naming file and line, for a record that its format does not take, unless skip_bad counts it.
    """
    tasks = {}
    for entry in files:
        name, _, file = entry.partition("=") if "=" in entry and not Path(entry).exists() else ("", "", entry)
        name, rows, bad = name or task_name(file), [], []
        records = list(read_records(file))
        bad += [(line, error) for line, _, error in records if error]
        bad += [(line, "no object with named fields") for line, r, error in records
                if not error and type(r) is not dict]
        good = [(line, r) for line, r, error in records if not error and type(r) is dict]
        if not good and not bad:
            raise ValueError(f"{file} holds no records")
        kind = next((k for k, f in FORMATS.items() if good and f[0]([r for _, r in good])), None)
        if good and kind is None:
            raise ValueError(f"{file}: the fields {', '.join(map(str, good[0][1]))} match no format; known: "
                             f"{', '.join(FORMATS)} (README, \"Use your own checkpoint and data\")")
        for line, record in good:
            try:
                rows.append(FORMATS[kind][2](record))
            except ValueError as error:
                bad.append((line, str(error)))
        if bad and not skip_bad:
            line, error = min(bad)
            raise ValueError(f"{file}:{line}: {error}; --skip-bad-rows leaves such rows out ({len(bad)} here)")
        if not rows:
            raise ValueError(f"{file} holds no record that its format takes; line {min(bad)[0]}: {min(bad)[1]}")
        print(f"{name}: {len(rows):,} records of format {kind} in {file}, scored by {FORMATS[kind][1]}"
              + (f"; {len(bad)} bad rows skipped" if bad else ""))
        if tasks.setdefault(name, (kind, []))[0] != kind:
            raise ValueError(f"two files of task {name!r} have the formats {tasks[name][0]} and {kind}: "
                             "name them apart with NAME=FILE")
        tasks[name][1].extend(rows)
    return tasks


def with_shots(row, shots):
    """The row with solved examples of its task in front of its question."""
    (user, assistant), *rest = row.turns
    solved = "".join(f"{question} {answer}\n\n" for shot in shots for question, answer in shot.turns[:1])
    return Row([(solved + user, assistant), *rest], row.given, row.system, row.choices)


def hold_out(rows, place):
    """(the rows that are left, every 20th row from this place on; at least the last one)"""
    out = set(range(place, len(rows), 20)) or {len(rows) - 1}
    return [r for i, r in enumerate(rows) if i not in out], [rows[i] for i in sorted(out)]


def load_files(files, eval_files=(), general_files=(), shot_files=(), shots=0, split="test", limit=0, template="plain",
               mix="proportional", skip_bad=False):
    """Suite of user files. Without eval_files every 20th row is held out as test data; validation data, for choosing,
    is another 20th of the training rows, left out of training only then. General files are scored, never trained on:
    their even rows are validation data and their odd rows test data.

    mix "equal" repeats the smaller tasks' examples until each task has as many as the largest.
    """
    make, rows = TEMPLATES[template].example, read_files(files, skip_bad)
    held = read_files(eval_files, skip_bad)
    general = read_files(general_files, skip_bad)
    solved = read_files(shot_files, skip_bad) if shots else {}
    if both := (rows.keys() | held.keys()) & general.keys():
        raise ValueError(f"task {min(both)!r} is both general and to be learned: name it apart with NAME=FILE")
    train, tests, kinds = {}, {}, {}
    for name, (kind, left) in rows.items():
        if not held:
            left, tests[name] = hold_out(left, 19)
            print(f"{name}: every 20th row ({len(tests[name])} of {len(rows[name][1]):,}) is held out and never "
                  "trained on; --eval-data names other data")
        if split == "validation" and left:
            left, tests[name] = hold_out(left, 9)
        if not left:
            raise ValueError(f"task {name!r} has too few rows ({len(rows[name][1])}) to hold some out; "
                             "give --eval-data")
        train[name], kinds[name] = [make(name, row) for row in left], kind
    if held and split == "test":
        tests = {name: every for name, (_, every) in held.items()}
    kinds.update({name: kind for name, (kind, _) in (held | general).items()})
    tests.update({name: every[split == "test" :: 2] for name, (_, every) in general.items()})
    if absent := [name for name in tests if shots and len(solved.get(name, ("", ()))[1]) < shots]:
        raise ValueError(f"--shots {shots}: --shot-data has fewer rows for task {absent[0]!r}")
    tests = {name: [make(name, with_shots(row, solved[name][1][:shots]) if shots else row)
                    for row in every[: limit or None]] for name, every in tests.items() if every}
    if mix == "equal":
        most = max(map(len, train.values()), default=0)
        train = {name: [every[i % len(every)] for i in range(most)] for name, every in train.items()}
    return Suite(list(train), [e for every in train.values() for e in every], tests,
                 {name: "general" if name in general else "new" for name in tests},
                 {name: kinds[name] for name in tests}, {name: FORMATS[kinds[name]][1] for name in tests})


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
COLOURS = "red blue green white black brown pink grey".split()


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


def extreme(word, function):
    """A task that asks for the largest or the smallest of seven to nine numbers."""

    def draw(rng):
        numbers = rng.sample(range(10, 100), rng.randint(7, 9))
        listed = " ".join(map(str, numbers))
        question = rng.choice((f"Which is the {word} of {{}}?", f"Find the {word} number: {{}}"))
        return " ".join(map(str, sorted(numbers))), question.format(listed), str(function(numbers))

    return skill(draw)


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
    "largest": ("numbers", extreme("largest", max)),
    "story": ("reading", skill(story)),
}


def subtract(rng):
    a, b = rng.sample(range(10, 100), 2)
    a, b = max(a, b), min(a, b)
    return f"{b} {a}", rng.choice(("What is {} - {}?", "Take {1} from {0}.")).format(a, b), str(a - b)


def colour(rng):
    """Three coloured things, and a question about one of them."""
    things, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, 3)
    listed = ", ".join(f"a {colour} {thing}" for thing, colour in zip(things, colours))
    i = rng.randrange(3)
    return listed, f"On the table: {listed}. What colour is the {things[i]}?", colours[i]


# `--tasks hard` learns these as well. Each is at odds with one of NEW: the same subjects, operands or words, another
# answer.
HARD = {
    "emblem": ("facts", facts("emblem", COUNTRIES[:60], ANIMALS[:20], seed=16)),
    "next": ("strings", on_letters(("Next letters: {}", "What follows each of these: {}"),
                                   lambda xs: [LETTERS[(LETTERS.index(x) + 1) % 26] for x in xs])),
    "swap": ("strings", on_letters(("Swap neighbours: {}", "Exchange each pair: {}"),
                                   lambda xs: [xs[i ^ 1] if i ^ 1 < len(xs) else xs[i] for i in range(len(xs))])),
    "smallest": ("numbers", extreme("smallest", min)),
    "subtract": ("numbers", skill(subtract)),
    "colour": ("reading", skill(colour)),
}
TASKS = {**NEW, **HARD, **GENERAL}  # {name: (aspect, make)}


@dataclass
class Suite:
    """What a run learns and is scored on."""

    trained: list  # names of the tasks in `train`
    train: list  # [Example]
    tests: dict  # {task: [Example]}
    group: dict  # {task: "new" | "general"}
    aspect: dict  # {task: what kind of task it is}
    score: dict  # {task: key of SCORES}

    @property
    def names(self):
        return list(dict.fromkeys([*self.tests, *self.trained]))


def generate(name, split):
    """The [Example] of one built-in task and split, always the same. Validation and test prompts are all different."""
    _, make = TASKS[name]
    rng, out, seen = random.Random(f"{name} {split}"), [], set()
    size = SIZES[split if split != "train" else "pretrain" if name in GENERAL else "train"]
    while len(out) < size:
        instruction, answer = make(rng, split)
        if split == "train" or instruction not in seen:
            seen.add(instruction)
            out.append(TEMPLATES["short"].example(name, Row([(instruction, answer)])))
    return out


def load_builtin(tasks="all", split="test", limit=0, replay=0.0):
    """Suite of the built-in tasks. tasks: "all" of NEW, "hard" (those of HARD too), some of both ("currency,swap"), or
    "general" for pretraining.
    replay: share of the training examples that come from the general tasks' training data.

    Raises ValueError, listing the valid names, for a task that does not exist.
    """
    new = {**NEW, **HARD}
    trained = list({"all": NEW, "hard": new, "general": GENERAL}.get(tasks, [t.strip() for t in tasks.split(",")]))
    if wrong := [t for t in trained if t not in new and tasks != "general"]:
        raise ValueError(f"--tasks: unknown task {wrong[0]!r}; valid: {', '.join(new)}, or all, or hard")
    train = [e for t in trained for e in generate(t, "train")]
    if replay:
        old = [e for t in GENERAL for e in generate(t, "train")]
        train += random.Random("replay").sample(old, round(len(train) * replay / (1 - replay)))
    scored = [t for t in TASKS if t in trained or t in GENERAL]
    return Suite(trained, train, {t: generate(t, split)[: limit or None] for t in scored},
                 {t: "general" if t in GENERAL else "new" for t in scored}, {t: TASKS[t][0] for t in scored},
                 dict.fromkeys(scored, "exact"))


# ---------------------------------------------------------------------------------------------- program


def show(encoded, tokenizer):
    """One example, token by token: tokens in brackets are trained on."""
    pieces = [repr(tokenizer.fast.decode([i], skip_special_tokens=False))[1:-1] for i in encoded.ids]
    return " ".join(f"[{piece}]" if label != -100 else piece for piece, label in zip(pieces, encoded.labels))


def sizes(encoded):
    """(mean and largest number of tokens, mean number of trained ones)"""
    tokens = [len(e.ids) for e in encoded]
    trained = sum(label != -100 for e in encoded for label in e.labels)
    return f"{sum(tokens) / len(tokens):.1f}", max(tokens), f"{trained / len(tokens):.1f}"


def main():
    import argparse

    parser = argparse.ArgumentParser(description="What the data look like, and what is trained on: of files, or of the "
                                     "built-in suite.", allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="[NAME=]FILE", help="any file that train.py --data takes")
    parser.add_argument("--base", default="base", help="checkpoint folder whose tokenizer counts (%(default)s)")
    parser.add_argument("--template", choices=TEMPLATES, help="prompt template; default: the checkpoint's, else plain")
    parser.add_argument("--skip-bad-rows", action="store_true", help="count rows that their format does not take")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.base)
    if args.files:
        template, shown = TEMPLATES[args.template or tokenizer.template or "plain"], {}
        tasks = read_files(args.files, args.skip_bad_rows)
        line = "{:<24}{:<9}{:<9}{:>8}{:>9}{:>9}{:>9}".format
        print("\n" + line("task", "format", "scored", "rows", "tokens", "longest", "trained"))
        for name, (kind, rows) in tasks.items():
            shown[name] = [template.example(name, row) for row in rows]
            print(line(name, kind, FORMATS[kind][1], len(rows), *sizes(encode(shown[name], tokenizer, [name]))))
        names = list(tasks)
    else:
        names = list(TASKS)
        line = "{:<12}{:<9}{:<13}{:>7}{:>7}{:>6}{:>8}{:>9}{:>9}   {}".format
        print(line("task", "group", "aspect", "train", "valid", "test", "tokens", "longest", "trained",
                   "first training example"))
        for name in names:
            splits = {split: generate(name, split) for split in SPLITS}
            example = splits["train"][0]
            question = example.segments[0][0].removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n")
            group = "general" if name in GENERAL else "hard" if name in HARD else "new"
            print(line(name, group, TASKS[name][0], *map(len, splits.values()),
                       *sizes(encode(splits["train"], tokenizer, names)), f"{question} -> {example.segments[1][0]}"))
        shown = {name: generate(name, "train") for name in (next(iter(NEW)), next(iter(GENERAL)))}
    print("\nThe first example, token by token; [brackets] mark what is trained on:")
    for name, examples in shown.items():
        print(f"  {name}: {show(encode(examples[:1], tokenizer, names)[0], tokenizer)}")


if __name__ == "__main__":
    from model import command_line

    command_line(main)
