"""Scores: each kind against a naive loop in batches of any size, intervals, and room for answers."""

import math
import random
from dataclasses import replace

import pytest
import torch

import data
import formats
import train
from engine.table import mean_interval, print_table, summary, wilson
from formats.known import FORMATS, final_number, generated
from model import Llama
from tests.helpers import BASE, greedy_without_cache, perturb, written

SUMS = [(a, b) for a, b in zip(range(9, 24), range(35, 80, 3))]
KINDS = {
    "pair": [{"prompt": f"What is {a} + {b}?", "completion": str(a + b + (a % 5 == 0))} for a, b in SUMS],
    "alpaca": [{"instruction": "Reverse:", "input": f"{a} {b}", "output": f"{b} {a}" * (a % 3 + 1)} for a, b in SUMS],
    "choices": [{"question": f"What is {a} + {b}?", "answer": a // 2 % 2,
                 "choices": ["ä", "öü" * (a % 3 + 1), "of" * (a % 4 + 1)][: 2 + a % 2]} for a, b in SUMS],
    "gsm8k": [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in SUMS],
}


@torch.no_grad()
def naive(model, tokenizer, kind, examples):
    """The figures of examples, each prompt and text on its own; and what is generated."""
    said, hits, losses = [], [], []
    for e in examples:
        before = tokenizer.encode("".join(s.text for s in e.segments if not s.trained).removeprefix("<s>"))

        def chances(text, before=before):
            """The log-probabilities of the tokens of a text behind the prompt, and of an EOS behind it."""
            ids = [*tokenizer.encode(text, start=False), tokenizer.eos_id]
            scores = model(torch.tensor([before + ids]))[0, len(before) - 1 : -1].log_softmax(-1)
            return scores[range(len(ids)), ids].tolist()

        if kind == "choices":
            choices = [*e.choices]
            sums = [sum(chances(choice)[:-1]) for choice in choices]
            rates = [s / len(choice.encode()) for s, choice in zip(sums, choices)]
            hits.append([choices[values.index(max(values))] == e.gold for values in (sums, rates)])
        elif kind == "pair":
            answer = tokenizer.encode(e.gold, start=False)
            hits.append([greedy_without_cache(model, before, len(answer) + 3, tokenizer.stop_ids) == answer])
        elif kind == "alpaca":
            losses += [-chance for chance in chances(e.gold)]
        else:
            said.append(tokenizer.decode(greedy_without_cache(model, before, 8, tokenizer.stop_ids)))
            hits.append([final_number(said[-1]) == final_number(e.gold)])
    loss = sum(losses) / max(1, len(losses))
    return [100 * sum(part) / len(hits) for part in zip(*hits)] or [loss, math.exp(loss)], said


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_those_of_a_naive_loop_in_batches_of_any_size(tmp_path, shots):
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    (tmp_path / "shown").mkdir()
    shown = [str(written(tmp_path / "shown" / f"{kind}.json", rows[:2])) for kind, rows in KINDS.items()]
    files = [str(written(tmp_path / f"{kind}.json", rows[2:])) for kind, rows in KINDS.items()]
    suite = formats.load([], files, shot_files=shown if shots else (), shots=shots)
    suite = formats.dress(suite, formats.choose("short", tokenizer, BASE)[0])
    figures = []
    for kind, examples in suite.tests.items():
        assert len(examples) == len(SUMS) - 2 and suite.score[kind] is FORMATS[kind].score
        wanted, said = naive(model, tokenizer, kind, examples)
        encoded = data.encode(examples, tokenizer, suite.names)
        for size in (1, 7, 48):
            got = suite.score[kind].function(model, encoded, tokenizer, size, 8)
            assert [*got.values()] == pytest.approx(wanted, rel=1e-5), (kind, size)
            assert not said or generated(model, encoded, tokenizer, size, 8) == said, (kind, size)
        figures += wanted
    assert shots or len(set(figures)) == len(figures), "two alike: the test shows nothing"


class Sevens:
    """A model that only says 7."""

    config, device = Llama.from_pretrained(BASE).config, torch.device("cpu")

    def labelled_logits(self, ids, labels, ctx):
        targets = labels.flatten()[ctx.labelled + 1]
        return self.continuation_logits([], [targets], [], []), targets

    def continuation_logits(self, prompts, texts, of, tasks):
        seven = data.Tokenizer.from_pretrained(BASE).encode("7", start=False)[-1]
        return torch.eye(512)[seven].expand(sum(map(len, texts)), -1) * 9


def test_what_was_cut_never_counts_as_a_match(tmp_path):
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    pair = {"prompt": "Q", "completion": "7" * 40 + "9"}
    quiz = {"question": "Q", "choices": ["7" * 40 + "9", "9" * 41], "answer": 0}
    files = [str(written(tmp_path / name, [row])) for name, row in (("pair.json", pair), ("quiz.json", quiz))]
    dressed = formats.dress(formats.load([], files), formats.choose("short", tokenizer, BASE)[0])
    for longest, choice in ((30, 0.0), (512, 100.0)):
        suite = data.encode_suite(dressed, tokenizer, longest)
        assert all(e.cut == (longest == 30) for rows in suite.tests.values() for e in rows)
        found = {task: list(suite.score[task].function(Sevens(), rows, tokenizer, 4, 8).values())
                 for task, rows in suite.tests.items()}
        assert found == {"pair": [0.0], "quiz": [choice] * 2}, "40 of its 42 tokens are 7"


def test_only_the_prompt_of_a_generated_answer_has_to_fit(tmp_path):
    tokenizer, question = data.Tokenizer.from_pretrained(BASE), "The key is 4. " + "x y " * 92
    file = str(written(tmp_path / "a.json", [{"question": question, "answer": "so " * 300 + "#### 4"}]))
    dressed = formats.dress(formats.load([], [file]), formats.choose("plain", tokenizer, BASE)[0])
    one, = data.encode_suite(dressed, tokenizer, 200).tests["a"]
    assert 180 < one.prompt == len(one.ids) <= 200 and tokenizer.decode(one.ids) == question and not one.cut


def test_the_room_for_an_answer_is_the_prompts_own(capsys):
    """Prompts of 10, 1000, 1020 and 1024 tokens in a model of 1024 positions: each as if it were alone."""
    tokenizer, lengths, asked = data.Tokenizer.from_pretrained(BASE), (10, 1000, 1020, 1024, 12), []

    class Talker:
        config, device = Llama.from_pretrained(BASE).config, "cpu"

        def generate(self, prompts, new, stop, tasks):
            asked.append((sorted(map(len, prompts)), new))
            return [tokenizer.encode("7" * min(new, 20), start=False) for _ in prompts]

    examples = [data.Encoded([5] * n, [-100] * n, n, 0, gold="#### 7") for n in lengths]
    texts = generated(Talker(), examples, tokenizer, 8, 64)
    assert [len(text) for text in texts] == [20, 20, 4, 0, 20]
    assert sorted(asked) == [([10, 12], 64), ([1000], 24), ([1020], 4)]
    assert "1 of 5 generated answers were cut at --max-new-tokens 64, or at less for 3 long prompts" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("percent, rows", [(0, 1), (0, 20), (100, 3), (50, 200), (91.5, 200), (10, 10)])
def test_intervals_are_those_that_a_share_could_come_from(percent, rows):
    """Wilson's ends are the shares from which the observed one is just 1.96 standard errors away."""
    low, high = wilson(percent, rows)
    assert 0 <= low <= percent <= high <= 100 and high - low > 0
    for end in (low, high):
        p = end / 100
        if 0 < p < 1:
            assert abs(percent / 100 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / rows))
    assert mean_interval([(percent, rows)]) == pytest.approx((low, high))
    four = mean_interval([(percent, rows)] * 4)
    assert four == pytest.approx((percent - (percent - low) / 2, percent + (high - percent) / 2))


def test_the_table_says_rows_and_intervals(capsys):
    long = "a long name of a task"
    suite = data.Suite([], [], {"a": [0] * 200, long: [0] * 7}, {"a": "new", long: "new"},
                       {"a": "pair", long: "alpaca"}, {"a": data.exact, long: data.loss})
    scores = {"a": {"exact match": 91.5}, long: {"loss": 3.243e4, "perplexity": 2.46e14}}
    results = {"eval_split": "test", "trainable_parameters": 1, "seconds": 1, "peak_memory_bytes": 1,
               **summary(suite, scores, scores)}
    assert [s["rows"] for s in results["tasks"].values()] == [200, 7] and results["speciality"] == 91.5
    print_table(results)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("  a "))
    assert row.split() == ["a", "pair", "200", "91.5", "86.8-94.6", "91.5", "86.8-94.6"]
    assert any(line.split()[-3:] == ["7", "3.243e+04", "3.243e+04"] for line in lines)
    assert any(line.startswith("speciality") and "mean of 1 in %" in line and "86.8-94.6" in line for line in lines)


@pytest.mark.parametrize("name, flags", [
    ("multilora", {}), ("csreft", {}), ("csreft", {"positions": "f2+l2"}), ("loreft", {"layers": "3,5"}),
    ("csreft", {"route_on": "first_token", "ortho": "separate"})])
def test_choices_behind_a_question_that_is_read_once_have_the_same_scores(name, flags):
    """Oracle: each choice in a pass of its own. One choice of each question has a longer prompt."""
    model = Llama.from_pretrained(BASE)
    method, config = train.method_of(name)
    perturb(method.attach(model, replace(config, **flags)).model)
    make = lambda rng, prompt, n: data.Encoded((ids := prompt + rng.choices(range(3, 512), k=n)), [-100] * len(prompt)
                                               + ids[len(prompt) :], len(prompt), 0)
    rng, examples = random.Random(0), []
    for _ in range(7):
        prompt = [1, *rng.choices(range(3, 512), k=rng.randint(1, 20))]
        choices = [make(rng, prompt, rng.randint(1, 9)) for _ in range(3)] + [make(rng, prompt + [5], 2)]
        examples.append(replace(choices[0], choices=choices))
    wanted = [[data.answer_scores(model, [c], 0, 1)[0][0] for c in e.choices] for e in examples]
    for size in (1, 12, 48):
        for got, expected in zip(data.choice_scores(model, examples, size), wanted):
            assert got == pytest.approx(expected, abs=1e-4)
