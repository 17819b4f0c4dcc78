"""The command line and runs: flags, methods, mistakes, what a run leaves, a search, and scoring alone."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import train
from engine import flags
from formats.known import FORMATS
from model import Adapter, Llama, UserError
from tests.helpers import (
    BASE, HERE, QUICK, REAL, cli, here, json_lines, needs_real, one_line_error, tiny, tokenizer_folder, written)

# ---------------------------------------------------------------------------------------------- flags


def test_every_field_of_a_settings_dataclass_is_a_flag():
    config, own = train.parse(["--method", "lora", "--rank", "7", "--lr", "1e-3", "--scaling", "scalar", "--data", "a",
                               "b", "--compile", "--no-overwrite"])
    assert config == train.Config(method="lora", lr=1e-3, data=["a", "b"], compile=True)
    assert own == replace(train.method_of("lora")[1], rank=7, scaling="scalar")
    for name, fine, wrong, interval in (("rank", [1, 10**9], [0, -1], "[1, inf)"), (
            "dropout", [0, 0.999], [1, -1e-9, math.nan], "[0, 1)"), ("alpha", [1e-30], [0.0, math.inf], "(0, inf)")):
        for value in fine:
            flags.check(replace(own, **{name: value}))
        for value in wrong:
            with pytest.raises(UserError, match=re.escape(f"--{name} is {value}, expected a number in {interval}")):
                flags.check(replace(own, **{name: value}))


@pytest.mark.parametrize("args, names", [
    (["--method", "multilora", "--rnak", "3"], ["--rnak", "--help lists"]),
    (["--method", "multilora", "--ran", "3"], ["--ran"]),  # no abbreviations: a new flag would change their meaning
    (["--method", "multilora", "--rank", "7.5"], ["--rank", "7.5"]),
    (["--method", "multilora", "--rank", "0", "--steps", "3"], ["--rank is 0, expected a number in [1, inf)"]),
    (["--method", "multilora", "--lr", "nan"], ["--lr is nan"]),
    (["--method", "multilora", "--targets", "q_prj"], ["'q_prj' matches no linear layer", "q_proj", "down_proj"]),
    (["--method", "multilora", "--scaling", "matrix"], ["vector", "scalar"]),
    (["--method", "multilora", "--base", "nowhere"], ["nowhere"]),
    (["--method", "multilora", "--tasks", "currency,juggling"], ["'juggling'", "currency", "cipher"]),
    (["--method", "multilora", "--device", "abacus"], ["abacus"]),
    (["--method", "multilora", "--shard"], ["--shard", "torchrun"]),
    (["--method", "csreft", "--rank", "40"], ["--rank 40", "128"]),
    (["--method", "csreft", "--layers", "3,8"], ["layers '3,8'", "0 to 7"]),
    (["--method", "csreft", "--positions", "x5"], ["--positions 'x5'", "f5+l5"]),
    (["--method", "cofitune", "--layers", "90%-10%"], ["90%-10%"]),
    (["--method", "cofitune", "--layers", "49%-51%"], ["49%-51%", "0 to 7"]),
    (["--method", "cofitune", "--layers", "all", "--modules", "up_prj"], ["'up_prj'", "up_proj"]),
    (["--method", "sft", "--mask-on", "update"], ["--mask-on none"]),
    (["--method", "sft", "--shares", "0.5,all"], ["--shares '0.5,all'", "0.25,0.5"]),
    (["--method", "dreamlora"], ["'dreamlora'", "multilora", "lora"]),
    (["--steps", "5"], ["--method", "multilora"]),
    (["--method", "lora", "--steps", "3", "--epochs", "1"], ["one of --steps and --epochs"]),
    (["--method", "lora", "--steps", "600", "--epochs", "1"], ["one of --steps and --epochs"]),
    (["--method"], ["--method: expected one argument"]),
    (["--method", "csreft", "--positions", "f²"], ["--positions 'f²'"]),
    (["--method", "sft", "--shares", "0.5,nan"], ["--shares '0.5,nan'", "such as"]),
    (["--method", "lora", "--device", "hpu"], ["--device hpu cannot be used"]),
    *((["--method", "multilora", *args], []) for args in (
        ["--device", "meta"], ["--device", ""], ["--device", "cpu:x"], ["--seed", "-1"], ["--seed", "1" * 30],
        ["--seed", "x\ny"], ["--lr", "inf"], ["--lr", "0"], ["--warmup", "1"], ["--clip", "-1"], ["--steps", "1e3"],
        ["--batch-size", "0"], ["--eval-limit", "-3"], ["--max-length", "1"], ["--tasks", ""], ["--dtype", "int8"],
        ["--weight-decay", "-0.1"], ["--save-every", "-1"], ["--max-new-tokens", "0"], ["--tasks", "currency,,tool"],
        ["--tasks", "x" * 5000], ["--" + "x" * 5000], ["--targets", "a\nb"], ["--base", ""], ["--base", "/dev/null"],
        ["--dropout", "1"], ["--alpha", "0"], ["extra"], ["--data"], ["--rank", "9" * 19], ["--modules", "1" * 30],
        ["--rank", "1000000000", "--modules", "1000000000"], ["--steps", "9" * 20])),
], ids=lambda value: " ".join(value)[:30])
def test_a_mistake_is_one_clear_line(tmp_path, args, names):
    short = [word for flag, value in (("--steps", "1"), ("--tasks", "currency")) if flag not in args
             for word in (flag, value)]
    message = one_line_error("train.py", *args, *short, "--out", tmp_path / "out")
    assert all(name in message for name in names) and len(message) <= 300, message
    assert not list(tmp_path.iterdir()), "a refused run must leave nothing behind"


def test_help_shows_a_methods_own_flags_and_defaults():
    text = here("train.py", "--method", "lora", "--help").stdout
    for expected in ("--grad-accum", "--eval-split", "--modules", "--scaling", "(12)", "--method lora",
                     "width 128: 0.004"):
        assert expected in text, expected
    assert "--modules" in here("train.py", "--help").stdout


# ---------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", train.find_methods())
def test_a_methods_defaults_reach_a_config_however_it_is_made(name):
    own = {**train.STANDARD, **getattr(train.method_of(name)[0], "DEFAULTS", {}).get(name, {})}
    lr, steps, batch_size = (own[key] for key in ("lr", "steps", "batch_size"))
    for config in (train.Config(method=name), train.parse(["--method", name])[0], replace(train.Config(method=name))):
        assert (config.steps, config.batch_size, train.with_rate(config).lr) == (steps, batch_size, lr)
    asked = train.Config(method=name, lr=1.0, steps=3)
    assert (asked.lr, asked.steps, asked.batch_size) == (1.0, 3, batch_size)
    assert train.parse(["--method", name, "--batch-size", "7"])[0] == train.Config(method=name, batch_size=7)
    assert train.Config(name, Path("base")) == train.Config(name, "base")


def test_the_default_rate_falls_with_the_bases_width_and_one_that_is_too_high_is_named(tmp_path, capsys):
    tiny(vocab_size=512, hidden_size=512).save_pretrained(tokenizer_folder(tmp_path / "base"))
    of = lambda method="lora", **settings: train.with_rate(
        train.Config(method, base=str(tmp_path / "base"), **settings)).lr
    assert of(method="sft") == 1e-3 * 128 / 512 and of() == 4e-3 * (128 / 512) ** 0.5 and of(lr=4e-3) == 4e-3
    assert "--lr 0.00025: 0.001, the default at width 128, times (128 / 512)^1" in capsys.readouterr().out
    run = lambda lr: here("train.py", *QUICK, "--method", "sft", "--steps", "20", "--lr", lr, "--out", tmp_path / lr)
    assert "the loss rose" not in run("1e-3").stdout
    assert re.search(r"the loss rose from [\d.]+ to [\d.]+: try --lr 0\.25\n", run("1").stdout)


METHOD = """
from dataclasses import dataclass

@dataclass
class Config:
    {field}: int = 3

def attach(model, config):
    ...
"""


def test_a_file_is_a_method_where_it_defines_attach(tmp_path, monkeypatch):
    """Another file is never imported. What a method may not define: a field of Config that train.py has too, a name
    that is taken, a default of a setting that is nobody's."""
    def wrong(name, code, match):
        (tmp_path / name).write_text(code)
        with pytest.raises(UserError, match=match):
            find()
        (tmp_path / name).unlink()

    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    find = train.find_methods.__wrapped__
    (tmp_path / "scratch.py").write_text("raise SystemExit('imported')  # def attach(\n")
    (tmp_path / "first_odd.py").write_text(METHOD.format(field="width") + "DEFAULTS = {'first_odd': {'layers': 3}}\n")
    assert (found := find()).keys() == {"first_odd"} and found["first_odd"][1].width == 3
    wrong("other_odd.py", METHOD.format(field="depth") + "PRESETS = {'first_odd': Config(4)}\n",
          "other_odd.py defines the method 'first_odd', and so does first_odd.py")
    wrong("third_odd.py", METHOD.format(field="steps"), "third_odd.py: Config has the field 'steps', which is train")
    monkeypatch.setattr(train, "find_methods", lambda: found)
    with pytest.raises(UserError, match="DEFAULTS of 'first_odd' sets 'layers', expected some of steps, batch_size"):
        train.Config(method="first_odd")


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises(runs):
    out = runs("--method", "multilora", *QUICK)
    results, config = (json.loads((out / name).read_text()) for name in ("results.json", "config.json"))
    assert results.keys() == {"method", "seed", "base", "steps", "trainable_parameters", "total_parameters",
                              "eval_split", "tasks", "speciality", "versatility", "uni", "seconds",
                              "peak_memory_bytes", "report"}
    assert results["total_parameters"] == sum(t.numel() for t in load_file(BASE / "model.safetensors").values())
    new = {t: s for t, s in results["tasks"].items() if s["group"] == "new"}
    general = {t: s for t, s in results["tasks"].items() if s["group"] == "general"}
    assert set(new) == {"currency", "cipher"} and len(general) >= 8
    assert results["speciality"] == pytest.approx(sum(s["after"] for s in new.values()) / 2)
    assert results["uni"] == pytest.approx(results["speciality"] + results["versatility"])
    assert {s["aspect"] for s in general.values()} == {"knowledge", "reasoning", "instruction"}
    assert config["asked"]["settings"]["steps"] == 12 and "--tasks currency,cipher" in config["command"]
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["asked"]["base"]["model.safetensors"]) == 64
    lines = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 10, 12] and lines[-1]["loss"] < lines[0]["loss"]
    ids = torch.tensor([[1, 5, 9]])
    assert not torch.equal(train.load_run(out)[0](ids), Llama.from_pretrained(BASE)(ids))
    code = "from engine.folder import peak_memory; import torch; print(peak_memory(torch.device('cpu')))"
    held = b"1" * 2**30  # of this process: the peak is that of the program itself
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True).stdout)
    assert 2**26 < peak < len(held)


@pytest.mark.slow
def test_validation_losses_and_samples_are_told(runs):
    out = runs("--method", "lora", *QUICK, "--eval-every", "5", "--lr", "0.05", "--samples", "3")
    losses = {r["step"]: r["validation_loss"] for r in json_lines(out / "metrics.jsonl") if "validation_loss" in r}
    printed = (out.parent / "printed.txt").read_text()
    assert list(losses) == [5, 10, 12] and f"  validation {losses[12]:.4f}  lr" in printed
    tuned, _, saved = train.load_run(out, base=BASE)
    config = replace(train.Config(**saved["asked"]["settings"]), base=str(BASE))
    suite, tokenizer, _ = train.load_data(config, train=False)
    assert {suite.names[e.task] for e in suite.validation} == {"currency", "cipher"} and not suite.train
    found = data.loss.function(tuned, suite.validation, tokenizer, 48, 0)["loss"]
    assert found == pytest.approx(losses[12], abs=1e-5)

    told = json.loads((out / "samples.json").read_text())
    kinds = [train.builtin.TASKS[sample["task"]][0] for sample in told]
    assert kinds == sorted(kinds, key=kinds.index) and {kinds.count(kind) for kind in kinds} == {3}
    prompts = [tokenizer.encode(sample["prompt"]) for sample in told]
    for when, who in (("before", Llama.from_pretrained(BASE)), ("after", tuned)):
        rows = who.generate(prompts, 48, tokenizer.stop_ids)
        assert [tokenizer.decode(row).strip() for row in rows] == [sample[when] for sample in told]
    assert any(sample["before"] != sample["after"] for sample in told)
    assert "### Inst" not in printed and f"  {told[0]['task']}: " in printed


def test_epochs_are_steps_of_the_training_examples(runs):
    out = runs("--method", "lora", "--tasks", "currency", "--epochs", "0.02", "--batch-size", "8", "--eval-limit", "2",
               "--samples", "0")
    assert json.loads((out / "results.json").read_text())["steps"] == 5  # of 2,000 examples
    assert "2,000 training examples of 1 tasks, 5 steps of 8 = 0.02 epochs" in (out.parent / "printed.txt").read_text()
    assert json.loads((out / "samples.json").read_text()) == []


def test_gradient_checkpointing_reaches_the_layers(runs, monkeypatch):
    ran, real = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *args, **options: ran.append(1) or real(*args, **options))
    runs("--method", "csreft", *QUICK, "--grad-checkpointing")
    assert len(ran) >= 12 * 8


def test_a_score_may_have_any_unit(tmp_path, monkeypatch):
    """130 points of a format's own go through training, table and pictures, and count in no mean."""
    pytest.importorskip("matplotlib")
    points = data.Score("chess", "points", lambda model, examples, *rest: {"rating": 130.0})
    monkeypatch.setitem(FORMATS, "pair", replace(FORMATS["pair"], score=points))
    file = written(tmp_path / "moves.jsonl", [{"prompt": f"number {i}", "completion": "x"} for i in range(30)])
    out = tmp_path / "run"
    text = here("train.py", "--method", "lora", "--data", file, "--steps", "2", "--batch-size", "4", "--samples", "0",
                "--out", out).stdout
    row = next(line for line in text.splitlines() if line.startswith("  moves"))
    assert row.split()[-2:] == ["130", "130"] and "speciality" not in text
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["moves"]["unit"] == "points" and results["speciality"] is results["uni"] is None
    here("-m", "tools.plot", out)
    assert (out / "plot.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------- finished runs


def test_a_run_that_cannot_be_loaded_says_why(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs("--method", "multilora", *QUICK), run)
    config = (run / "config.json").read_text()
    monkeypatch.chdir(HERE)  # the run names its base as `base`
    for old, new, match in (('"method": "multilora"', '"method": "gone"', "unknown method 'gone'"),
                            ('"rank": 4', '"rank": 2', "made with other settings"),
                            ('"base": "base"', '"base": "nowhere"', "trained on the base nowhere, which is not here"),
                            ('"model.safetensors": "', '"model.safetensors": "0', "trained on another base than base"),
                            ('"modules": ', '"colour": ', r"config\.json.*colour"), ("{", "[", r"config\.json"),
                            ('"method": "multilora"', '"method": [1]', r"config\.json"),
                            ('"asked": ', '"asked": null, "was": ', r"config\.json"),
                            ('"epochs": null', '"epochs": 2', "one of --steps and --epochs"),
                            ('"rank": 4', '"rank": "4"', r"config\.json"), ('"rank": 4', '"rank": -1', r"config\.json"),
                            ('"targets": "', '"targets": 7, "was": "', r"config\.json")):
        assert old in config
        (run / "config.json").write_text(config.replace(old, new))
        with pytest.raises(UserError, match=match):
            train.load_run(run)
        one_line_error("-m", "tools.score", run)
    (run / "config.json").write_text(config.replace('"base": "base"', '"base": "nowhere"'))
    assert train.load_run(run, base=BASE)[2]["asked"]["settings"]["tasks"] == "currency,cipher"
    (run / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match="holds no adapter.safetensors"):
        train.load_run(run)
    assert "holds no adapter.safetensors" in one_line_error("-m", "tools.score", run, "--base", BASE), "unfinished"


def test_a_run_and_a_base_are_scored_as_the_runs_own_table_has_them(runs, tmp_path):
    out = runs("--method", "csreft", *QUICK)
    wanted = json.loads((out / "results.json").read_text())
    for place, when in ((out, "after"), (BASE, "before")):
        args = ("--tasks", "currency,cipher", "--eval-limit", "5") if place == BASE else ()
        text = here("-m", "tools.score", place, *args, "--json", tmp_path / "scores.json").stdout
        found = json.loads((tmp_path / "scores.json").read_text())
        assert {task: s["after"] for task, s in found["tasks"].items()} == {
            task: s[when] for task, s in wanted["tasks"].items()}
        row = next(line.split() for line in text.splitlines() if line.startswith("  add "))
        assert row[:4] == ["add", "reasoning", "5", f"{wanted['tasks']['add'][when]:.1f}"] and "before" not in text
    assert found["versatility"] == pytest.approx(sum(
        s["before"] for s in wanted["tasks"].values() if s["group"] == "general") / 10)


@needs_real
def test_shots_stand_in_front_of_the_questions_that_are_scored(runs, tmp_path, monkeypatch):
    """Three rows of MMLU's dev/ for each question of its test/. A run of the built-in suite is scored on files, too."""
    names, run = ("global_facts", "us_foreign_policy"), runs("--method", "csreft", *QUICK)
    files = lambda split: [REAL / "mmlu" / split / f"{name}_{split}.csv" for name in names]
    asked, real = [], data.choice_scores
    monkeypatch.setattr(data, "choice_scores", lambda model, examples, size: asked.extend(
        c for e in examples for c in e.choices) or real(model, examples, size))
    for place in (BASE, run):
        here("-m", "tools.score", place, "--eval-data", *files("test"), "--shot-data", *files("dev"), "--shots", "3",
             "--eval-limit", "2", "--max-length", "1024", "--json", tmp_path / "scores.json")
        tasks = json.loads((tmp_path / "scores.json").read_text())["tasks"]
        assert tasks.keys() == set(names) and {(s["score"], s["rows"]) for s in tasks.values()} == {("choice", 2)}
    texts = list(map(data.Tokenizer.from_pretrained(BASE).decode, (e.ids for e in asked)))
    assert len(texts) == 2 * 2 * 2 * 4 and texts[:16] == texts[16:]
    for text, e in zip(texts, asked):
        assert text.count("Answer:") == 4 and text.endswith(f"Answer:\n\n### Response:\n{e.gold}")
    for args in (["--shots", "5"], ["--shots", "1", "--shot-data", *files("dev")]):
        assert "go together" in one_line_error("-m", "tools.score", BASE, *args)


def test_a_model_whose_numbers_overflow_is_not_scored(tmp_path):
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("pretraining"))
    tensors = load_file(BASE / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 0 + 3e38},
              tmp_path / "base" / "model.safetensors")
    message = one_line_error("-m", "tools.score", tmp_path / "base", "--eval-limit", "2", "--tasks", "currency")
    assert "(example currency " in message and "overflow" in message


def test_a_base_is_the_files_that_decide_what_it_says(runs, tmp_path):
    out, base = runs("--method", "lora", *QUICK), tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "consolidated.safetensors").write_bytes(b"")
    train.load_run(out, base=base)
    for name in ("config.json", "tokenizer.json"):
        text = (base / name).read_text()
        (base / name).write_text(text + "\n")
        with pytest.raises(UserError, match=f"another base than .*base file {name} has changed"):
            train.load_run(out, base=base)
        (base / name).write_text(text)


def test_norms_and_biases_have_no_weight_decay():
    whole = tiny(attention_bias=True)
    groups = Adapter(whole).param_groups(1.0, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in whole.named_parameters() if id(p) in decayed}
    assert names == {name for name, _ in whole.named_parameters() if not name.endswith(("norm.weight", "bias"))}


@pytest.mark.slow
def test_mutated_input_ends_in_success_or_one_line():
    assert cli("-m", "tests.fuzz", "--cases", "2000").stdout.count("refused") == 5
