"""From files to examples: every format and template, bad rows, what is held out, and mistakes about data."""

import json

import pytest

import formats
from formats import TEMPLATES, read_files
from formats.known import example, final_number
from model import UserError
from tests.helpers import (
    BASE,
    CLAIM,
    COPA,
    HERE,
    NUMBERED,
    PASSAGE,
    QUIZ,
    WORD,
    number_by_hand,
    one_line_error,
    written,
)


@pytest.mark.parametrize("form, records, kind, prompt, answers, choices", [
    ("array", [{"instruction": "Add.", "input": "1 2", "output": "3"}], "alpaca", "Add.\n\n1 2", ["3"], None),
    ("lines", [{"instruction": "Hi", "output": ""}], "alpaca", "Hi", [""], None),
    ("csv", [{"instruction": "Say\nhi", "output": "hi, \"you\""}], "alpaca", "Say\nhi", ['hi, "you"'], None),
    ("lines", [{"prompt": "Q", "completion": "A"}], "pair", "Q", ["A"], None),
    ("csv", [{"question": "Q", "response": "A"}], "pair", "Q", ["A"], None),
    ("array", [{"question": "Q", "answer": "A"}], "pair", "Q", ["A"], None),
    ("array", [{"prompt": "Q", "output": "A"}], "pair", "Q", ["A"], None),
    ("lines", [{"question": "Q", "answer": "so\n#### 7"}], "gsm8k", "Q", ["so\n#### 7"], None),
    ("lines", [{"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A"),
                                                                     ("user", "R"), ("assistant", "B"))]}],
     "chat", "S\n\nQ", ["A", "B"], None),
    ("lines", [{**PASSAGE, "label": True}], "boolq", "Ice floats.\nQuestion: does ice float?\nAnswer:", ["yes"],
     ["yes", "no"]),
    ("lines", [{**CLAIM, "label": "not_entailment"}], "rte",
     "It rains.\nQuestion: It is wet. True or False?\nAnswer:", ["False"], ["True", "False"]),
    ("lines", [{**CLAIM, "label": "entailment"}, {**CLAIM, "label": "neutral"}], "cb",
     "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:", ["True"], ["True", "False", "Neither"]),
    ("lines", [{**WORD, "label": False}], "wic", "A river bank.\nA bank of fog.\nQuestion: Is the word 'bank' used in "
     "the same sense in both sentences?\nAnswer:", ["no"], ["yes", "no"]),
    ("lines", [COPA], "copa", "He fell because", ["he slipped."], ["he slipped.", "he sang."]),
    *((form, [{**fields, "answer": answer}], "mmlu", "2 + 2?\nA. 3\nB. 4\nC. 5, or 6\nD. 7\nAnswer:", ["B"],
       list("ABCD")) for form in ("csv", "csv without header") for fields in (QUIZ, NUMBERED) for answer in "B1"),
    ("lines", [{"text": "Once upon a time."}], "text", None, ["Once upon a time."], None),
])
def test_every_format_is_recognised_and_read(tmp_path, form, records, kind, prompt, answers, choices):
    file = written(tmp_path / "some.data", records, form)
    name, (found, rows) = next(iter(read_files([str(file)]).items()))
    assert (name, found, len(rows)) == ("some", kind, len(records))
    applied = TEMPLATES["plain"].apply(rows[0])
    space = "" if kind == "text" else " "
    assert [text for text, trained in applied.texts() if trained] == [space + a for a in answers]
    assert applied.texts()[0] == ((prompt, False) if prompt else (answers[0], True))
    assert applied.choices == (choices and [space + c for c in choices])


def test_prompt_templates_are_the_published_ones():
    turns = TEMPLATES["llama2"].apply(example(("Q", "A"), ("R", "B"), system="S"))
    opening = lambda name, user, **also: TEMPLATES[name].apply(example((user, "A"), **also)).texts()[0][0]
    assert opening("alpaca", "Add.", given="1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n")
    assert opening("alpaca", "Say {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x}.\n\n### Response:\n")
    assert "".join(text for text, _ in turns.texts()) == (
        "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A <bos>[INST] R [/INST] B ")  # others: see test_templates.py
    assert turns.end == "<eos>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_somebody_said_is_told_apart_from_markup(name):
    """Whatever they said: braces, or the template's own markup."""
    said = [("system", "S {}"), ("user", "Q {} [/INST]"), ("input", "I"), ("assistant", "{}"), ("user", "R"),
            ("assistant", "### Response:")]
    texts = [text for _, text in said]
    bare = example(tuple(texts[i] for i in (1, 3)), tuple(texts[4:]), system=texts[0], given=texts[2])
    applied = TEMPLATES[name].apply(bare)
    assert [(s.role, s.text) for s in applied.segments if s.role] == said
    assert {s.trained for s in applied.segments if s.role == "assistant"} == {True}
    assert not any(s.trained for s in applied.segments if s.role in ("system", "user", "input"))


@pytest.mark.parametrize("content, line, message", [
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion":\n', 2, "not valid JSON"),
    ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "", "completion": "b"}\n', 3, "'prompt' is ''"),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', 2, "no field 'completion' or"),
    ('[{"prompt": "a", "completion": "b"},\n {"prompt": "c",\n  "completion": 3}]', 2, "'completion' is 3"),
    ('[{"prompt": "a", "completion": "b"},\n 7]', 2, "no object"),
    ('prompt,answer\na,b\n"c\nd"\n', 4, "1 columns, expected 2"),
    (json.dumps({**PASSAGE, "label": True}) + "\n" + json.dumps(PASSAGE), 2, "'label' is None, expected one of True"),
    (json.dumps({"question": "q", "answer": "#### 1"}) + "\n" + json.dumps({"question": "q", "answer": "one"}), 2,
     "no final '#### number'"),
])
def test_a_bad_row_is_named_by_file_and_line_or_counted(tmp_path, capsys, content, line, message):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_files([str(file)])
    assert str(error.value).startswith(f"{file}:{line}: ") and message in str(error.value)
    rows = read_files([str(file)], skip_bad=True)["rows"][1]
    assert len(rows) == 1 and "1 bad rows skipped" in capsys.readouterr().out


def test_one_odd_row_does_not_change_a_files_format(tmp_path):
    """Neither the first row nor a wrong label decides alone."""
    rte = [{**CLAIM, "label": "entailment"}, {**CLAIM, "label": "not_entailment"}, {**CLAIM, "label": "neutrl"}]
    problems = [{"question": "q", "answer": "?"}, {"question": "q", "answer": "#### 1"}]
    orders = [{"instruction": "i"}, {"instruction": "i", "output": "o"}]
    for kind, rows in (("rte", rte), ("gsm8k", problems), ("alpaca", orders)):
        file = written(tmp_path / f"{kind}.json", rows)
        assert read_files([str(file)], skip_bad=True)[kind][0] == kind
        with pytest.raises(UserError, match=f"{kind}.json:{3 if kind == 'rte' else 1}: "):
            read_files([str(file)])


def test_what_is_held_out_is_never_trained_on(tmp_path, capsys):
    """By a second reading of the file: row i holds the number i."""
    pairs = lambda name, count: written(tmp_path / name, [{"prompt": name + str(i), "completion": str(i)}
                                                          for i in range(count)])
    big, small = pairs("big.jsonl", 400), pairs("small.jsonl", 30)
    other = written(tmp_path / "other.jsonl", [{"prompt": f"o{i}", "completion": str(i)} for i in range(9)])
    numbers = lambda examples, task: [int(e.texts()[1][0]) for e in examples if e.task == task]
    suite = formats.load([str(big), f"tiny={small}"], general_files=[str(other)])
    test, trained = numbers(suite.tests["big"], "big"), numbers(suite.train, "big")
    choosing = formats.load([str(big), f"tiny={small}"], general_files=[str(other)], split="validation")
    validation = numbers(choosing.tests["big"], "big")
    assert (len(test), len(validation), len(trained)) == (20, 19, 361) and trained == sorted(trained)
    assert sorted(test + validation + trained) == list(range(400)) and numbers(choosing.train, "big") == trained
    for part in (test, validation, test[:8]):  # from all over the file, and in no order, so that --eval-limit is too
        assert min(part) < 100 and max(part) > 300 and part != sorted(part) and len({i % 20 for i in part}) > 4
    assert numbers(formats.load([str(big)], limit=8).tests["big"], "big") == test[:8]
    assert len(numbers(suite.tests["tiny"], "tiny")) == 1 and suite.group == {
        "big": "new", "tiny": "new", "other": "general"}
    general = [numbers(part.tests["other"], "other") for part in (suite, choosing)]
    assert (len(general[0]), len(general[1]), sorted(general[0] + general[1])) == (4, 5, list(range(9)))
    assert "same as rows trained on" not in capsys.readouterr().out

    apart = formats.load([str(big)], [str(other)])
    assert numbers(apart.tests["other"], "other") == list(range(9)) and len(numbers(apart.train, "big")) == 380
    few = formats.load([str(big)], [str(big)], limit=40).tests["big"]
    assert len(few) == 40 and max(numbers(few, "big")) > 300
    assert "of the 40 rows that are scored are the same as rows trained on" in capsys.readouterr().out
    equal = formats.load([str(big), str(small)], mix="equal")
    assert len(numbers(equal.train, "big")) == len(numbers(equal.train, "small")) == 361
    assert len(set(numbers(equal.train, "small"))) == 28


def test_solved_examples_keep_all_that_their_rows_say(tmp_path):
    rows = [{"instruction": f"q{i}", "input": f"i{i}", "output": f"a{i}", "system": "s",
             "history": [["h", "b"]]} for i in range(3)]
    file = str(written(tmp_path / "a.jsonl", rows))
    row = formats.load([file], [file], shot_files=[file], shots=2).tests["a"][2]
    assert "".join(text for text, _ in row.texts()) == (
        "s\n\ns\n\nh b\nq0\n\ni0 a0\n\ns\n\nh b\nq1\n\ni1 a1\n\nh b\nq2\n\ni2 a2")


@pytest.mark.parametrize("rows, split", [(1, "test"), (1, "validation"), (2, "validation")])
def test_too_few_rows_to_hold_some_out_are_refused(tmp_path, rows, split):
    file = written(tmp_path / "few.jsonl", [{"prompt": f"q{i}", "completion": str(i)} for i in range(rows)])
    with pytest.raises(UserError, match=rf"'few' has too few rows \({rows}\) to hold some out; give --eval-data"):
        formats.load([str(file)], split=split)
    more = written(tmp_path / "more.jsonl", [{"prompt": f"q{i}", "completion": str(i)} for i in range(3)])
    suite = formats.load([str(more)], split=split)
    assert len(suite.train) == len(suite.tests["more"]) == 1


def test_the_final_number_follows_the_reference_rule():
    known = {"#### 18": "18", "so 3\n#### 1,234,567": "1234567", "#### -5": "-5", "#### 2.50": "2.50", "#### $18": None,
             "####18": None, "#### 7 #### 8": "7", "#### x\n#### 9": "9", "18": None, "": None, "#### 3.": "3.",
             "#### - 4": None, "#### 1/2": "1", "##### 6": "6", "#### -": None}
    for text, number in known.items():
        assert final_number(text) == number_by_hand(text) == number, text


@pytest.mark.parametrize("args, names", [
    (["--data", "none.json"], ["none.json", "cannot be read"]),
    (["--data", "odd.json"], ["odd.json", "the fields colour match no format", "alpaca", "mmlu"]),
    (["--data", "empty.json"], ["empty.json holds no records"]),
    (["--data", "pairs.json", "builtin"], ["builtin or files"]),
    (["--data", "pairs.json", "--tasks", "currency"], ["--tasks"]),
    (["--data", "pairs.json", "--replay", "0.1"], ["--replay"]),
    (["--eval-data", "pairs.json"], ["--eval-data"]),
    (["--template", "alpaca"], ["--template"]),
    (["--data", "pairs.json", "pairs=boolq.json"], ["two files of task 'pairs'", "NAME=FILE"]),
    (["--data", "pairs.json", "--general-data", "pairs.json"], ["'pairs' is both general and to be learned"]),
    (["--data", "boolq.json", "--shots", "3"], ["--shot-data"]),
    (["--data", "boolq.json", "--shots", "3", "--shot-data", "few=boolq.json"], ["--shots 3", "'boolq'"]),
    (["--data", "pairs.json", "--eval-data", "boolq.json", "--eval-split", "validation"], ["--eval-data"]),
    (["--data", "bad.csv", "--skip-bad-rows"], ["bad.csv holds no record", "1 columns"]),
    (["--data", "pairs.json", "--max-length", "3", "--too-long", "drop"], ["longer than --max-length 3"]),
    (["--data", "pairs.json", "--template", "chatty"], ["chatty", "alpaca", "llama3"]),
    (["--data", "pairs.json", "--method", "cofitune"], ["--general-data", "make its choice yourself"]),
    (["--data", "pairs.json", "--adapter", "x"], ["--eval-only"]),
])
def test_a_mistake_about_data_is_one_clear_line(tmp_path, args, names):
    written(tmp_path / "pairs.json", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(40)])
    written(tmp_path / "boolq.json", [{**PASSAGE, "label": True}] * 40)
    written(tmp_path / "odd.json", [{"colour": "red"}])
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.csv").write_text("prompt,answer\nonly one\n")
    method = [] if "--method" in args else ["--method", "multilora"]
    message = one_line_error(HERE / "train.py", *method, *args, "--base", BASE, "--steps", "1", cwd=tmp_path)
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists(), "a refused run must leave nothing behind"
