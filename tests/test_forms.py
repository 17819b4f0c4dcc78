"""Files as people have them: each is recognised, its fields are used or named, and what is wrong is named by line."""

import gzip
import json

import pytest

from formats import read_files
from formats.known import final_number, stated
from model import UserError
from tests.helpers import CLAIM, COPA, PASSAGE, QUIZ, WORD, written

SAID = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
FROM = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
WSC = {"text": "Mark told Pete many lies, and he left.", "label": False,
       "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 6, "span2_text": "he"}}
ARC = {"id": "x", "question": "2 + 2?", "choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}}
LISTED = "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
NESTED = {"idx": 3, "passage": {"text": "Ice floats.", "questions": [
    {"question": "What floats?", "idx": 0, "answers": [{"text": "ice", "label": 1, "idx": 0},
                                                       {"text": "lead", "label": 0, "idx": 1}]}]}}

# record, format, its texts in order, what the answers are ranked among, and the fields that are named as ignored
FORMS = {
    "messages": ({"messages": SAID}, "chat", ["Q", "A"], None, ""),
    "messages, system in front": ({"messages": [{"role": "system", "content": "S"}, *SAID]}, "chat", "SQA", None, ""),
    "messages, system beside": ({"system": "S", "messages": SAID}, "chat", "SQA", None, ""),
    "messages of more": ({"messages": [{**m, "weight": 1} for m in SAID], "prompt_id": "p", "prompt": "Q"}, "chat",
                         "QA", None, "messages.weight, prompt_id, prompt"),
    "messages named as ShareGPT's": ({"messages": FROM}, "chat", "QA", None, ""),
    "ShareGPT": ({"id": "1", "conversations": FROM * 2}, "sharegpt", "QAQA", None, "id"),
    "ShareGPT, system": ({"conversations": [{"from": "system", "value": "S"}, *FROM]}, "sharegpt", "SQA", None, ""),
    "ShareGPT, LLaMA-Factory": ({"conversations": FROM, "system": "S", "tools": "[]"}, "sharegpt", "SQA", None,
                                "tools"),
    "ShareGPT named as messages": ({"conversations": SAID}, "sharegpt", "QA", None, ""),
    "Alpaca": ({"instruction": "Q", "input": "I", "output": "A"}, "alpaca", "QIA", None, ""),
    "Alpaca, null input": ({"instruction": "Q", "input": None, "output": "A", "text": "..."}, "alpaca", "QA", None,
                           "text"),
    "Alpaca, LLaMA-Factory": ({"instruction": "Q", "input": "I", "output": "A", "system": "S",
                               "history": [["R", "B"], ["T", ""]]}, "alpaca", ["S", "R", "B", "T", "", "Q", "I", "A"],
                              None, ""),
    "Alpaca, empty history": ({"instruction": "Q", "output": "A", "history": [], "system": None}, "alpaca", "QA", None,
                              ""),
    "Dolly": ({"instruction": "Q", "context": "I", "response": "A", "category": "c"}, "alpaca", "QIA", None,
              "category"),
    "AlpacaEval": ({"dataset": "d", "instruction": "Q", "output": "A", "generator": "g"}, "alpaca", "QA", None,
                   "dataset, generator"),
    "prompt, completion": ({"prompt": "Q", "completion": "A"}, "pair", "QA", None, ""),
    "query, response": ({"query": "Q", "response": "A", "type": "t", "original_question": "q"}, "pair", "QA", None,
                        "type, original_question"),
    "input, output": ({"input": "Q", "output": "A"}, "pair", "QA", None, ""),
    "prompt, input, output": ({"prompt": "Q", "input": "I", "output": "A"}, "pair", "QIA", None, ""),
    "OpenOrca": ({"id": "x", "system_prompt": "S", "question": "Q", "response": "A"}, "pair", "SQA", None, "id"),
    "ChatGLM": ({"prompt": "Q", "response": "A", "history": [["R", "B"]]}, "pair", "RBQA", None, ""),
    "DPO, texts": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "dpo", "QA", None, "rejected"),
    "DPO, Orca": ({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}, "dpo", "SQA", None, "rejected"),
    "DPO, messages": ({"chosen": SAID, "rejected": SAID, "score_chosen": 1.0}, "dpo", "QA", None,
                      "rejected, score_chosen"),
    "DPO, UltraFeedback": ({"prompt": "Q", "chosen": SAID, "rejected": SAID}, "dpo", "QA", None, "prompt, rejected"),
    "DPO, messages apart": ({"prompt": SAID[:1], "chosen": SAID[1:], "rejected": SAID[1:]}, "dpo", "QA", None,
                            "rejected"),
    "DPO, LLaMA-Factory": ({"conversations": FROM[:1], "chosen": FROM[1], "rejected": FROM[1]}, "dpo", "QA", None,
                           "rejected"),
    "DPO, Alpaca": ({"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}, "dpo", "QIA", None, "rejected"),
    "GSM8K": ({"question": "Q", "answer": "so\n#### 7"}, "gsm8k", ["Q", "so\n#### 7"], None, ""),
    "LLM-Adapters, words": ({"instruction": "Q", "input": "", "output": "the correct answer is true",
                             "answer": "true"}, "adapters", ["Q", "the correct answer is true"], None, ""),
    "LLM-Adapters, numbers": ({"instruction": "Q", "input": "", "output": "It is 7.", "answer": 7.0}, "adapters",
                              ["Q", "It is 7."], None, ""),
    "MMLU, Hugging Face": ({"question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5"], "answer": 1},
                           "choices", [LISTED, "B"], "ABC", "subject"),
    "MMLU, letters": ({"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "B"}, "choices", [LISTED, "B"],
                      "ABC", ""),
    "ARC, Hugging Face": ({**ARC, "answerKey": "B"}, "choices", [LISTED, "B"], "ABC", "id"),
    "ARC, numbered": ({**ARC, "choices": {"text": ["3", "4", "5"], "label": ["1", "2", "3"]}, "answerKey": "2"},
                      "choices", [LISTED, "B"], "ABC", "id"),
    "ARC, its own files": ({"id": "x", "answerKey": "B", "question": {"stem": "2 + 2?", "choices": [
        {"text": t, "label": n} for t, n in zip("345", "ABC")]}}, "choices", [LISTED, "B"], "ABC", "id"),
    "OpenBookQA": ({"question_stem": "2 + 2?", "choices": ARC["choices"], "answerKey": "B", "fact1": "f"}, "choices",
                   [LISTED, "B"], "ABC", "fact1"),
    "MMLU, CSV's columns": ({**QUIZ, "answer": "1"}, "mmlu", ["2 + 2?\nA. 3\nB. 4\nC. 5, or 6\nD. 7\nAnswer:", "B"],
                            "ABCD", ""),
    "BoolQ": ({**PASSAGE, "label": True, "idx": 1}, "boolq", ["Ice floats.\nQuestion: does ice float?\nAnswer:", "yes"],
              ["yes", "no"], "idx"),
    "BoolQ, Hugging Face": ({**PASSAGE, "answer": False}, "boolq", [
        "Ice floats.\nQuestion: does ice float?\nAnswer:", "no"], ["yes", "no"], ""),
    "RTE": ({**CLAIM, "label": "entailment"}, "rte", [
        "It rains.\nQuestion: It is wet. True or False?\nAnswer:", "True"], ["True", "False"], ""),
    "CB": ({**CLAIM, "label": "neutral"}, "cb", [
        "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:", "Neither"], ["True", "False", "Neither"],
        ""),
    "WiC": ({**WORD, "label": True, "start1": 2}, "wic", [
        "A river bank.\nA bank of fog.\nQuestion: Is the word 'bank' used in the same sense in both sentences?\n"
        "Answer:", "yes"], ["yes", "no"], "start1"),
    "COPA": ({**COPA, "idx": 0}, "copa", ["He fell because", "he slipped."], ["he slipped.", "he sang."], "idx"),
    "WSC": (WSC, "wsc", ["Mark told Pete many lies, and *he* left.\nQuestion: Does '*he*' refer to 'Mark'?\nAnswer:",
                         "no"], ["yes", "no"], "target.span1_index"),
    "MultiRC": (NESTED, "multirc", ["Ice floats.\nQuestion: What floats?\nIs 'ice' a right answer?\nAnswer:", "yes"],
                ["yes", "no"], "idx, passage.questions.idx, passage.questions.answers.idx"),
    "MultiRC, flat": ({"paragraph": "Ice floats.", "question": "What floats?", "answer": "lead", "label": 0},
                      "multirc", ["Ice floats.\nQuestion: What floats?\nIs 'lead' a right answer?\nAnswer:", "no"],
                      ["yes", "no"], ""),
    "text": ({"text": "Once", "meta": {"source": "s"}}, "text", ["Once"], None, "meta"),
}


def test_each_form_is_recognised_and_each_field_used_or_named(tmp_path, capsys):
    assert len(FORMS) >= 40
    for number, (form, (record, kind, texts, choices, ignored)) in enumerate(FORMS.items()):
        file = written(tmp_path / f"{number}.data", [record, record], ("array", "lines")[number % 2])
        found, rows = read_files([str(file)])[str(number)]
        said = capsys.readouterr().out
        assert (found, [s.text for s in rows[0].segments]) == (kind, list(texts)), form
        assert rows[0].choices == (choices and list(choices)), form
        assert said.strip().partition("; ignored: ")[2] == ignored, form
        for field in record:
            file = written(tmp_path / f"{number}.data", [record, {**record, field: {"x": 1}}])
            if field in ignored.split(", "):
                read_files([str(file)])
            else:
                with pytest.raises(UserError, match=f"{number}.data"):
                    read_files([str(file)])
            capsys.readouterr()


@pytest.mark.parametrize("record, field", [
    ({"text": "Great!", "label": 1}, "label"), ({"text": "Great!", "target": "x"}, "target"),
    ({"prompt": "Q", "completion": "A", "label": True}, "label"),
    ({"instruction": "Q", "output": "A", "conversation": [["Q", "A"]]}, "conversation"),
    ({"question": "Q", "answer": "#### 7", "history": [["a", "b"]]}, "history"),
    ({"messages": SAID, "label": 1}, "label"), ({"prompt": "Q", "response": "A", "output": "B", "answer": "C"},
                                                "answer"), ({**PASSAGE, "label": True, "system": "S"}, "system")])
def test_a_label_or_conversation_that_is_not_read_is_refused(tmp_path, capsys, record, field):
    file = str(written(tmp_path / "a.jsonl", [record]))
    with pytest.raises(UserError, match="a.jsonl.*" + field):
        read_files([file])
    read_files([file], ignore=[field])
    assert f"ignored: {field}" in capsys.readouterr().out.replace("output, ", "")


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize("content, place, message", [
    (f"[{GOOD}]\n[{GOOD}]", ":2", "text behind the array: '[{"), (f"[{GOOD}] x", ":1", "text behind the array: 'x'"),
    (f"[{GOOD}\n{GOOD}]", ":2", "expected a comma or ]"), (f"[{GOOD},\n,{GOOD}]", ":2", "expected a record, found ',{"),
    (f"[{GOOD},\n]", ":2", "expected a record, found ']'"), (f"[{GOOD},", ":1", "found 'the end of the file'"),
    (f"[[{GOOD}]", ":1", "found 'the end of the file'"), (f"[{GOOD}]]", ":1", "text behind the array: ']'"),
    ("{\n" + GOOD[1:], "", "line 1: not valid JSON (expected a whole object in each line"),
    ("prompt,answer,prompt\na,b,c\n", ":1", "the header names the column 'prompt' twice"),
    ('prompt,answer\na,"b\n', ":2", "not valid CSV"),
])
def test_a_file_that_is_not_whole_is_refused_by_line(tmp_path, content, place, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_files([str(tmp_path / "a.json")], skip_bad=True)
    assert f"a.json{place}" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("row, message", [
    ('{"prompt": "a", "completion": "b", "prompt": "c"}', "the key 'prompt' stands twice"),
    ('{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 2}}', "the key 'y' stands twice"),
    ('{"prompt": "a\\ud800", "completion": "b"}', "half of a surrogate pair"),
    ('{"prompt": "a", "completion": "b", "input": 7}', "'input' is 7, expected text"),
    ('{"prompt": "a", "completion": "b", "system": ["x"]}', r"'system' is \['x'\]"),
    ('{"prompt": "a", "completion": "b", "history": [["x"]]}', "expected a list of"),
    ('{"prompt": "a", "completion": "b", "history": [["x", 7]]}', "'history' is 7"),
    ("7", "no object"), ("null", "no object")])
@pytest.mark.parametrize("form", ["{}\n{}", "[{},\n{}]", "[[{},\n{}]]"])
def test_a_bad_row_is_named_or_counted_whatever_the_file(tmp_path, capsys, row, message, form):
    if form == "{}\n{}" and not row.startswith("{"):
        row = GOOD.replace("a", "c") + "\n" + row
    (tmp_path / "a.json").write_text(form.format(GOOD, row))
    with pytest.raises(UserError, match=r"a.json:\d: .*" + message):
        read_files([str(tmp_path / "a.json")])
    read_files([str(tmp_path / "a.json")], skip_bad=True)
    assert "1 bad rows skipped, the first in line" in capsys.readouterr().out


def test_packed_files_nested_arrays_and_utf_16_are_read(tmp_path):
    rows = [{"prompt": f"é{i}", "completion": "北京"} for i in range(4)]
    wanted = [[s.text for s in e.segments] for e in read_files([str(written(tmp_path / "w.json", rows))])["w"][1]]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, raw in {"a.json.gz": gzip.compress(lines.encode()), "a.json": lines.encode("utf-16"),
                      "a.jsonl": b"\xfe\xff" + lines.encode("utf-16-be"), "a.txt": b"\xef\xbb\xbf" + lines.encode(),
                      "a.data": json.dumps([rows[:1], [rows[1:3], []], rows[3]]).encode(),
                      "a.csv": "prompt,completion\n".encode("utf-16") + "".join(
                          f"{r['prompt']},{r['completion']}\n" for r in rows).encode("utf-16-le")}.items():
        (tmp_path / name).write_bytes(raw)
        (task, (kind, found)), = read_files([str(tmp_path / name)]).items()
        assert (task, kind) == ("a", "pair") and [[s.text for s in e.segments] for e in found] == wanted, name
    for raw, message in ((b"PAR1\x15\x04", "is Parquet, expected JSON or CSV"), (b"\x1f\x8b\x08torn", "cannot be read"),
                         (gzip.compress(lines.encode())[:-9], "cannot be read"), (b"\xff\xfe\x00\xd8", "cannot be")):
        (tmp_path / "a.json").write_bytes(raw)
        with pytest.raises(UserError, match=f"a.json {message}"):
            read_files([str(tmp_path / "a.json")])


@pytest.mark.parametrize("text, gold, right", [
    ("the correct answer is true", "true", True), ("false, not true", "true", False), ("True", "true", False),
    ("solution2", "solution2", True), ("answer3 rather than answer1", "answer1", False), ("none", "answer1", False),
    ("so 3 + 4 = 7", "7.0", True), ("1,234.0005 in all", "1234", True), ("7 and then 8", "7", False), ("", "7", False),
    ("An answer: C", "C", False), ("it is C", "C", True), ("-3.", "-3", True)])
def test_a_stated_answer_is_found_as_llm_adapters_finds_it(text, gold, right):
    """The first word of the answer's kind, a letter in any word among them; the last number, within 0.001."""
    assert stated(text, gold) is right


def test_final_numbers_do_not_depend_on_what_follows():
    assert final_number("#### 7\n\nQ: more") == "7"
