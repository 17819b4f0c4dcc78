"""What each kind of record means, and how it is scored.

A reader takes one record and gives an Example of bare segments, without a template's markup; it raises UserError where
the record is not of its kind. The table at the end says how a kind is recognised, read and scored.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from data import Example, Segment, choice, exact, loss, percent
from model import UserError


def example(*turns, system="", given="", choices=None):
    """Example of (user, assistant) turns. given: what goes with the first one, Alpaca's input."""
    (user, assistant), *later = turns
    segments = [Segment(system, "system"), Segment(user, "user"), Segment(given, "input")]
    segments = [s for s in segments if s.text] + [Segment(assistant, "assistant", trained=True)]
    for user, assistant in later:
        segments += [Segment(user, "user"), Segment(assistant, "assistant", trained=True)]
    return Example("", segments, choices)


def text_of(record, *names, empty=False):
    """The first of the named fields that the record has, as text. Raises UserError where it is none, or empty."""
    name = next((n for n in names if n in record), None)
    if name is None:
        raise UserError(f"no field {' or '.join(map(repr, names))}")
    if not isinstance(record[name], str) or not (record[name].strip() or empty):
        raise UserError(f"field {name!r} is {record[name]!r:.80}, expected text")
    if re.search("[\ud800-\udfff]", record[name]):
        raise UserError(f"field {name!r} holds half of a surrogate pair, which is no text")
    return record[name]


def labelled(record, prompt, words):
    """Example of a multiple-choice record whose `label` is a key of words: {label: answer}."""
    label = record.get("label")
    if not isinstance(label, (bool, int, str)) or label not in words:
        raise UserError(f"field 'label' is {label!r}, expected one of {', '.join(map(repr, words))}")
    return example((f"{prompt}\nAnswer:", words[label]), choices=list(words.values()))


def read_chat(record):
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError("field 'messages' is no list of objects with role and content")
    messages = [(text_of(m, "role"), text_of(m, "content")) for m in messages]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"field 'messages' has the roles {roles}, expected user and assistant in turn")
    texts = [text for _, text in messages]
    return example(*zip(texts[::2], texts[1::2]), system=system)


def read_alpaca(record):
    turn = text_of(record, "instruction"), text_of(record, "output", empty=True)
    return example(turn, given=text_of(record, "input", empty=True) if record.get("input") else "")


PROMPTS, ANSWERS = ("prompt", "question"), ("completion", "response", "answer", "output")


def read_pair(record):
    return example((text_of(record, *PROMPTS), text_of(record, *ANSWERS, empty=True)))


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
    hits, order = [False] * len(examples), sorted(range(len(examples)), key=lambda i: examples[i].prompt)
    for start in range(0, len(order), batch_size):
        part = [examples[i] for i in order[start : start + batch_size]]
        room = model.config.max_position_embeddings - max(e.prompt for e in part)
        rows = model.generate([e.ids[: e.prompt] for e in part], min(new_tokens, room), tokenizer.stop_ids)
        for i, e, row in zip(order[start:], part, rows):
            hits[i] = final_number(tokenizer.decode(row)) == final_number(e.gold)
    return {"final answer": percent(hits)}


def read_boolq(record):
    prompt = f"{text_of(record, 'passage')}\nQuestion: {text_of(record, 'question')}?"
    return labelled(record, prompt, {True: "yes", False: "no"})


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


def read_copa(record):
    joint = {"cause": "because", "effect": "so"}.get(text_of(record, "question"))
    if joint is None:
        raise UserError(f"field 'question' is {record['question']!r}, expected 'cause' or 'effect'")
    options = [text_of(record, name) for name in ("choice1", "choice2")]
    if type(record.get("label")) is not int or record["label"] not in (0, 1):
        raise UserError(f"field 'label' is {record.get('label')!r}, expected 0 or 1")
    options = [option[0].lower() + option[1:] for option in options]
    return example((f"{text_of(record, 'premise').rstrip('.')} {joint}", options[record["label"]]), choices=options)


MMLU, MMLU_NUMBERED = ("question", *"ABCD", "answer"), ("question", *(f"choice{i}" for i in range(4)), "answer")


def read_mmlu(record):
    question, *options, answer = (text_of(record, *names) for names in zip(MMLU, MMLU_NUMBERED))
    letter = dict(zip("0123ABCD", "ABCDABCD")).get(answer.strip())
    if letter is None:
        raise UserError(f"field 'answer' is {answer!r}, expected 0 to 3 or A to D")
    listed = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options))
    return example((f"{question}\n{listed}\nAnswer:", letter), choices=list("ABCD"))


def read_text(record):
    return example(("", text_of(record, "text")))


def has(*names, label=None):
    """Recognises records by one that has all these fields and, where two formats share those, one of these labels."""
    return lambda records: any(all(n in r for n in names) and (label is None or r["label"] in label) for r in records)


@dataclass
class Format:
    recognises: Callable  # [record] -> whether a file of these records is of this kind
    score: Callable  # how a task of this kind is scored, see data.py
    read: Callable  # record -> Example


# The first that recognises a file's records is taken.
FORMATS = {
    "chat": Format(has("messages"), loss, read_chat),
    "boolq": Format(has("passage", "question", "label"), choice, read_boolq),
    "cb": Format(has("premise", "hypothesis", "label", label=("contradiction", "neutral")), choice, read_cb),
    "rte": Format(has("premise", "hypothesis", "label"), choice, read_rte),
    "wic": Format(has("word", "sentence1", "sentence2", "label"), choice, read_wic),
    "copa": Format(has("premise", "choice1", "choice2", "question", "label"), choice, read_copa),
    "mmlu": Format(lambda records: has(*MMLU)(records) or has(*MMLU_NUMBERED)(records), choice, read_mmlu),
    "alpaca": Format(has("instruction", "output"), loss, read_alpaca),
    "gsm8k": Format(lambda records: any("####" in str(r.get("answer")) for r in records if "question" in r),
                    gsm8k, read_gsm8k),
    "pair": Format(lambda records: any(has(p, a)(records) for p in PROMPTS for a in ANSWERS), exact, read_pair),
    "text": Format(has("text"), loss, read_text),
}
