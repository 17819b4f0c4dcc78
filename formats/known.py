"""What each kind of record means, and how it is scored.

A reader takes one record and gives an Example of bare segments, without a template's markup, or several; it raises
UserError where the record is not of its kind. The table at the end says how a kind is recognised, read and scored.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from data import Example, Segment, choice, exact, in_batches, loss, percent
from model import UserError

# ---------------------------------------------------------------------------------------------- parts of records


class Record(dict):
    """A record that remembers which of its fields were read; those of an object inside as `messages.role`."""

    def __init__(self, fields, path="", used=None):
        super().__init__(fields)
        self.path, self.used = path, set() if used is None else used

    def get(self, name, default=None):
        self.used.add(self.path + name)
        return self.inside(super().get(name, default), f"{self.path}{name}.")

    def inside(self, value, path):
        if isinstance(value, list):
            return [self.inside(part, path) for part in value]
        return Record(value, path, self.used) if isinstance(value, dict) else value


def names_in(value, path="", used=()):
    """[(name, whether it holds anything)] of the fields of a record, and of those inside the `used` ones."""
    found = []
    for name, part in value.items():
        found.append((path + name, part not in (None, "", [], {})))
        for inner in (part if isinstance(part, list) else [part]) if path + name in used else ():
            if isinstance(inner, dict):
                found += names_in(inner, f"{path}{name}.", used)
    return found


def checked(value, name, empty=False):
    """The value of a field, which must be text. Raises UserError where it is none, or empty."""
    if not isinstance(value, str) or not (value.strip() or empty):
        raise UserError(f"field {name!r} is {value!r:.80}, expected text")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"field {name!r} holds half of a surrogate pair, which is no text")
    return value


def text_of(record, *names, empty=False):
    """The first of the named fields that the record has, as text. Raises UserError where it is none, or empty."""
    name = next((n for n in names if n in record), None)
    if name is None:
        raise UserError(f"no field {' or '.join(map(repr, names))}")
    return checked(record.get(name), name, empty)


def maybe(record, *names):
    """The same, and "" where the record has none of the fields, or null."""
    name = next((n for n in names if record.get(n) is not None), None)
    return checked(record.get(name), name, empty=True) if name else ""


def example(*turns, system="", given="", earlier=(), choices=None, gold=None):
    """Example of (user, assistant) turns. given: what goes with the first one, Alpaca's input. earlier: turns ahead of
    it."""
    segments = [Segment(system, "system")] if system else []
    for i, (user, assistant) in enumerate([*earlier, *turns]):
        said = Segment(user, "user"), Segment(given if i == len(earlier) else "", "input")
        segments += [s for s in said if s.text] + [Segment(assistant, "assistant", trained=True)]
    return Example("", segments, choices, gold=gold)


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def conversation(messages, name, system=""):
    """Example of a list of messages, the last of which is the assistant's."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"field {name!r} is no list of objects with role and content, or from and value")
    said = [(text_of(m, "role", "from"), text_of(m, "content", "value")) for m in messages]
    roles = [ROLES.get(role, role) for role, _ in said]
    if roles[:1] == ["system"]:
        system, roles, said = said[0][1], roles[1:], said[1:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"field {name!r} has the roles {roles!r:.80}, expected user and assistant in turn")
    texts = [text for _, text in said]
    return example(*zip(texts[::2], texts[1::2]), system=system)


def around(record):
    """{system, earlier} of a record with one question: what was said before it."""
    earlier = record.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise UserError(f"field 'history' is {earlier!r:.80}, expected a list of [question, answer]")
    return {"system": maybe(record, *SYSTEM),
            "earlier": [(checked(user, "history"), checked(answer, "history", empty=True)) for user, answer in earlier]}


def labelled(record, prompt, words, name="label"):
    """Example of a multiple-choice record whose label is a key of words: {label: answer}."""
    label = record.get(name)
    if not isinstance(label, (bool, int, str)) or label not in words:
        raise UserError(f"field {name!r} is {label!r:.80}, expected one of {', '.join(map(repr, words))}")
    return example((f"{prompt}\nAnswer:", words[label]), choices=list(words.values()))


def quiz(question, options, right):
    """Example of a question, whose options stand under letters; the answer is a letter. right: the option's place."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))
    return example((f"{question}\n{listed}\nAnswer:", letters[right]), choices=list(letters))


# ---------------------------------------------------------------------------------------------- instructions and talk

SYSTEM = ("system", "system_prompt")
PROMPTS, ANSWERS = ("prompt", "question", "query", "input"), ("completion", "response", "answer", "output")
ORDERS, GIVEN, DONE = ("instruction",), ("input", "context"), ("output", "response")


def read_chat(record):
    return conversation(record.get("messages"), "messages", maybe(record, *SYSTEM))


def read_sharegpt(record):
    return conversation(record.get("conversations"), "conversations", maybe(record, *SYSTEM))


def read_alpaca(record):
    turn = text_of(record, *ORDERS), text_of(record, *DONE, empty=True)
    return example(turn, given=maybe(record, *GIVEN), **around(record))


def read_pair(record):
    asked = next((name for name in PROMPTS if name in record), "")
    turn = text_of(record, *PROMPTS), text_of(record, *ANSWERS, empty=True)
    return example(turn, given="" if asked == "input" else maybe(record, "input"), **around(record))


def read_dpo(record):
    """The chosen answer alone is learned. It is text, a message, or messages, which may hold the question too."""
    listed = lambda value: value if isinstance(value, list) else [value]
    message = lambda role, value: [{"role": role, "content": value}] if isinstance(value, str) else listed(value)
    chosen, names = message("assistant", record.get("chosen")), ("conversations", *ORDERS, *PROMPTS)
    asked = next((name for name in names if name in record), None)
    if asked and len(chosen) == 1:
        if isinstance(record.get("chosen"), str) and isinstance(record.get(asked), str):
            given = "" if asked == "input" else maybe(record, "input")
            turn = text_of(record, asked), text_of(record, "chosen", empty=True)
            return example(turn, given=given, **around(record))
        chosen = message("user", record.get(asked)) + chosen
    return conversation(chosen, "chosen", maybe(record, *SYSTEM))


def read_text(record):
    return example(("", text_of(record, "text")))


# ---------------------------------------------------------------------------------------------- generated answers


def generated(model, examples, tokenizer, batch_size, new_tokens):
    """What the model says to each prompt, as text. The room for an answer is the prompt's own, whatever else is in its
    batch; says how many answers filled it."""
    longest, texts, cut = model.config.max_position_embeddings, [""] * len(examples), 0
    rooms = [min(new_tokens, longest - e.prompt) for e in examples]
    for room, alike in groupby(sorted(range(len(examples)), key=lambda i: -rooms[i]), key=lambda i: rooms[i]):
        said = lambda part: model.generate([e.ids[: e.prompt] for e in part], room, tokenizer.stop_ids,
                                           tasks=[e.task for e in part])
        alike = list(alike) if room > 0 else []
        rows = in_batches(said, [examples[i] for i in alike], batch_size, lambda e: e.prompt, "answers, batch")
        for i, row in zip(alike, rows):
            texts[i], cut = tokenizer.decode(row), cut + (len(row) >= room)
    short = sum(room < new_tokens for room in rooms)
    if cut or short:
        print(f"{cut:,} of {len(texts):,} generated answers were cut at --max-new-tokens {new_tokens}"
              + f", or at less for {short:,} long prompts: the model has {longest} positions" * bool(short))
    return texts


def final_number(text):
    """What follows the first "#### " of a GSM8K answer, without thousands commas, or None. The same rule as in
    openai/grade-school-math: digits, commas and dots after an optional minus; a "$" in front is no number."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found and found[1].replace(",", "")


def read_gsm8k(record):
    question, answer = text_of(record, "question"), text_of(record, "answer")
    if final_number(answer) is None:
        raise UserError("field 'answer' has no final '#### number'")
    return example((question, answer))


def gsm8k(model, examples, tokenizer, batch_size, new_tokens):
    """Is the number after "####" in the generated text the right one?"""
    texts = generated(model, examples, tokenizer, batch_size, new_tokens)
    return {"final answer": percent([final_number(t) == final_number(e.gold) for t, e in zip(texts, examples)])}


# How LLM-Adapters' evaluation (commonsense_evaluate.py, evaluate.py) finds an answer of each kind: the first of these.
STATED = ("true|false", *("|".join(f"{word}{i}" for i in range(1, 6)) for word in
                          ("answer", "solution", "ending", "option")), "A|B|C|D|E")


def stated(text, gold):
    """Whether a text states the gold answer. As LLM-Adapters has it: the first word of the gold answer's kind, or the
    last number, within 0.001."""
    kind = next((words for words in STATED if gold in words.split("|")), None)
    if kind:
        return re.findall(kind, text)[:1] == [gold]
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return bool(numbers) and abs(float(numbers[-1]) - float(gold)) <= 0.001


def read_adapters(record):
    answer = record.get("answer")
    answer = str(answer) if type(answer) in (int, float) else checked(answer, "answer").strip()
    if not re.fullmatch("|".join(STATED), answer) and not re.fullmatch(r"-?\d+\.?\d*", answer):
        raise UserError(f"field 'answer' is {answer!r:.80}, expected a number, a letter from A to E, true, false, or "
                        "such as answer1")
    turn = text_of(record, "instruction"), text_of(record, "output", empty=True)
    return example(turn, given=maybe(record, "input"), gold=answer)


def adapters(model, examples, tokenizer, batch_size, new_tokens):
    """Does the generated text state the right answer?"""
    texts = generated(model, examples, tokenizer, batch_size, new_tokens)
    return {"stated answer": percent([stated(t, e.gold) for t, e in zip(texts, examples)])}


# ---------------------------------------------------------------------------------------------- multiple choice


def read_boolq(record):
    prompt = f"{text_of(record, 'passage')}\nQuestion: {text_of(record, 'question')}?"
    return labelled(record, prompt, {True: "yes", False: "no"}, "answer" if "answer" in record else "label")


def read_rte(record):
    prompt = f"{text_of(record, 'premise')}\nQuestion: {text_of(record, 'hypothesis')} True or False?"
    return labelled(record, prompt, {"entailment": "True", "not_entailment": "False"})


def read_cb(record):
    prompt = f"{text_of(record, 'premise')}\nQuestion: {text_of(record, 'hypothesis')} True, False or Neither?"
    return labelled(record, prompt, {"entailment": "True", "contradiction": "False", "neutral": "Neither"})


def read_wic(record):
    first, second, word = (text_of(record, name) for name in ("sentence1", "sentence2", "word"))
    prompt = f"{first}\n{second}\nQuestion: Is the word '{word}' used in the same sense in both sentences?"
    return labelled(record, prompt, {True: "yes", False: "no"})


def read_wsc(record):
    """Asterisks show which pronoun is meant. Its place in the published files is off by one at times."""
    target, words = record.get("target"), text_of(record, "text").split()
    if not isinstance(target, dict):
        raise UserError(f"field 'target' is {target!r:.80}, expected an object with span1_text and span2_text")
    name, pronoun, place = text_of(target, "span1_text"), text_of(target, "span2_text"), target.get("span2_index")
    near = [i for i in (place, place - 1, place + 1) if 0 <= i < len(words)
            and words[i].casefold().startswith(pronoun.split()[0].casefold())] if type(place) is int else []
    if not near:
        raise UserError(f"field 'span2_index' is {place!r:.80}, expected the place of {pronoun!r:.80} among the words")
    words[near[0]] = f"*{words[near[0]]}*"
    prompt = f"{' '.join(words)}\nQuestion: Does '*{pronoun}*' refer to '{name}'?"
    return labelled(record, prompt, {True: "yes", False: "no"})


def read_multirc(record):
    """One Example for each answer, of a nested record or of one that holds one answer."""
    whole = record.get("passage")
    if not isinstance(whole, dict):
        return multirc(text_of(record, "paragraph"), text_of(record, "question"), record, "answer")
    found, passage = [], text_of(whole, "text")
    for question in records_in(whole, "questions"):
        asked = text_of(question, "question")
        found += [multirc(passage, asked, answer, "text") for answer in records_in(question, "answers")]
    return found


def multirc(passage, question, answer, name):
    prompt = f"{passage}\nQuestion: {question}\nIs '{text_of(answer, name)}' a right answer?"
    return labelled(answer, prompt, {True: "yes", False: "no"})


def records_in(record, name):
    """The list of objects in a field."""
    value = record.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise UserError(f"field {name!r} is {value!r:.80}, expected a list of objects")
    return value


def read_copa(record):
    joint = {"cause": "because", "effect": "so"}.get(text_of(record, "question"))
    if joint is None:
        raise UserError(f"field 'question' is {record['question']!r:.80}, expected 'cause' or 'effect'")
    options = [text_of(record, name) for name in ("choice1", "choice2")]
    label = record.get("label")
    if type(label) is not int or label not in (0, 1):
        raise UserError(f"field 'label' is {label!r:.80}, expected 0 or 1")
    options = [option[0].lower() + option[1:] for option in options]
    return example((f"{text_of(record, 'premise').rstrip('.')} {joint}", options[label]), choices=options)


MMLU, MMLU_NUMBERED = ("question", *"ABCD", "answer"), ("question", *(f"choice{i}" for i in range(4)), "answer")


def read_mmlu(record):
    question, *options, answer = (text_of(record, *names) for names in zip(MMLU, MMLU_NUMBERED))
    right = dict(zip("0123ABCD", [*range(4)] * 2)).get(answer.strip())
    if right is None:
        raise UserError(f"field 'answer' is {answer!r:.80}, expected 0 to 3 or A to D")
    return quiz(question, options, right)


def read_choices(record):
    """The options as a list, as {text, label} of lists, or as a list of {text, label}; the answer as one of the labels,
    as a letter, or as a place from 0 on."""
    asked = record.get("question")
    asked = asked if isinstance(asked, dict) else record  # ARC's own files
    question = text_of(asked, "stem") if asked is not record else text_of(record, "question", "question_stem")
    options, labels = asked.get("choices"), None
    if isinstance(options, dict):
        options, labels = options.get("text"), options.get("label")
    elif isinstance(options, list) and options and all(isinstance(option, dict) for option in options):
        options, labels = ([option.get(name) for option in options] for name in ("text", "label"))
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise UserError(f"field 'choices' is {options!r:.80}, expected a list of 2 to 26 texts")
    name = next((name for name in ("answerKey", "answer", "label") if name in record), "answerKey")
    answer, letters = record.get(name), "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    keys = {letter: i for i, letter in enumerate(letters)} | {str(i): i for i in range(len(options))}
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(options) or len(set(map(str, labels))) < len(labels):
            raise UserError(f"field 'label' is {labels!r:.80}, expected a label for each of the choices")
        keys = {str(label): i for i, label in enumerate(labels)}
    if type(answer) not in (int, str) or str(answer).strip() not in keys:
        raise UserError(f"field {name!r} is {answer!r:.80}, expected one of {', '.join(keys):.80}")
    return quiz(question, [checked(option, "choices") for option in options], keys[str(answer).strip()])


# ---------------------------------------------------------------------------------------------- the table


def has(*names, label=None):
    """Recognises records by one that has all these fields and, where two formats share those, one of these labels."""
    return lambda records: any(all(n in r for n in names) and (label is None or r["label"] in label) for r in records)


def any_of(*kinds):
    return lambda records: any(kind(records) for kind in kinds)


@dataclass
class Format:
    recognises: Callable  # [record] -> whether a file of these records is of this kind
    score: Callable  # how a task of this kind is scored, see data.py
    read: Callable  # Record -> Example, or several
    fields: str  # what its records hold, in words


# The first that recognises a file's records is taken.
FORMATS = {
    "chat": Format(has("messages"), loss, read_chat,
                   "`messages` of `role` (user and assistant in turn, system first if at all) and `content`"),
    "dpo": Format(lambda records: has("chosen")(records) and has("rejected")(records), loss, read_dpo,
                  "`prompt`, `chosen`, `rejected`; the chosen answer is learned, text or messages"),
    "sharegpt": Format(has("conversations"), loss, read_sharegpt,
                       "`conversations` of `from` (human and gpt in turn, system first if at all) and `value`"),
    "boolq": Format(any_of(has("passage", "question", "label"),
                           lambda records: any("passage" in r and type(r.get("answer")) is bool for r in records)),
                    choice, read_boolq, "`passage`, `question`, `label` or `answer` (true, false)"),
    "multirc": Format(any_of(has("paragraph", "question", "answer", "label"), lambda records: any(
        isinstance(r.get("passage"), dict) and "questions" in r["passage"] for r in records)), choice, read_multirc,
        "`passage` with its questions and their answers; or `paragraph`, `question`, `answer`, `label`"),
    "cb": Format(has("premise", "hypothesis", "label", label=("contradiction", "neutral")), choice, read_cb,
                 "`premise`, `hypothesis`, `label` (entailment, contradiction, neutral)"),
    "rte": Format(has("premise", "hypothesis", "label"), choice, read_rte,
                  "`premise`, `hypothesis`, `label` (entailment, not_entailment)"),
    "wic": Format(has("word", "sentence1", "sentence2", "label"), choice, read_wic,
                  "`word`, `sentence1`, `sentence2`, `label`"),
    "wsc": Format(has("text", "target", "label"), choice, read_wsc,
                  "`text`, `target` with `span1_text`, `span2_text`, `span2_index`; `label`"),
    "copa": Format(has("premise", "choice1", "choice2", "question", "label"), choice, read_copa,
                   "`premise`, `choice1`, `choice2`, `question` (cause, effect), `label`"),
    "mmlu": Format(any_of(has(*MMLU), has(*MMLU_NUMBERED)), choice, read_mmlu,
                   "CSV of question, four options, answer (0-3 or A-D); with a header or without"),
    "choices": Format(lambda records: any(
        "choices" in r or isinstance(r.get("question"), dict) and "answerKey" in r for r in records),
        choice, read_choices,
        "`question`, `choices` (a list, or `text` and `label`), `answer` or `answerKey` (place or letter)"),
    "adapters": Format(has("instruction", "output", "answer"), adapters, read_adapters,
                       "LLM-Adapters' `instruction`, `input`, `output`, `answer`"),
    "alpaca": Format(any_of(*(has(*ORDERS, name) for name in DONE)), loss, read_alpaca,
                     "`instruction`, `output` or `response`, maybe `input` or `context`, `system`, `history`"),
    "gsm8k": Format(lambda records: any("####" in str(r.get("answer")) for r in records if "question" in r),
                    gsm8k, read_gsm8k, "`question`, and an `answer` that ends in `#### number`"),
    "pair": Format(any_of(*(has(p, a) for p in PROMPTS for a in ANSWERS)), exact, read_pair,
                   "one of " + ", ".join(f"`{name}`" for name in PROMPTS) + " with one of "
                   + ", ".join(f"`{name}`" for name in ANSWERS) + "; maybe `system`, `history`"),
    "text": Format(has("text"), loss, read_text, "`text`"),
}
SCORED = {loss: "loss, perplexity", choice: "likeliest choice", exact: "exact match",
          gsm8k: "the number in the generated text", adapters: "the answer in the generated text"}
