"""Everyday questions: as many as promised, each with one right answer among four, in halves that share none."""

import train
from base import suite
from base.common import COMMON, load
from formats.known import example
from tests.helpers import tiny, tokenizer_folder, written

HALVES = [load("validation"), load("test")]
EVERY = [e for half in HALVES for examples in half.values() for e in examples]


def test_questions_differ_and_have_four_choices():
    assert len(EVERY) >= 200 and HALVES == [load("validation"), load("test")]
    assert len({e.segments[0].text for e in EVERY}) == len({e.source for e in EVERY}) == len(EVERY)
    assert {aspect for aspect, *_ in COMMON.values()} == {aspect for aspect, _ in suite.GENERAL.values()}
    assert not COMMON.keys() & suite.TASKS.keys()  # one run may score both
    for e in EVERY:
        assert len(set(e.choices)) == 4 and e.segments == example((e.segments[0].text, e.gold)).segments
    places = [e.choices.index(e.gold) for e in EVERY]
    assert all(30 < places.count(place) < 80 for place in range(4))
    assert {task: len(examples) for task, examples in load(limit=3).items()} == dict.fromkeys(COMMON, 3)


def test_computed_answers():
    """A sum holds, or all steps of a series are equal, for the right choice alone."""
    numbers = lambda text: [int(n) for n in text.replace("+", ",").replace("=", ",").split(",")]
    holds = {"sum": lambda a, b, c: a + b == c, "series": lambda *n: len({b - a for a, b in zip(n, n[1:])}) == 1}
    for e in EVERY:
        if e.task in holds:
            assert [c for c in e.choices if holds[e.task](*numbers(c))] == [e.gold]


def test_a_base_of_another_template_is_asked_these_instead_of_the_invented_tasks(tmp_path):
    folder = tokenizer_folder(tmp_path / "base", tokenizer_config={
        "eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"})
    tiny(vocab_size=512).save_pretrained(folder)
    rows = written(tmp_path / "more.jsonl", [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)])
    command = ("--base", str(folder), "--tasks", "currency", "--eval-limit", "2", "--general-data", str(rows))
    suite, tokenizer, template = train.load_data(train.parse(["--method", "lora", *command])[0])
    assert suite.trained == ["currency"] and set(suite.tests) == {"currency", "more", *COMMON}
    assert {task for task, group in suite.group.items() if group == "new"} == {"currency"}
    text = tokenizer.fast.decode(suite.train[0].ids, skip_special_tokens=False)
    assert template.startswith("{% for") and text.count("</s>") == 2 and "### " not in text
    suite, *_ = train.load_data(train.Config("lora", tasks="currency", eval_limit=2))
    assert "capital" in suite.tests and not COMMON.keys() & suite.tests.keys()
