"""From files to examples: every format, bad rows, what is held out, and mistakes about data."""

import gzip
import json
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
import tokenizers
import torch

import formats
import train
from data import Tokenizer, encode
from formats import FORMATS, read_files
from formats.known import Format, example, final_number
from model import Llama, UserError
from tests.helpers import BASE, HERE, here, one_line_error, posix, refused, tiny, with_template, written

SAID = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
FROM = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
ARC = {"question": "2 + 2?", "choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}}
LISTED, ASKED = "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:", "Question: 2 + 2?\nAnswer:"
BOOLQ, RTE, WSC = (FORMATS[name].sample for name in ("boolq", "rte", "wsc"))
PAIR = '{"prompt": "a", "completion": "b"}'

ANSWER = {"answerKey": "B"}
# What other files of these formats hold, beside the table's own samples: format, the texts in order, the choices, the
# fields that are not read, a record.
FORMS = [
    ("chat", "SQA", None, "", {"messages": [{"role": "system", "content": "S"}, *SAID]}),
    ("chat", "SQA", None, "", {"system": "S", "messages": SAID}),
    ("chat", "QA", None, "prompt", {"messages": [{**m, "weight": 1} for m in SAID], "prompt": "Q"}),
    ("chat", "QA", None, "", {"messages": FROM}),
    ("sharegpt", "QAQA", None, "id", {"id": "1", "conversations": FROM * 2}),
    ("sharegpt", "SQA", None, "", {"conversations": [{"from": "system", "value": "S"}, *FROM]}),
    ("sharegpt", "SQA", None, "tools", {"conversations": FROM, "system": "S", "tools": "[]"}),  # LLaMA-Factory's
    ("alpaca", "QA", None, "text", {"instruction": "Q", "input": None, "output": "A", "text": "..."}),
    ("alpaca", ["S", "R", "B", "T", "", "Q", "I", "A"], None, "", {  # LLaMA-Factory's
        "instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["R", "B"], ["T", ""]]}),
    ("alpaca", "QA", None, "", {"instruction": "Q", "output": "A", "history": [], "system": None}),
    ("alpaca", "QIA", None, "category", {"instruction": "Q", "context": "I", "response": "A", "category": "c"}),
    ("pair", "QA", None, "type", {"query": "Q", "response": "A", "type": "t"}),
    ("pair", "QA", None, "", {"input": "Q", "output": "A"}),
    ("pair", "QIA", None, "", {"prompt": "Q", "input": "I", "output": "A"}),
    ("pair", "SQA", None, "id", {"id": "x", "system_prompt": "S", "question": "Q", "response": "A"}),  # OpenOrca
    ("pair", "RBQA", None, "", {"prompt": "Q", "response": "A", "history": [["R", "B"]]}),  # ChatGLM
    ("dpo", "SQA", None, "rejected", {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}),
    ("dpo", "QA", None, "rejected, score", {"chosen": SAID, "rejected": SAID, "score": 1.0}),
    ("dpo", "QA", None, "prompt, rejected", {"prompt": "Q", "chosen": SAID, "rejected": SAID}),  # UltraFeedback
    ("dpo", "QA", None, "rejected", {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": SAID[1:]}),
    ("dpo", "QA", None, "rejected", {"conversations": FROM[:1], "chosen": FROM[1], "rejected": FROM[1]}),
    ("dpo", "QIA", None, "rejected", {"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}),
    ("choices", [ASKED, "4"], "345", "subject", {  # MMLU on Hugging Face
        "question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5"], "answer": 1}),
    ("choices", [ASKED, "4"], "345", "", {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "B"}),
    ("mmlu", [LISTED.replace("C. 5", "C. 5\nD. 6"), "B"], "ABCD", "", {
        "question": "2 + 2?", **{f"choice{i}": str(i + 3) for i in range(4)}, "answer": "1"}),
    ("choices", [ASKED, "4"], "345", "id", {"id": "x", **ARC, **ANSWER}),
    ("choices", [ASKED, "4"], "345", "id", {"id": "x", **ANSWER, "question": {"stem": "2 + 2?", "choices": [
        {"text": t, "label": n} for t, n in zip("345", "ABC")]}}),  # ARC's own files
    ("choices", [ASKED, "4"], "345", "fact1", {  # OpenBookQA
        "question_stem": "2 + 2?", "choices": ARC["choices"], **ANSWER, "fact1": "f"}),
    ("boolq", ["P\nQuestion: q?\nAnswer:", "no"], ["yes", "no"], "", {
        "passage": "P", "question": "q", "answer": False}),  # on Hugging Face
    ("rte", ["It rains.\nQuestion: It is wet. True or False?\nAnswer:", "False"], ["True", "False"], "idx", {
        **RTE, "label": "not_entailment", "idx": 1}),
    ("copa", ["He fell so", "he sang."], ["he slipped.", "he sang."], "", {
        "premise": "He fell.", "choice1": "He slipped.", "choice2": "He sang.", "question": "effect", "label": 1}),
    ("wsc", ["Mark told Pete many lies, and *he* left.\nQuestion: Does '*he*' refer to 'Mark'?\nAnswer:", "no"],
     ["yes", "no"], "", {**WSC, "target": {**WSC["target"], "span2_index": 7}}),
    ("multirc", ["Ice.\nQuestion: What?\nIs 'lead' a right answer?\nAnswer:", "no"], ["yes", "no"], "", {
        "paragraph": "Ice.", "question": "What?", "answer": "lead", "label": 0}),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_each_form_is_recognised_and_each_field_read_or_named(tmp_path, capsys, number):
    kind, texts, choices, unread, record = FORMS[number]
    file = str(written(tmp_path / "a.data", [record, record], ("array", "lines")[number % 2]))
    found, rows = read_files([file])["a"]
    assert (found, [s.text for s in rows[0].segments]) == (kind, list(texts))
    assert rows[0].choices == (choices and list(choices))
    assert capsys.readouterr().out.strip().partition("fields that are not read: ")[2] == unread
    for field in record:
        written(tmp_path / "a.data", [record, {**record, field: {"x": 1}}])
        if field in unread.split(", "):
            read_files([file])
        else:
            with pytest.raises(UserError, match="a.data:2: "):
                read_files([file])


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_sample_goes_all_the_way_to_a_score(tmp_path, name):
    kind, tokenizer = FORMATS[name], Tokenizer.from_pretrained(BASE)
    found, rows = read_files([str(written(tmp_path / "a.jsonl", [kind.sample] * 3))])["a"]
    assert found == name and len(rows) == (6 if name == "multirc" else 3) and rows[0].source.endswith("a.jsonl:1")
    answer = rows[0].segments[-1]
    assert answer.trained and answer.text and (rows[0].choices is None or answer.text in rows[0].choices)
    encoded = encode(with_template(rows), tokenizer, ["a"])
    assert all(any(label != -100 for label in e.labels) for e in encoded)
    model = Llama.from_pretrained(BASE)
    with torch.no_grad():
        figures = kind.score.function(model, encoded, tokenizer, 2, 4)
    assert all(value >= 0 for value in figures.values()) and figures
    table = here("-m", "tools.show", "--formats").stdout
    assert f"| `{name}` | {kind.fields} | {kind.score.name} | `{json.dumps(kind.sample)}` |" in table


def test_the_content_decides_how_a_file_is_read(tmp_path, capsys):
    """Arrays, lines, CSV with quotes and without a header; packed files, UTF-16; not the ending."""
    quiz = {**FORMATS["mmlu"].sample, "C": "5, or\n6"}
    for form in ("array", "lines", "csv", "csv without header"):
        kind, rows = read_files([str(written(tmp_path / "x.data", [quiz] * 2, form))])["x"]
        assert kind == "mmlu" and [s.text for s in rows[1].segments] == [
            "2 + 2?\nA. 3\nB. 4\nC. 5, or\n6\nD. 6\nAnswer:", "B"]
    rows = [{"prompt": f"é{i}", "completion": "北京"} for i in range(4)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    table = "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
    for name, raw in {"a.json.gz": gzip.compress(lines.encode()), "a.json": lines.encode("utf-16"),
                      "a.jsonl": b"\xfe\xff" + lines.encode("utf-16-be"), "a.txt": b"\xef\xbb\xbf" + lines.encode(),
                      "a.csv": table.encode("utf-16")}.items():
        (tmp_path / name).write_bytes(raw)
        (task, (kind, found)), = read_files([str(tmp_path / name)]).items()
        assert (task, kind) == ("a", "pair"), name
        assert [[s.text for s in e.segments] for e in found] == [[r["prompt"], r["completion"]] for r in rows], name


@pytest.mark.parametrize("content, place, message", [
    (f'{PAIR}\n{{"prompt": "a", "completion":\n', ":2", "not valid JSON"),
    (f'{PAIR}\n\n{{"prompt": "", "completion": "b"}}\n', ":3", "'prompt' is ''"),
    (f'{PAIR}\n{{"prompt": "a"}}\n', ":2", "no field 'completion' or"),
    (f'[{PAIR},\n {{"prompt": "c",\n  "completion": 3}}]', ":record 2", "'completion' is 3"),
    (f"[{PAIR},\n 7]", ":record 2", "no object"), (f"{PAIR}\nnull", ":2", "no object"),
    (f"[[{PAIR}]]", ":record 1", "no object"),
    ('prompt,answer\na,b\n"c\nd"\n', ":4", "1 columns, expected 2"),
    (f'{PAIR}\n{{"prompt": "a\\ud800", "completion": "b"}}', ":2", "format pair: UnicodeEncodeError"),
    (f'{PAIR}\n{{"prompt": "a", "completion": "b", "system": ["x"]}}', ":2", "'system' is ['x'], expected text"),
    (f'{PAIR}\n{{"prompt": "a", "completion": "b", "history": [["x"]]}}', ":2", "format pair: ValueError"),
    (f'{PAIR}\n{{"prompt": "a", "completion": "b", "history": [["x", 7]]}}', ":2", "'history' is 7"),
    ('{"messages": [{"role": "user", "content": "x"}]}', ":1", "has the roles ['user'], expected user and assistant"),
    ('{"messages": 7}', ":1", "does not fit the format chat: TypeError"),
    (json.dumps(BOOLQ) + "\n" + json.dumps({**BOOLQ, "label": None}), ":2", "format boolq: no field 'label'"),
    (json.dumps(BOOLQ) + "\n" + json.dumps(BOOLQ).replace("label", "idx"), ":2", "format boolq: no field 'label'"),
    (json.dumps({**ARC, "answerKey": "E"}), ":1", "'answerKey' is 'E', expected one of 'A', 'B', 'C'"),
    ('{"question": "q", "choices": "abc", "answer": 0}', ":1", "expected a list of 2 to 26 texts"),
    (json.dumps({**WSC, "target": {**WSC["target"], "span2_index": 2}}), ":1", "expected the place of 'he'"),
    ('{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "one"}', ":2", "no final '#### number'"),
    (json.dumps({"messages": [{"role": "system", "content": "S"}, *SAID], "system": "T"}), ":1", "'system' as well"),
    (json.dumps({"messages": [*SAID, {**SAID[1], "tool_calls": [{"name": "f"}]}]}), ":1", "'messages' has tool_calls"),
    (json.dumps({"conversations": [FROM[0], {**FROM[1], "function_call": {"name": "f"}}]}), ":1",
     "'conversations' has function_call"),
    (f"[{PAIR}\n{PAIR}]", "", "cannot be read: Expecting ',' delimiter: line 2"), (f"[{PAIR},", "", "cannot be read"),
    ("{\n" + PAIR[1:], ":1", "expected a whole object in each line"), ("[]", "", "no records"), ("", "", "no records"),
    ('prompt,answer\na,"b\n', "", "cannot be read: unexpected end of data"), ("[" * 10**5, "", "cannot be read"),
    ('{"colour": "red"}', "", "the fields colour match no format; known: chat, dpo, sharegpt"),
    (b"PAR1\x15\x04", "", "is Parquet, expected JSON or CSV"), (b"\x1f\x8b\x08torn", "", "cannot be read"),
    (gzip.compress(PAIR.encode() * 9)[:-9], "", "cannot be read"), (b"\xff\xfe\x00\xd8", "", "cannot be read"),
])
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, content, place, message):
    file = tmp_path / "rows.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_files([str(file)])
    assert str(error.value).startswith(f"{file}{place}") and message in str(error.value)


def test_one_bad_row_in_a_hundred_is_left_out_and_counted(tmp_path, capsys):
    """Neither the first row nor a wrong label decides which format a file has."""
    file = tmp_path / "rows.jsonl"
    odd = {"rte": {**RTE, "label": "neutrl"}, "gsm8k": {"question": "q", "answer": "?"}, "alpaca": {"instruction": "i"}}
    for kind, row in odd.items():
        for rows in ([row] + [FORMATS[kind].sample] * 99, [FORMATS[kind].sample] * 99 + [row]):
            found, examples = read_files([str(written(file, rows))])["rows"]
            assert (found, len(examples)) == (kind, 99)
    capsys.readouterr()
    for bad in ('{"prompt": "a", "completion":', '{"prompt": "a"}', "null"):
        file.write_text("\n".join([PAIR] * 3 + [bad] + [PAIR] * 96))
        assert len(read_files([str(file)])["rows"][1]) == 99
        said = capsys.readouterr().out
        assert "rows: 99 records of format pair" in said and f"1 bad rows are left out; the first, {file}:4: " in said
        file.write_text("\n".join([PAIR] * 3 + [bad] + [PAIR] * 95))
        with pytest.raises(UserError, match=r"rows.jsonl:4: .* \(1 of 99 rows are bad\)"):
            read_files([str(file)])


def test_a_format_is_one_row_whose_reader_checks_nothing(tmp_path, capsys, monkeypatch):
    read = lambda record: example((record["body"][record["start"] :], record.get("to")))
    monkeypatch.setitem(FORMATS, "cut", Format(lambda r: "start" in r, FORMATS["pair"].score, read, "body, start", {}))
    file = str(written(tmp_path / "a.jsonl", [{"body": "abc", "start": 1, "to": "d", "id": 7}]))
    (kind, (row,)) = read_files([file])["a"]
    assert (kind, [s.text for s in row.segments]) == ("cut", ["bc", "d"])
    assert capsys.readouterr().out.endswith("fields that are not read: id\n")
    for record, message in (({"start": 1}, "no field 'body'"), ({"body": "abc", "start": "x"}, "TypeError: ")):
        written(tmp_path / "a.jsonl", [record])
        with pytest.raises(UserError, match=f"a.jsonl:1: does not fit the format cut: {message}"):
            read_files([file])


def test_what_is_held_out_is_never_trained_on(tmp_path, capsys):
    """By a second reading of the file: row i holds the number i."""
    pairs = lambda name, count: str(written(tmp_path / name, [{"prompt": name + str(i), "completion": str(i)}
                                                              for i in range(count)]))
    big, small, other = pairs("big.jsonl", 400), pairs("small.jsonl", 30), pairs("other.jsonl", 9)
    numbers = lambda examples, task: [int(e.segments[-1].text) for e in examples if e.task == task]
    suite = formats.load([big, f"tiny={small}"], general_files=[other])
    test, trained = numbers(suite.tests["big"], "big"), numbers(suite.train, "big")
    choosing = formats.load([big, f"tiny={small}"], general_files=[other], split="validation")
    validation = numbers(choosing.tests["big"], "big")
    assert (len(test), len(validation), len(trained)) == (20, 19, 361) and trained == sorted(trained)
    assert sorted(test + validation + trained) == list(range(400)) and numbers(choosing.train, "big") == trained
    for part in (test, validation, test[:8]):  # from all over the file, and in no order, so that --eval-limit is too
        assert min(part) < 100 and max(part) > 300 and part != sorted(part) and len({i % 20 for i in part}) > 4
    assert numbers(suite.validation, "big") == validation
    assert numbers(formats.load([big], limit=8).tests["big"], "big") == test[:8]
    assert len(numbers(suite.tests["tiny"], "tiny")) == 1 and suite.group == {
        "big": "new", "tiny": "new", "other": "general"}
    general = [numbers(part.tests["other"], "other") for part in (suite, choosing)]
    assert (len(general[0]), len(general[1]), sorted(general[0] + general[1])) == (4, 5, list(range(9)))
    assert "same as rows trained on" not in capsys.readouterr().out

    apart = formats.load([big], [other])
    assert numbers(apart.tests["other"], "other") == list(range(9)) and len(numbers(apart.train, "big")) == 380
    few = formats.load([big], [big], limit=40).tests["big"]
    assert len(few) == 40 and max(numbers(few, "big")) > 300
    assert "of the 40 rows that are scored are the same as rows trained on" in capsys.readouterr().out
    for split in ("test", "validation"):
        few = formats.load([pairs("few.jsonl", 3)], general_files=[pairs("one.jsonl", 1)], split=split)
        assert len(few.train) == len(few.tests["few"]) == 1
        assert len(few.tests["one"]) == 1, "the only row of general data is scored"
    for rows, split in ((1, "test"), (1, "validation"), (2, "validation")):
        with pytest.raises(UserError, match=rf"'few' has too few rows \({rows}\) to hold some out; give --eval-data"):
            formats.load([pairs("few.jsonl", rows)], split=split)


def test_tasks_mixed_equally_have_as_many_answers_to_learn(tmp_path):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    talk = written(tmp_path / "talk.jsonl", [{"messages": turn * 5}] * 40)
    pair = written(tmp_path / "pair.jsonl", [{"prompt": str(i), "completion": "a"} for i in range(60)])
    config = train.Config("lora", str(BASE), data=[str(talk), str(pair)], template="plain")
    count = lambda mix: Counter(e.task for e in train.load_data(replace(config, mix=mix))[0].train)
    assert count("proportional") == {0: 5 * 37, 1: 55} and count("equal") == {0: 185, 1: 185}
    equal = train.load_data(replace(config, mix="equal"))[0].train
    assert set(Counter(e.source for e in equal if e.task == 1).values()) == {3, 4}, "every row, about equally often"


def test_solved_examples_keep_all_that_their_rows_say(tmp_path):
    rows = [{"instruction": f"q{i}", "input": f"i{i}", "output": f"a{i}", "system": "s",
             "history": [["h", "b"]]} for i in range(3)]
    file = str(written(tmp_path / "a.jsonl", rows))
    last = str(written(tmp_path / "last.jsonl", rows[2:]))
    row, = formats.load([file], [f"a={last}"], shot_files=[file], shots=2).tests["a"]
    assert "".join(s.text for s in with_template([row], "plain")[0].segments) == (
        "<s>s\n\ns\n\nh b\nq0\n\ni0 a0\n\ns\n\nh b\nq1\n\ni1 a1\n\nh b</s>\nq2\n\ni2 a2</s>")
    with pytest.raises(UserError, match="--shots 3: --shot-data has fewer rows for task 'a' that are not scored"):
        formats.load([], [f"a={last}"], shot_files=[file], shots=3)
    plain = str(written(tmp_path / "b.jsonl", [{"text": "once"}]))
    with pytest.raises(UserError, match="'b' is plain text"):
        formats.load([], [plain], shot_files=[f"b={written(tmp_path / 'c.jsonl', [{'text': 'twice'}])}"], shots=1)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_no_solved_example_is_scored_or_held_out(tmp_path, split):
    rows = [{"prompt": f"q{i}", "answer": str(i)} for i in range(60)]
    file, part = str(written(tmp_path / "a.jsonl", rows)), str(written(tmp_path / "b.jsonl", rows[:50]))
    for files, other in (([file], {}), ([file], {"eval_files": [f"a={part}"]}), ([], {"general_files": [f"a={part}"]}),
                         ([], {"eval_files": [f"a={part}"], "limit": 3})):
        suites = {name: formats.load(files, split=name, shot_files=[file], shots=3, **other)
                  for name in ("test", "validation")}
        scored = suites[split].tests.get("a", ())
        shown = {number for row in scored for number in re.findall(r"q\d+(?= )", row.segments[0].text)}
        held = {row.segments[-2].text.rpartition("\n")[2] for suite in suites.values()
                for row in (*suite.tests.get("a", ()), *suite.validation)}
        assert len(shown) == 3 * bool(scored) and not shown & held
        assert not other or all(int(q[1:]) >= 50 for q in shown), "--eval-data and --general-data are never shown"


# ---------------------------------------------------------------------------------------------- what a row says

QUESTIONS = [{"question": f"{i}?", "answer": "A"} for i in range(9)]
DOWN = {"instruction": "Q", "input": "", "output": "A", "text": "Q A", "conversations": None, "messages": []}


@pytest.mark.parametrize("kind, records", [
    ("alpaca", [DOWN] * 9), ("alpaca", [DOWN] * 9 + [{**DOWN, "output": ""}]),
    ("pair", QUESTIONS + [{"question": "How?", "answer": "#### Steps\n#### 1"}]),
    ("sharegpt", [{**DOWN, "conversations": FROM}] * 3), ("cb", [{**RTE, "label": "neutral"}] + [RTE] * 2)])
def test_null_and_empty_fields_and_one_odd_row_do_not_decide_the_format(tmp_path, kind, records):
    found, rows = read_files([str(written(tmp_path / "a.jsonl", records))])["a"]
    assert (found, len(rows)) == (kind, len(records))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False},
                                  {"masked": True}, {"loss_mask": 0}])
def test_an_answer_that_is_not_to_be_trained_on_is_not(tmp_path, mark):
    template = formats.choose("plain", Tokenizer.from_pretrained(BASE), BASE)[0]
    turns = [(name, {"role": "assistant", "content": name}) for name in "AB"]
    other = {key: not value for key, value in mark.items()}
    for marked, left in (("A", ["B"]), ("B", ["A"]), ("AB", []), ("", ["A", "B"])):
        talk = [m for name, said in turns for m in (SAID[0], {**said, **(mark if name in marked else other)})]
        suite = formats.load([str(written(tmp_path / "a.jsonl", [{"messages": talk}] * 4))])
        if left:
            trained = [one.segments[-2].text for one in formats.dress(suite, template).train]
            assert trained == left * len(suite.train)
        else:
            with pytest.raises(UserError, match="no answer is to be trained on"):
                formats.dress(suite, template)
    rows = read_files([str(written(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "A", **mark}]))])["b"][1]
    assert template.answers(rows[0]) == [], "the mark of a row"


@posix
def test_links_into_a_cache_and_long_fields(tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in ("piqa/validation.jsonl", "arc.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        blob = written(tmp_path / "blobs" / str(len(name)), [{"prompt": name, "completion": "A"}])
        (tmp_path / name).symlink_to(blob)
    assert list(read_files([str(tmp_path / "piqa/validation.jsonl"), str(tmp_path / "arc.jsonl")])) == ["piqa", "arc"]
    long = {"prompt": "Q" * 200_000, "completion": "A"}
    assert read_files([str(written(tmp_path / "a.csv", [long], "csv"))])["a"][1][0].segments[0].text == long["prompt"]


@posix
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", tmp_path):
        assert str(file) in one_line_error("train.py", "--method", "lora", "--data", file, "--out", tmp_path / "out")
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    os.mkfifo(tmp_path / "base" / "config.json")
    refused(Llama.from_pretrained, tmp_path / "base", "no regular file")


def test_choices_and_answers_are_stripped_alike(tmp_path):
    row = {"question": "Q", "choices": ["a. ", " b"], "answer": 0}
    rows, tokenizer = read_files([str(written(tmp_path / "a.jsonl", [row]))])["a"][1], Tokenizer.from_pretrained(BASE)
    for name in ("llama2", "plain", "short"):
        one, = encode(with_template(rows, name, tokenizer), tokenizer, ["a"])
        right, = [choice for choice in one.choices if choice.gold == one.gold]
        assert right.ids == one.ids[: len(right.ids)] and right.prompt == one.prompt
        assert any(label != -100 for label in right.labels)


# Rows as they are published: format, question, options, place of the right one, record. No question: no letters.
PUBLISHED = [
    ("piqa", "dresser", ["replace drawer", "finish"], 1, {
        "goal": "dresser", "sol1": "replace drawer", "sol2": "finish", "label": 1}),
    ("choices", "A man sits on a roof. he", ["falls.", "sings.", "rips up tiles.", "eats."], 2, {  # HellaSwag
        "ind": 24, "activity_label": "Roof", "ctx_a": "A man sits on a roof.", "ctx_b": "he", "label": "2",
        "ctx": "A man sits on a roof. he", "endings": ["falls.", "sings.", "rips up tiles.", "eats."],
        "source_id": "a~v_1", "split": "val", "split_type": "indomain"}),
    ("choices", "Ice can", ["sing", "float"], 1, {  # OpenBookQA
        "id": "8-376", "question_stem": "Ice can", "answerKey": "B",
        "choices": {"text": ["sing", "float"], "label": ["A", "B"]}}),
    ("choices", "Which floats?", ["lead", "ice", "iron"], 1, {  # ARC, some of whose labels are numbers
        "id": "M_1", "question": "Which floats?", "answerKey": "2",
        "choices": {"text": ["lead", "ice", "iron"], "label": ["1", "2", "3"]}}),
    ("siqa", "Ann saw rain.\nWhat will Ann do?", ["sing", "sleep", "go in"], 2, {
        "context": "Ann saw rain.", "question": "What will Ann do?", "answerA": "sing", "answerB": "sleep",
        "answerC": "go in", "label": "3"}),
    ("winogrande", None, ["Sarah got the case.", "Maria got the case."], 1, {
        "sentence": "Sarah is no surgeon, so _ got the case.", "option1": "Sarah", "option2": "Maria", "answer": "2"}),
    ("winogrande", None, ["Sarah asked.", "Maria asked."], 0, {
        "sentence": "_ asked.", "option1": "Sarah", "option2": "Maria", "answer": "1"}),
]


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_published_choices_are_read_by_text_and_by_letter(tmp_path, number):
    kind, question, options, right, record = PUBLISHED[number]
    file, tokenizer = str(written(tmp_path / "a.jsonl", [record])), Tokenizer.from_pretrained(BASE)
    asked = f"Question: {question}\nAnswer:" if question else record["sentence"].partition("_")[0].rstrip()
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
    letters = list("ABCD"[: len(options)])
    wanted = {"text": (asked, options), "letter": (f"{question}\n{listed}\nAnswer:", letters) if question else (
        asked, options)}
    for choices, (prompt, texts) in wanted.items():
        found, (row,) = read_files([file], choices)["a"]
        assert (found, [s.text for s in row.segments]) == (kind, [prompt, texts[right]])
        assert (row.choices, row.gold) == (texts, texts[right])
        one, = encode(with_template([row], "plain", tokenizer), tokenizer, ["a"])
        assert [tokenizer.decode(c.ids) for c in one.choices] == [f"{prompt} {text}" for text in texts]


def test_the_final_number_follows_the_reference_rule():
    known = {"#### 18": "18", "so 3\n#### 1,234,567": "1234567", "#### -5": "-5", "#### 2.50": "2.50", "#### $18": None,
             "####18": None, "#### 7 #### 8": "7", "#### x\n#### 9": "9", "18": None, "": None, "#### 3.": "3.",
             "#### - 4": None, "#### 1/2": "1", "##### 6": "6", "#### -": None, "#### 7\n\nQ: more": "7"}
    for text, number in known.items():
        assert final_number(text) == number, text


@pytest.mark.parametrize("args, names", [
    (["--data", "none.json"], ["none.json", "cannot be read"]),
    (["--data", "pairs.json", "builtin"], ["builtin or files"]),
    (["--data", "pairs.json", "--tasks", "currency"], ["--tasks"]),
    (["--eval-data", "pairs.json"], ["--eval-data"]),
    (["--mix", "equal"], ["--mix"]),
    (["--data", "pairs.json", "pairs=boolq.json"], ["two files of task 'pairs'", "NAME=FILE"]),
    (["--data", "pairs.json", "--general-data", "pairs.json"], ["'pairs' is both general and to be learned"]),
    (["--general-data", "currency=boolq.json"], ["'currency' is a built-in one", "NAME=FILE"]),
    (["--data", "pairs.json", "--eval-data", "boolq.json", "--eval-split", "validation"], ["--eval-data"]),
    (["--data", "one.json", "--eval-data", "pairs.json", "--eval-every", "1"], ["--eval-every needs validation rows"]),
    (["--data", "pairs.json", "--out", "."], ["--out . has no name of its own"]),
    (["--data", "bad.csv"], ["bad.csv:2: 1 columns"]),
    (["--data", "pairs.json", "--template", "chatty"], ["chatty", "alpaca", "llama3"]),
    (["--data", "pairs.json", "--method", "cofitune"], ["--general-data", "make its choice yourself"]),
])
def test_a_mistake_about_data_is_one_clear_line(tmp_path, args, names):
    written(tmp_path / "pairs.json", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(40)])
    written(tmp_path / "boolq.json", [BOOLQ] * 40)
    written(tmp_path / "one.json", [{"prompt": "What?", "answer": "That."}])
    (tmp_path / "bad.csv").write_text("prompt,answer\nonly one\n")
    method = [] if "--method" in args else ["--method", "multilora"]
    message = one_line_error(HERE / "train.py", *method, *args, "--base", BASE, "--steps", "1", cwd=tmp_path)
    assert all(name in message for name in names), message
    assert not list((tmp_path / "out").rglob("*.*")), "a refused run must leave nothing behind"


def test_legal_but_odd_input_works(tmp_path):
    """One row with --eval-data, an empty answer there, prompts of special tokens alone, a batch larger than the data,
    --max-length 2, a folder with spaces, another working directory."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    written(folder / "one.jsonl", [{"prompt": "<s></s>", "completion": "Ho"}])
    written(folder / "test.jsonl", [{"prompt": "Hi", "completion": ""}, {"prompt": "</s>", "completion": "<s>"}])
    common = (HERE / "train.py", "--method", "lora", "--base", BASE, "--data", "one.jsonl", "--steps", "2")
    here(*common, "--eval-data", "one=test.jsonl", "--batch-size", "100", cwd=folder)
    assert json.loads((folder / "out" / "lora" / "results.json").read_text())["tasks"]["one"]["after"] >= 0
    here(*common, "--eval-data", "one=test.jsonl", "--max-length", "2", "--out", "short", cwd=folder)


def test_readmes_commands_lead_from_a_chat_model_and_its_talk_to_a_checkpoint(tmp_path):
    """transformers chats with what is exported, in a template that no list knows. The model is random."""
    fast, folder = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json")), tmp_path / "CHAT-MODEL"
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tiny(vocab_size=fast.get_vocab_size(), max_position_embeddings=256).save_pretrained(folder)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{'<|im_start|>' + message['role'] + ': ' + message['content'] "
                         "+ '<|im_end|>' + '|'}}{% endfor %}{{ '<|im_start|>assistant:' if add_generation_prompt }}"}))
    written(tmp_path / "talk.json", [{"conversations": [
        {"from": "human", "value": f"Name three fruits. {i}"}, {"from": "gpt", "value": "pear"}]} for i in range(40)])
    readme, said = (HERE / "README.md").read_text(encoding="utf-8"), []
    commands = re.findall("^python (.*(?:CHAT-MODEL|out/talk).*)$", readme, re.M)
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', command.replace("300", "8").replace("train.py", str(HERE / "train.py")))
        more = ["--batch-size", "8", "--lr", "1e-2"] if "train.py" in command else []
        said.append(here(*(word.strip('"') for word in words), *more, cwd=tmp_path).stdout)
    assert all("template: the checkpoint's" in text for text in said[:2])
    assert len(said) == 4 and "40 records of format sharegpt" in said[0] and "[<|im_end|>]" in said[0]
    tokenizer = Tokenizer.from_pretrained(tmp_path / "merged")
    end = tokenizer.fast.token_to_id("<|im_end|>")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, end]

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Name three fruits."}], tokenize=True,
                                        add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert new[-1] == end and len(new) < 64, "transformers goes on behind the end of the turn"
    assert theirs.decode(new, skip_special_tokens=True) == said[2].rpartition("\n[")[0]
