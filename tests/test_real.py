"""Real files, where a checkout has them beside it: a checkpoint, a tokenizer, records, and runs on them."""

import csv
import json

import pytest
import torch

import data
import formats
import train
from formats.known import final_number
from model import Llama
from tests.helpers import REAL, TINY, cli, here, needs_real, random_ids, their_logits

pytestmark = needs_real
KINDS = {"arc_easy": "choices", "openbookqa": "choices", "BoolQ": "boolq", "RTE": "rte", "WiC": "wic", "CB": "cb",
         "gsm8k": "gsm8k", "piqa": "piqa"}


def test_a_real_checkpoint_agrees_with_transformers_and_continues_a_story():
    """Its file has only the head of the tied pair; its tokenizer has no pre-tokenizer."""
    model, tokenizer = Llama.from_pretrained(TINY), data.Tokenizer.from_pretrained(TINY)
    new = model.generate([tokenizer.encode("Once upon a time")], 60, tokenizer.stop_ids)[0]
    assert tokenizer.decode(new).startswith(", a little girl named Lily lived in a small house with her mom, dad, and")
    ids = torch.randint(3, 2048, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), their_logits(TINY, ids), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_real_file_is_recognised_with_all_its_rows():
    wanted = {path: ("alpaca", len(json.loads(path.read_text()))) for path in REAL.glob("alpaca*/*.json")}
    wanted |= {path: (KINDS[path.parent.name], len(path.read_text().splitlines()))
               for path in REAL.glob("**/*.jsonl") if path.parent.name in KINDS}
    for path in REAL.glob("mmlu/*/*.csv"):
        with open(path, newline="") as f:
            wanted[path] = "mmlu", sum(1 for _ in csv.DictReader(f))
    assert len(wanted) == 25 and {kind for kind, _ in wanted.values()} == {"alpaca", "mmlu", *KINDS.values()}
    text = cli("-m", "tools.show", "--base", TINY, *wanted).stdout
    for path, (kind, rows) in wanted.items():
        assert f"{rows:,} records of format {kind} in {path}, scored by" in text
    names = {formats.task_name(path) for path in wanted}
    assert names == {*KINDS, "alpaca_en_demo", "gpt3_alpaca", "college_physics", "elementary_mathematics",
                     "global_facts", "international_law", "us_foreign_policy"}


def test_the_final_numbers_of_real_answers():
    answers = [json.loads(line)["answer"] for line in (REAL / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert len(answers) == 1319
    assert all(float(final_number(a)) == float(a.split("####")[1].replace(",", "")) for a in answers)


@pytest.mark.slow
@pytest.mark.parametrize("method, args", [("multilora", []), ("csreft", []), ("cofitune", ["--layers", "all"])])
def test_every_method_learns_real_instructions_on_a_real_checkpoint(runs, tmp_path, method, args):
    out = runs("--method", method, *args, "--base", TINY, "--data", REAL / "alpaca" / "alpaca_en_demo.json",
               "--template", "alpaca", "--steps", "30", "--batch-size", "8", "--lr", "2e-3", "--eval-limit", "20")
    row = json.loads((out / "results.json").read_text())["tasks"]["alpaca_en_demo"]
    assert row["after"] < row["before"] - 0.1
    if method == "csreft":  # it cannot be merged
        return
    here("-m", "tools.export", out, "--hf", tmp_path / "merged")
    model = train.load_run(out)[0]
    ids = random_ids(model, 2, 40)
    with torch.no_grad():
        wanted, plain = model(ids), Llama.from_pretrained(TINY)(ids)
    torch.testing.assert_close(their_logits(tmp_path / "merged", ids), wanted, atol=1e-4, rtol=0)
    assert (wanted - plain).abs().max() > 1e-2
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "merged")
    ours = data.Tokenizer.from_pretrained(TINY).encode("Once upon a time")
    assert theirs("Once upon a time").input_ids == ours
