"""Examples, the tokenizer, the built-in suite, batches and means: against the files' own rules."""

import json
import math
import random
import re
import statistics
from dataclasses import replace

import pytest
import tokenizers

import data
import train
from base import suite as builtin
from data import Segment
from model import Llama
from tests.helpers import BASE, refused, tokenizer_folder, with_template

# ---------------------------------------------------------------------------------------------- the tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("before, add_bos, adds", [
    ("<s> $A", None, True),
    ("<s> $A", True, True),
    ("<s> $A", False, False),
    (None, None, False),
    (None, True, True),
    (None, False, False),
    ("<s> $A </s>", True, True),
    ("<s> $A </s>", None, True),
    ("$A </s>", None, False),
    ("$A", True, True),
])
def test_bos_is_put_first_as_the_files_say_and_no_eos_last(tmp_path, before, add_bos, adds):
    folder = tokenizer_folder(tmp_path / "x", before, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos, "add_eos_token": False, **NAMES})
    tokenizer, text = data.Tokenizer.from_pretrained(folder), " Reverse:  a b c d\n"
    plain = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == [1] * adds + plain and tokenizer.encode(text, start=False) == plain
    said = Segment(tokenizer.opening), Segment(text, "user")
    assert tokenizer.encode_segments(said)[0] == [1] * adds + plain


@pytest.mark.parametrize("settings, eos, stop, pad", [
    ({"tokenizer_config": {**NAMES, "pad_token": "<pad>"}}, 2, {2}, 0),
    ({"tokenizer_config": {**NAMES, "pad_token": None}}, 2, {2}, 2),
    ({"tokenizer_config": {**NAMES, "pad_token": "[PAD]"}}, 2, {2}, 2),
    ({"tokenizer_config": NAMES, "generation_config": {"eos_token_id": [2, 40, 41]}}, 2, {2, 40, 41}, 2),
    ({"tokenizer_config": {"eos_token": "a"}, "generation_config": {"eos_token_id": [2, 41]}}, "a", {2, 41, "a"}, "a"),
    ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": {"content": "a"}}}, "a", {2, "a"}, "a"),
    ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [41, 40]}}, 40, {40, 41}, 40),
    ({"tokenizer_config": {}}, 2, {2}, 2),
], ids=str)
def test_eos_and_pad_come_from_the_files(tmp_path, settings, eos, stop, pad):
    tokenizer = data.Tokenizer.from_pretrained(tokenizer_folder(tmp_path / "x", **settings))
    number = lambda token: tokenizer.fast.token_to_id(token) if isinstance(token, str) else token
    assert (tokenizer.eos_id, tokenizer.pad_id) == (number(eos), number(pad))
    assert tokenizer.stop_ids == {number(token) for token in stop}


def test_added_tokens_keep_their_ids_whether_special_or_not(tmp_path):
    """As in checkpoints that have words for thinking and for tools among their special tokens."""
    folder = tokenizer_folder(tmp_path / "x", config={"eos_token_id": 2})
    fast, text = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json")), ""
    for i, add in enumerate((fast.add_special_tokens, fast.add_tokens) * 2):
        add([tokenizers.AddedToken(f"<new{i}>", normalized=False)])
        text += f"a<new{i}>"
    fast.save(str(folder / "tokenizer.json"))
    wanted = fast.encode(text, add_special_tokens=False).ids
    assert {512, 513, 514, 515} <= {*wanted}
    assert data.Tokenizer.from_pretrained(folder).encode_segments([Segment(text)])[0] == wanted


def test_broken_tokenizer_files_are_refused_in_one_line(tmp_path):
    load, folder = data.Tokenizer.from_pretrained, tokenizer_folder(tmp_path / "x")
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        for wrong in (b'{"eos_token": ', b"[]", b"", b"\xff\xfe{}"):
            (folder / name).write_bytes(wrong)
            refused(load, folder, name)
        (folder / name).write_bytes(kept)
    load(folder)
    file = folder / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.add_tokens(["<extra>"])  # the vocabulary has 512 entries, as many as the model's embedding
    fast.save(str(file))
    refused(load, folder, "tokenizer.json", "'<extra>' has id 512, expected less than vocab_size 512", "another model")
    for wrong in ("{}", file.read_text()[:5000], '{"model": {"type": "Unigram"}}'):
        file.write_text(wrong)
        refused(load, folder, "tokenizer.json")
    file.rename(folder / "tokenizer.model")
    refused(load, folder, "no tokenizer.json, only tokenizer.model", "save it with")


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config", {"eos_token": 3}, "config"), ("tokenizer_config", {"eos_token": ["x"]}, "config"),
    ("tokenizer_config", {"eos_token": "<end>"}, "eos_token '<end>' is not in the vocabulary"),
    ("tokenizer_config", {"bos_token": "<go>", "eos_token": "</s>"}, "bos_token '<go>' is not in the vocabulary"),
    ("config", {"vocab_size": 600, "eos_token_id": 550}, "eos_token_id is 550, expected the id of a token"),
    ("generation_config", {"eos_token_id": 512}, "512"), ("generation_config", {"eos_token_id": [2, -1]}, ""),
    ("generation_config", {"eos_token_id": "2"}, ""), ("generation_config", {"eos_token_id": [[2]]}, "")])
def test_a_wrong_value_in_a_tokenizers_settings_is_named(tmp_path, name, content, words):
    refused(data.Tokenizer.from_pretrained, tokenizer_folder(tmp_path / "x", **{name: content}), words)


# ---------------------------------------------------------------------------------------------- the built-in suite


@pytest.mark.parametrize("tasks", [pytest.param(builtin.GENERAL, id="general", marks=pytest.mark.slow),
                                   pytest.param(builtin.NEW, id="new")])
def test_splits_share_no_prompt_and_skills_no_operands_and_facts_that_are_tested_were_trained_on(tasks):
    for name, (aspect, _) in tasks.items():
        made = [builtin.generate(name, split) for split in ("train", "validation", "test")]
        prompts, answers = ([{e.segments[i].text for e in examples} for examples in made] for i in (0, -1))
        train, validation, test = prompts
        assert not train & validation and not train & test and not validation & test and len(test) >= 200, name
        assert aspect not in ("knowledge", "facts") or answers[2] <= answers[0], name
        if name == "add":
            numbers = lambda prompts: {tuple(sorted(re.findall(r"\d+", prompt))) for prompt in prompts}
            assert not numbers(train) & numbers(test), "12 + 34 is the same problem as 34 + 12"


def test_a_task_that_is_named_twice_is_learned_once():
    suite = builtin.load("tool, tool")
    assert suite.trained == ["tool"] and len(suite.train) == 2000


def test_the_base_knows_the_general_tasks_and_not_the_new_ones():
    results = json.loads((BASE / "pretraining" / "results.json").read_text())
    assert results["versatility"] >= 97 and all(s["group"] == "general" for s in results["tasks"].values())
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    suite, _, _ = train.load_data(train.Config(method="lora", eval_limit=50), train=False)
    assert suite.tests.keys() == builtin.TASKS.keys() and all(len(tests) == 50 for tests in suite.tests.values())
    scores = data.evaluate(model, suite, tokenizer)
    mean = lambda tasks: statistics.mean(scores[task]["exact match"] for task in tasks)
    assert mean(builtin.GENERAL) >= 97 and mean(builtin.NEW) < 10


# ---------------------------------------------------------------------------------------------- examples and batches


def test_only_the_answer_and_its_eos_are_trained_on():
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    said = [Segment("Say hi.", "user"), Segment("hi", "assistant"), Segment("Again.", "user"),
            Segment("hi hi", "assistant")]
    encoded = data.encode(with_template([data.Example("t", said)]), tokenizer, ["t"])[0]
    trained = [i for i, label in zip(encoded.ids, encoded.labels) if label != -100]
    assert tokenizer.fast.decode(trained, skip_special_tokens=False) == "hi hi</s>"
    assert encoded.ids[0] == tokenizer.bos_id and encoded.ids.count(tokenizer.bos_id) == 1
    assert encoded.labels[: encoded.prompt] == [-100] * encoded.prompt and encoded.labels[encoded.prompt] != -100
    text = data.encode([data.Example("t", [Segment("hi", trained=True)])], tokenizer, ["t"])[0]
    assert text.prompt == 1 and text.labels == [-100, *text.ids[1:]], "nothing predicts the very first token"
    batch = data.collate([encoded, replace(encoded, ids=encoded.ids[:5], labels=encoded.labels[:5], prompt=3)], 0)
    assert batch.ctx.prompt_mask.sum(1).tolist() == [encoded.prompt, 3]
    assert (batch.ids[1, 5:] == 0).all() and (batch.labels[1, 5:] == -100).all()


def test_long_examples_are_cut_to_fit_and_counted():
    make = lambda prompt, answer: data.Encoded([1] + [5] * (prompt - 1) + [7] * answer, [-100] * prompt + [7] * answer,
                                               prompt, 0, gold="x")
    examples = [make(*n) for n in ((5, 3), (30, 3), (4, 30), (30, 30))]
    assert data.fit(examples, 20) == 3
    assert [(e.prompt, len(e.ids)) for e in examples] == [(5, 8), (17, 20), (4, 20), (10, 20)]
    for e in examples:
        assert e.ids[0] == 1 and e.labels == [-100] * e.prompt + [7] * (len(e.ids) - e.prompt)


def test_an_epoch_draws_every_example_once_with_similar_lengths_together():
    examples = [data.Encoded([0] * (5 + i % 60), [0] * (5 + i % 60), 1, i) for i in range(320)]
    draws = data.draw(examples, 10, seed=0)
    epoch = [next(draws) for _ in range(32)]
    assert sorted(e.task for group in epoch for e in group) == list(range(320))
    spread = [max(len(e.ids) for e in g) / min(len(e.ids) for e in g) for g in epoch]
    assert sorted(spread)[len(spread) // 2] <= 1.5 and [e.task for e in epoch[0]] != [e.task for e in epoch[1]]
    assert [e.task for e in next(data.draw(examples, 10, seed=0))] == [e.task for e in epoch[0]]
    buckets = [int(math.log(len(group[0].ids), 1.5)) for group in epoch]
    assert buckets != sorted(buckets), "short groups and long ones come in any order"


# ---------------------------------------------------------------------------------------------- scores


def test_means_are_over_the_tasks_of_a_group_that_are_scored_in_percent():
    group = {"a": "new", "b": "new", "c": "new", "d": "general", "e": "general"}
    suite = data.Suite([], [], {}, group, {}, {"a": data.exact, "b": data.choice, "c": data.loss, "d": data.exact,
                                               "e": data.loss})
    scores = {"a": {"exact match": 10.0}, "b": {"choice": 20.0, "choice, by byte": 90.0}, "c": {"loss": 5.0},
              "d": {"exact match": 40.0}, "e": {"loss": 7.0}}
    assert suite.means(scores) == (15.0, 40.0)
    assert suite.means({task: scores[task] for task in "ace"}) == (10.0, None)


def test_standard_errors_of_the_means_are_those_of_independent_answers():
    """Oracle: the scatter of means over many draws of the examples."""
    rng, hits = random.Random(0), {"a": (0.3, 50), "b": (0.8, 20)}
    suite = data.Suite([], [], {task: [None] * n for task, (_, n) in hits.items()}, dict.fromkeys(hits, "new"), {},
                       dict.fromkeys(hits, data.exact))
    draw = lambda: {task: {"": data.percent([rng.random() < p for _ in range(n)])} for task, (p, n) in hits.items()}
    scatter = statistics.stdev(suite.means(draw())[0] for _ in range(2000))
    assert suite.errors({task: {"": 100 * p} for task, (p, _) in hits.items()}) == (pytest.approx(scatter, rel=0.05), 0)
