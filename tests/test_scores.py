"""Scores: each kind against a naive loop with transformers in batches of any size, intervals, and room for answers."""

import json
import math
import re

import pytest
import torch

import data
import formats
from engine.table import mean_interval, print_table, summary, wilson
from formats.known import FORMATS, generated
from model import Llama
from tests.helpers import BASE, here, written

SUMS = [(a, b) for a, b in zip(range(11, 24), range(41, 80, 3))]
KINDS = {
    "pair": [{"prompt": f"What is {a} + {b}?", "completion": str(a + b + a % 2)} for a, b in SUMS],
    "alpaca": [{"instruction": "Reverse:", "input": f"{a} {b}", "output": f"{b} {a}" * (a % 3 + 1)} for a, b in SUMS],
    "choices": [{"question": f"What is {a} + {b}?", "choices": [str(a), str(a + b), "many"][: 2 + a % 2],
                 "answer": a % 2}
                for a, b in SUMS],
    "adapters": [{"instruction": f"What is {a} + {b}?", "output": "x", "answer": str(a + b + a % 2)} for a, b in SUMS],
    "gsm8k": [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in SUMS],
}


def naive(theirs, tokenizer, kind, examples):
    """The figures of examples, each prompt and answer on its own, by transformers; and what is generated."""
    said, hits, total, count = [], [], 0.0, 0
    for e in examples:
        (prompt, _), (answer, _) = e.texts()
        before = tokenizer.encode(prompt)

        def chances(text, before=before, end=()):
            ids = tokenizer.encode(text, start=False) + list(end)
            with torch.no_grad():
                scores = theirs(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
            return ([row[t].item() for row, t in zip(scores, ids)],
                    [row.argmax().item() == t for row, t in zip(scores, ids)])

        if kind == "choices":
            sums = [sum(chances(choice)[0]) for choice in e.choices]
            hits.append(e.choices[sums.index(max(sums))] == answer)
        elif kind in ("pair", "alpaca"):
            found, right = chances(answer, end=[tokenizer.eos_id])
            hits.append(all(right))
            total, count = total - sum(found), count + len(found)
        else:
            ids = theirs.generate(torch.tensor([before]), max_new_tokens=8, do_sample=False, pad_token_id=0,
                                  eos_token_id=list(tokenizer.stop_ids))[0, len(before) :].tolist()
            said.append(tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]))
            hits.append(re.findall(r"\d+", said[-1])[-1:] == [e.gold] if kind == "adapters" else False)
    return total / count if kind == "alpaca" else 100 * sum(hits) / len(hits), said


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_those_of_a_naive_loop_in_batches_of_any_size(tmp_path, shots):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    files = [str(written(tmp_path / f"{kind}.json", rows)) for kind, rows in KINDS.items()]
    suite = formats.load(files, files, shot_files=files if shots else (), shots=shots, template="short")
    spread = set()
    for kind, examples in suite.tests.items():
        assert len(examples) == len(SUMS) and suite.score[kind] is FORMATS[kind].score
        wanted, said = naive(theirs, tokenizer, kind, examples)
        encoded = data.encode(examples, tokenizer, suite.names)
        for size in (1, 7, 48):
            got = suite.score[kind](model, encoded, tokenizer, size, 8)
            assert next(iter(got.values())) == pytest.approx(wanted, abs=1e-4), (kind, size)
            assert not said or generated(model, encoded, tokenizer, size, 8) == said, (kind, size)
        spread.add(wanted)
    assert shots or len(spread) >= 4, "all alike: the test shows nothing"


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


def test_the_table_says_rows_and_intervals_and_keeps_its_columns(capsys):
    suite = data.Suite([], [], {"a": [0] * 200, "a long name of a task": [0] * 7}, {"a": "new", "a long name of a task":
                       "new"}, {"a": "pair", "a long name of a task": "alpaca"},
                       {"a": data.exact, "a long name of a task": data.loss})
    scores = {"a": {"exact match": 91.5}, "a long name of a task": {"loss": 3.243e4, "perplexity": 2.46e14}}
    results = {"eval_split": "test", "trainable_parameters": 1, "seconds": 1, "peak_memory_bytes": 1,
               **summary(suite, scores, scores)}
    assert [s["rows"] for s in results["tasks"].values()] == [200, 7]
    print_table(results)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("  a "))
    assert row.split() == ["a", "pair", "200", "91.5", "86.8-94.6", "91.5", "86.8-94.6"]
    assert any(line.split()[-4:] == ["loss", "7", "3.243e+04", "3.243e+04"] for line in lines)
    assert any(line.startswith("speciality") and "mean of 1 in %" in line and "86.8-94.6" in line for line in lines)


def test_evaluations_get_folders_of_their_own(tmp_path):
    written(tmp_path / "a.jsonl", KINDS["pair"])
    common = (BASE.parent / "train.py", "--eval-only", "--base", BASE, "--eval-data", "a.jsonl")
    first, again, other = (here(*common, *more, cwd=tmp_path).stdout for more in ((), (), ("--eval-limit", "3")))
    folders = list((tmp_path / "out" / "eval").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("base-") for f in folders)
    assert "results in" in first and "finished: nothing was done" in again and "results in" in other
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert sorted(r["tasks"]["a"]["rows"] for r in results) == [3, len(SUMS)]
