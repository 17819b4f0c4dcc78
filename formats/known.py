"""What each kind of record means, and how it is scored: a row of FORMATS, at the end, is all that a format needs.

A reader takes a record and gives an Example of bare segments, without a template's markup, or several; or (question,
options, place of the right one), of which --choices makes an Example. It may raise any exception for a record that is
not of its kind: that row is bad. A UserError's message is shown as it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from data import Example, Score, Segment, choice, exact, in_batches, loss, percent
from model import UserError

# ---------------------------------------------------------------------------------------------- parts of records


def checked(value, name, empty=False):
    """The value of a field, which must be text. Raises UserError where it is none, or empty."""
    if not isinstance(value, str) or not (value.strip() or empty):
        raise UserError(f"field {name!r} is {value!r:.80}, expected text")
    value.encode()  # half of a surrogate pair is no text, and fails here
    return value


def text_of(record, *names, empty=False):
    """The first of the named fields that the record has, as text. Raises UserError where it is none, or empty."""
    name = next((n for n in names if n in record), None)
    if name is None:
        raise UserError(f"no field {' or '.join(map(repr, names))}")
    return checked(record[name], name, empty)


def maybe(record, *names):
    """The same, and "" where the record has none of the fields."""
    return text_of(record, *names, empty=True) if any(n in record for n in names) else ""


def answer_among(words, label, name):
    """words[label] of a field's label. Raises UserError, listing the labels, where it is none of them."""
    if label not in words:
        raise UserError(f"field {name!r} is {label!r:.80}, expected one of {', '.join(map(repr, words)):.80}")
    return words[label]


def example(*turns, system="", given="", choices=None):
    """Example of (user, assistant) turns; user is None in plain text. given: Alpaca's input, of the last question."""
    segments = [Segment(system, "system")] if system else []
    for i, (user, assistant) in enumerate(turns, 1):
        segments += [Segment(user, "user")] * (user is not None)
        segments += [Segment(given, "input")] * bool(given and i == len(turns))
        segments.append(Segment(assistant, "assistant", trained=True))
    return Example("", segments, choices, gold=segments[-1].text)


SYSTEM = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def is_trained(record):
    """Whether a record or a message is to be trained on: other programs mark those that are not."""
    marks = (("weight", 0), ("train", False), ("trainable", False), ("masked", True), ("loss_mask", 0))
    return not any(name in record and record[name] == value for name, value in marks)


def conversation(messages, name, record):
    """Example of a list of messages, the last of which is the assistant's, in this field of a record."""
    system = maybe(record, *SYSTEM)
    if named := next((key for m in messages for key in ("tool_calls", "function_call") if m.get(key)), None):
        raise UserError(f"field {name!r} has {named}, which no template here writes")
    said = []
    for m in messages:
        role, text = text_of(m, "role", "from"), text_of(m, "content", "value")
        role = ROLES.get(role, role)
        said.append(Segment(text, role, trained=role == "assistant" and is_trained(m)))
    if said and said[0].role == "system":
        if system not in ("", said[0].text):
            raise UserError(f"field {name!r} begins with a system message, and there is a field 'system' as well")
        system = said.pop(0).text
    roles = [s.role for s in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"field {name!r} has the roles {roles!r:.80}, expected user and assistant in turn")
    return Example("", [Segment(system, "system")] * bool(system) + said, gold=said[-1].text)


# ---------------------------------------------------------------------------------------------- instructions and talk

PROMPTS, ANSWERS = ("prompt", "question", "query", "input"), ("completion", "response", "answer", "output")


def question(record, prompts, answers, inputs=("input",)):
    """Example of a record with one question and its answer, in the first of these fields that there are."""
    turn = text_of(record, *prompts), text_of(record, *answers, empty=True)
    given = maybe(record, *(name for name in inputs if name != next(n for n in prompts if n in record)))
    earlier = [(checked(asked, "history"), checked(answer, "history", empty=True))
               for asked, answer in record.get("history") or ()]
    return example(*earlier, turn, system=maybe(record, *SYSTEM), given=given)


def read_dpo(record):
    """The chosen answer alone is learned. It is text, a message, or messages, which may hold the question too."""
    chosen, asked = record["chosen"], next((n for n in ("conversations", "instruction", *PROMPTS) if n in record), None)
    if isinstance(chosen, str) and asked and isinstance(record[asked], str):
        return question(record, [asked], ["chosen"])
    listed = lambda value, role: value if isinstance(value, list) else [
        {"role": role, "content": value} if isinstance(value, str) else value]
    chosen = listed(chosen, "assistant")
    if asked and len(chosen) == 1:
        chosen = listed(record[asked], "user") + chosen
    return conversation(chosen, "chosen", record)


# ---------------------------------------------------------------------------------------------- generated answers


def generated(model, examples, tokenizer, batch_size, new_tokens):
    """What the model says to each prompt, as text. The room for an answer is the prompt's own, whatever else is in its
    batch; says how many answers filled it."""
    longest, texts, cut = model.config.max_position_embeddings, [""] * len(examples), 0
    rooms = [min(new_tokens, longest - e.prompt) for e in examples]
    for room in sorted({room for room in rooms if room > 0}, reverse=True):
        alike = [i for i in range(len(examples)) if rooms[i] == room]
        said = lambda part: model.generate([e.ids[: e.prompt] for e in part], room, tokenizer.stop_ids,
                                           tasks=[e.task for e in part])
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


def final_answers(model, examples, tokenizer, batch_size, new_tokens):
    """Is the number after "####" in the generated text the right one?"""
    texts = generated(model, examples, tokenizer, batch_size, new_tokens)
    return {"final answer": percent([final_number(t) == final_number(e.gold) for t, e in zip(texts, examples)])}


gsm8k = Score("gsm8k", "%", final_answers, generates=True)


# ---------------------------------------------------------------------------------------------- multiple choice


YES = {True: "yes", False: "no"}


def ranked(record, prompt, words, labels=("label",)):
    """Example of a record whose fields a prompt names in braces. The answer is words[label], of {label: answer};
    labels: the names that the label may have."""
    asked = re.sub(r"{(\w+)}", lambda field: text_of(record, field[1]), prompt)
    name = next((n for n in labels if n in record), labels[0])
    return example((asked + "\nAnswer:", answer_among(words, record[name], name)), choices=list(words.values()))


def read_multirc(record):
    """One Example for each answer, of a nested record or of one that holds one answer."""
    if "paragraph" in record:
        return ranked(record, "{paragraph}\nQuestion: {question}\nIs '{answer}' a right answer?", YES)
    passage = record["passage"]
    return [read_multirc({"paragraph": passage["text"], "question": question["question"], "answer": answer["text"],
                          "label": answer["label"]})
            for question in passage["questions"] for answer in question["answers"]]


def read_wsc(record):
    """Asterisks show which pronoun is meant. Its place in the published files is off by one at times."""
    target, words = record["target"], text_of(record, "text").split()
    first, place = text_of(target, "span2_text").split()[0].casefold(), target["span2_index"]
    near = [i for i in (place, place - 1, place + 1) if words[i : i + 1] and words[i].casefold().startswith(first)]
    if not near:
        raise UserError(f"field 'span2_index' is {place!r:.80}, expected the place of {first!r:.80} among the words")
    words[near[0]] = f"*{words[near[0]]}*"
    return ranked({**target, "text": " ".join(words), "label": record["label"]},
                  "{text}\nQuestion: Does '*{span2_text}*' refer to '{span1_text}'?", YES)


def read_copa(record):
    joint = answer_among({"cause": "because", "effect": "so"}, record["question"], "question")
    options = [text_of(record, name) for name in ("choice1", "choice2")]
    options = [option[0].lower() + option[1:] for option in options]
    answer = answer_among(dict(enumerate(options)), record["label"], "label")
    return example((f"{text_of(record, 'premise').rstrip('.')} {joint}", answer), choices=options)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MMLU, MMLU_NUMBERED = "question A B C D answer", "question choice0 choice1 choice2 choice3 answer"


def multiple_choice(question, options, right, letters):
    """Example that ranks the options' own texts, as an answer to the question, or the letters under which they stand.
    right: place of the right one."""
    if not letters:
        return example((f"Question: {question}\nAnswer:", options[right]), choices=options)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    return example((f"{question}\n{listed}\nAnswer:", LETTERS[right]), choices=list(LETTERS[: len(options)]))


def read_piqa(record):
    options = [text_of(record, name) for name in ("sol1", "sol2")]
    return text_of(record, "goal"), options, answer_among({"0": 0, "1": 1}, str(record["label"]).strip(), "label")


def read_siqa(record):
    options = [text_of(record, name) for name in ("answerA", "answerB", "answerC")]
    asked = f"{text_of(record, 'context')}\n{text_of(record, 'question')}"
    return asked, options, answer_among({"1": 0, "2": 1, "3": 2}, str(record["label"]).strip(), "label")


def read_mmlu(record):
    *names, answer = (MMLU if "A" in record else MMLU_NUMBERED).split()
    question, *options = [text_of(record, name) for name in names]
    right = answer_among(places(len(options)), str(record[answer]).strip(), answer)
    return multiple_choice(question, options, right, letters=True)


def places(count):
    """{key: place} of options that have no labels: their letters, and their places from 0 on."""
    return {LETTERS[i]: i for i in range(count)} | {str(i): i for i in range(count)}


def read_choices(record):
    """The options as a list, as {text, label} of lists, or as a list of {text, label}; the answer as one of the labels,
    as a letter, or as a place from 0 on."""
    asked = record["question"] if isinstance(record.get("question"), dict) else record  # ARC's own files
    question, labels = text_of(asked, "question", "question_stem", "stem", "ctx"), None
    options = asked["endings"] if "endings" in asked else asked["choices"]
    if isinstance(options, dict):
        options, labels = options["text"], options.get("label")
    elif isinstance(options, list) and isinstance(options[0], dict):
        options, labels = ([option[name] for option in options] for name in ("text", "label"))
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise UserError(f"field 'choices' is {options!r:.80}, expected a list of 2 to 26 texts")
    name = next((n for n in ("answerKey", "answer") if n in record), "label")
    keys = dict(zip(map(str, labels), range(len(options)), strict=True)) if labels else places(len(options))
    options = [checked(option, "choices") for option in options]
    return question, options, answer_among(keys, str(record[name]).strip(), name)


def read_winogrande(record):
    """The options as what stands behind the sentence's blank with each of them in it."""
    before, after = text_of(record, "sentence").split("_")
    options = [text_of(record, name) + after for name in ("option1", "option2")]
    right = answer_among({"1": 0, "2": 1}, str(record["answer"]), "answer")
    return example((before.rstrip(), options[right]), choices=options)


# ---------------------------------------------------------------------------------------------- the table


@dataclass
class Format:
    recognises: Callable  # record -> whether it is of this kind
    score: Score  # how a task of this kind is scored
    read: Callable  # record -> Example, or what else a reader may give
    fields: str  # what a record holds, in words
    sample: dict  # a record, for the tests and `python -m tools.show --formats`


def has(*kinds):
    """Recognises a record that has all the fields that one of these strings names."""
    return lambda record: any(all(name in record for name in kind.split()) for kind in kinds)


# The first that recognises a third of a file's records is taken.
FORMATS = {
    "chat": Format(has("messages"), loss, lambda r: conversation(r["messages"], "messages", r),
                   "messages of role (user and assistant in turn, system first if at all) and content",
                   {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Good day."}]}),
    "dpo": Format(has("chosen rejected"), loss, read_dpo,
                  "prompt, chosen, rejected; the chosen answer is learned, text or messages",
                  {"prompt": "What floats?", "chosen": "Ice.", "rejected": "Lead."}),
    "sharegpt": Format(has("conversations"), loss, lambda r: conversation(r["conversations"], "conversations", r),
                       "conversations of from (human and gpt in turn, system first if at all) and value",
                       {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Good day."}]}),
    "boolq": Format(
        lambda r: "passage" in r and "question" in r and ("label" in r or type(r.get("answer")) is bool), choice,
        lambda r: ranked(r, "{passage}\nQuestion: {question}?", YES, ("label", "answer")),
        "passage, question, label or answer (true, false)",
        {"passage": "Ice is light.", "question": "does ice float", "label": True}),
    "multirc": Format(
        lambda r: "paragraph" in r and "label" in r or isinstance(r.get("passage"), dict), choice, read_multirc,
        "passage with its questions and their answers; or paragraph, question, answer, label (0, 1)",
        {"passage": {"text": "Ice is light.", "questions": [
            {"question": "What floats?", "answers": [{"text": "ice", "label": 1}, {"text": "lead", "label": 0}]}]}}),
    "cb": Format(
        lambda r: "hypothesis" in r and r.get("label") in ("contradiction", "neutral"), choice,
        lambda r: ranked(r, "{premise}\nQuestion: {hypothesis} True, False or Neither?",
                         {"entailment": "True", "contradiction": "False", "neutral": "Neither"}),
        "premise, hypothesis, label (entailment, contradiction, neutral)",
        {"premise": "It rains.", "hypothesis": "It is late.", "label": "neutral"}),
    "rte": Format(
        has("premise hypothesis label"), choice, lambda r: ranked(
            r, "{premise}\nQuestion: {hypothesis} True or False?", {"entailment": "True", "not_entailment": "False"}),
        "premise, hypothesis, label (entailment, not_entailment)",
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}),
    "wic": Format(
        has("word sentence1 sentence2 label"), choice,
        lambda r: ranked(r, "{sentence1}\n{sentence2}\nQuestion: Is the word '{word}' used in the same sense in both "
                         "sentences?", YES),
        "word, sentence1, sentence2, label (true, false)",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank of fog.", "label": False}),
    "wsc": Format(has("text target label"), choice, read_wsc,
                  "text, target with span1_text, span2_text, span2_index; label (true, false)",
                  {"text": "Mark told Pete many lies, and he left.", "label": False,
                   "target": {"span1_text": "Mark", "span2_text": "he", "span2_index": 6}}),
    "copa": Format(has("premise choice1 choice2 question label"), choice, read_copa,
                   "premise, choice1, choice2, question (cause, effect), label (0, 1)",
                   {"premise": "He fell.", "choice1": "He slipped.", "choice2": "He sang.", "question": "cause",
                    "label": 0}),
    "mmlu": Format(has(MMLU, MMLU_NUMBERED), choice, read_mmlu,
                   "CSV of question, four options, answer (0-3 or A-D), ranked by letter; with a header or without",
                   {"question": "2 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}),
    "choices": Format(lambda r: "choices" in r or "answerKey" in r or "ctx" in r and "endings" in r, choice,
                      read_choices, "question (question_stem, ctx), choices or endings (a list, or text and label), "
                      "answer, answerKey or label (place or letter): ARC, OpenBookQA, HellaSwag",
                      {"question": "What floats?", "choices": ["lead", "ice"], "answer": 1}),
    "piqa": Format(has("goal sol1 sol2 label"), choice, read_piqa, "goal, sol1, sol2, label (0, 1)",
                   {"goal": "Cool a drink.", "sol1": "Add lead.", "sol2": "Add ice.", "label": 1}),
    "siqa": Format(has("context question answerA answerB answerC label"), choice, read_siqa,
                   "context, question, answerA, answerB, answerC, label (1 to 3)",
                   {"context": "It rains.", "question": "What does Ann take?", "answerA": "a lamp", "answerB": "ice",
                    "answerC": "an umbrella", "label": "3"}),
    "winogrande": Format(has("sentence option1 option2 answer"), choice, read_winogrande,
                         "sentence with a blank _, option1, option2, answer (1, 2)",
                         {"sentence": "Lead sank and ice floated because _ is light.", "option1": "lead",
                          "option2": "ice", "answer": "2"}),
    "alpaca": Format(
        has("instruction output", "instruction response"), loss,
        lambda r: question(r, ["instruction"], ["output", "response"], ["input", "context"]),
        "instruction, output or response, maybe input or context, system, history",
        {"instruction": "Translate into German.", "input": "ice", "output": "Eis"}),
    "gsm8k": Format(lambda r: "question" in r and "####" in str(r.get("answer")), gsm8k, read_gsm8k,
                    "question, and an answer that ends in #### number",
                    {"question": "What are two and three?", "answer": "2 + 3 = 5\n#### 5"}),
    "pair": Format(
        has(*(f"{asked} {answer}" for asked in PROMPTS for answer in ANSWERS)), exact,
        lambda r: question(r, PROMPTS, ANSWERS),
        f"one of {', '.join(PROMPTS)} with one of {', '.join(ANSWERS)}; maybe system, history",
        {"prompt": "What floats?", "completion": "Ice."}),
    "text": Format(has("text"), loss, lambda r: example((None, text_of(r, "text"))), "text",
                   {"text": "Ice floats, and lead does not."}),
}
