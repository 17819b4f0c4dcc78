"""Real files, where a checkout has them beside it: a checkpoint, a tokenizer, records, and runs on them."""

import csv
import json
import math

import pytest
import tokenizers
import torch

import data
import formats
import train
from data import Segment
from formats.known import example, final_number
from model import Llama
from tests.helpers import (
    BASE, REAL, TINY, cli, here, needs_real, number_by_hand, random_ids, their_logits, with_template, written)

pytestmark = needs_real
KINDS = {"arc_easy": "choices", "openbookqa": "choices", "BoolQ": "boolq", "RTE": "rte", "WiC": "wic", "CB": "cb",
         "gsm8k": "gsm8k", "piqa": "piqa"}


# A real checkpoint, in whose file only the head of the tied pair is, and a tokenizer without a pre-tokenizer.
def test_a_real_checkpoint_agrees_with_transformers():
    ids = torch.randint(3, 2048, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Llama.from_pretrained(TINY)(ids)
    torch.testing.assert_close(ours, their_logits(TINY, ids), atol=1e-4, rtol=0)


def test_a_real_checkpoint_continues_a_story():
    model, tokenizer = Llama.from_pretrained(TINY), data.Tokenizer.from_pretrained(TINY)
    new = model.generate([tokenizer.encode("Once upon a time")], 60, tokenizer.stop_ids)[0]
    assert tokenizer.decode(new).startswith(", a little girl named Lily lived in a small house with her mom, dad, and")


def test_a_real_tokenizer_gives_the_ids_of_its_files_and_no_space_between_prompt_and_answer():
    """Llama 2's kind of tokenizer puts a space before any text: prompt and answer apart must spell the text in one
    piece."""
    tokenizer, fast = data.Tokenizer.from_pretrained(TINY), tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for text in ("Once upon a time", "", " two  spaces", "Lily's mom said:\n\"No!\"", "élan 北京", "3.14 x 42"):
        assert tokenizer.encode(text) == [1, *fast.encode(text, add_special_tokens=False).ids], text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 0, {2})
    spelled = lambda ids: "".join(tokenizer.fast.id_to_token(i) for i in ids)
    for prompt, answer in (("Once upon", " a time there was"), ("She said", ', "Hello!"'), ("Tom", "'s dog ran.")):
        said = Segment(tokenizer.opening), Segment(prompt, "user"), Segment(answer, "assistant", trained=True)
        apart = tokenizer.encode_segments(said)[0]
        assert spelled(apart) == spelled(tokenizer.encode(prompt + answer))
        assert spelled(tokenizer.encode(prompt) + tokenizer.fast.encode(answer).ids[1:]) != spelled(apart)


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
    assert all(final_number(a) == number_by_hand(a) != None for a in answers)  # noqa: E711
    assert all(float(final_number(a)) == float(a.split("####")[1].replace(",", "")) for a in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("piqa/validation", "piqa"), ("arc_easy/test", "choices"),
                                        ("openbookqa/test", "choices")])
@torch.no_grad()
def test_published_choices_are_ranked_as_a_naive_loop_does(tmp_path, name, kind):
    """Row by row, by text, by byte and by letter, with transformers, from the published fields."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokens = lambda text: fast(text).input_ids
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    fast = transformers.AutoTokenizer.from_pretrained(BASE)
    records = [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text().splitlines()[:20]]
    file = str(written(tmp_path / "a.jsonl", records))
    for choices in ("text", "letter"):
        found, rows = formats.read_files([file], choices)["a"]
        encoded = data.encode(with_template(rows, "plain", tokenizer), tokenizer, ["a"])
        assert found == kind and len(encoded) == 20
        for record, e in zip(records, encoded):
            asked = record.get("goal") or record.get("question") or record["question_stem"]
            texts = [record["sol1"], record["sol2"]] if kind == "piqa" else record["choices"]["text"]
            right = record["label"] if kind == "piqa" else record["choices"]["label"].index(record["answerKey"])
            prompt = f"Question: {asked}\nAnswer:"
            if choices == "letter":
                listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", texts))
                prompt, texts = f"{asked}\n{listed}\nAnswer:", list("ABCDE"[: len(texts)])
            sums, start = [], len(tokens(prompt))
            for text in texts:
                ids = torch.tensor([tokens(f"{prompt} {text}")])
                chances = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                sums.append(chances[start - 1 :].sum().item())
            rates = [s / len(text.encode()) for s, text in zip(sums, texts)]
            (ours,) = data.choice_scores(model, [e], 3)
            assert ours == pytest.approx(sums, rel=1e-4)
            got = data.choice.function(model, [e], tokenizer, 2, 0)
            assert list(got.values()) == [100.0 * (v.index(max(v)) == right) for v in (sums, rates)]


@pytest.mark.slow
@pytest.mark.parametrize("method, args", [("multilora", []), ("csreft", []), ("cofitune", ["--layers", "all"])])
def test_every_method_learns_real_instructions_on_a_real_checkpoint(runs, tmp_path, method, args):
    """The held-out loss falls, the saved run scores the same again, and what is exported has the same logits."""
    out = runs("--method", method, *args, "--base", TINY, "--data", REAL / "alpaca" / "alpaca_en_demo.json",
               "--template", "alpaca", "--steps", "30", "--batch-size", "8", "--lr", "2e-3", "--eval-limit", "20")
    results = json.loads((out / "results.json").read_text())
    row = results["tasks"]["alpaca_en_demo"]
    assert row["after"] < row["before"] - 0.1 and results["speciality"] is None
    assert row["figures"]["perplexity"][1] == pytest.approx(math.exp(row["after"]))
    here("-m", "tools.score", out, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())["tasks"]["alpaca_en_demo"]
    assert (again["after"], again["rows"]) == (pytest.approx(row["after"], abs=1e-5), 20)

    if method == "csreft":  # it cannot be merged
        return
    transformers = pytest.importorskip("transformers")
    here("-m", "tools.export", out, "--hf", tmp_path / "merged")
    model = train.load_run(out)[0]
    ids = random_ids(model, 2, 40)
    with torch.no_grad():
        wanted, plain = model(ids), Llama.from_pretrained(TINY)(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-4, rtol=0)
    assert (wanted - plain).abs().max() > 1e-2
    ours = data.Tokenizer.from_pretrained(TINY).encode("Once upon a time")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("Once upon a time").input_ids == ours


@pytest.mark.slow
def test_a_mixture_of_real_tasks_trains_and_is_scored(runs):
    files = REAL / "superglue/BoolQ/val.jsonl", REAL / "superglue/RTE/val.jsonl", REAL / "gsm8k/train-first-3000.jsonl"
    out = runs("--method", "multilora", "--base", TINY, "--data", *files, "--mix", "equal", "--steps", "4",
               "--batch-size", "8", "--eval-limit", "8", "--max-new-tokens", "48")
    results = json.loads((out / "results.json").read_text())
    assert {task: (row["score"], list(row["figures"])) for task, row in results["tasks"].items()} == {
        "BoolQ": ("choice", ["choice", "choice, by byte"]), "RTE": ("choice", ["choice", "choice, by byte"]),
        "gsm8k": ("gsm8k", ["final answer"])}
    assert results["speciality"] == pytest.approx(sum(row["after"] for row in results["tasks"].values()) / 3)


@pytest.mark.slow
def test_model_outputs_are_alpaca_evals(tmp_path):
    source = REAL / "alpaca_eval" / "gpt3_alpaca.json"
    here("-m", "tools.chat", TINY, "--prompts", source, "--template", "alpaca", "--max-new-tokens", "6",
         "--generator", "tiny", "--outputs", tmp_path / "model_outputs.json")
    outputs, wanted = (json.loads(f.read_text()) for f in (tmp_path / "model_outputs.json", source))
    assert [(o["dataset"], o["instruction"]) for o in outputs] == [(w["dataset"], w["instruction"]) for w in wanted]
    assert len(outputs) == 805 and {tuple(o) for o in outputs} == {("dataset", "instruction", "output", "generator")}
    assert {o["generator"] for o in outputs} == {"tiny"} and len({o["output"] for o in outputs}) > 100
    tokenizer, model = data.Tokenizer.from_pretrained(TINY), Llama.from_pretrained(TINY)
    one, = with_template([example((wanted[3]["instruction"], ""))], "alpaca", tokenizer, TINY)
    prompt = tokenizer.encode_segments([s for s in one.segments if not s.trained])[0]
    assert outputs[3]["output"] == tokenizer.decode(model.generate([prompt], 6, tokenizer.stop_ids)[0]).strip()
