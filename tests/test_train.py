"""The command line and runs: flags, mistakes, what a run leaves, searches, and run folders of the first build."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from safetensors.torch import load_file

import cofitune
import data
import model
import train
from engine import flags
from engine.best import Best
from engine.folder import RunFolder
from model import Llama, UserError
from tests.helpers import BASE, FIXTURES, HERE, QUICK, SEARCH, cli, here, json_lines, one_line_error, start

# ---------------------------------------------------------------------------------------------- flags


@dataclass
class Settings:
    rank: Annotated[int, "a whole number", "[1, inf)"] = 4
    share: Annotated[float, "100 % of it", "[0, 1)"] = 0.5
    chance: Annotated[float, "more than none", "(0, 1]"] = 1.0
    rate: Annotated[float | None, "a number or nothing", "(0, inf)"] = None
    mode: Annotated[Literal["soft", "hard"], "one of two"] = "soft"
    norm: Annotated[bool, "yes or no"] = True
    some_files: Annotated[list[str], "any number"] = field(default_factory=lambda: ["builtin"])


def parsed(*argv):
    parser = flags.Parser(prog="some.program")
    parser.add_argument("place", nargs="?")
    parser.add_argument("words", nargs="?")
    flags.add_flags(parser.add_argument_group("settings"), Settings())
    values = vars(parser.parse_args(argv))
    return values.pop("place"), values.pop("words"), Settings(**values)


def test_every_field_of_a_dataclass_is_a_flag():
    assert parsed() == (None, None, Settings())
    assert parsed("--rank", "7", "--rate", "1e-3", "--mode", "hard", "--no-norm", "--some-files", "a", "b") == (
        None, None, Settings(rank=7, rate=1e-3, mode="hard", norm=False, some_files=["a", "b"]))
    assert parsed("--norm", "--share", "0.25")[2] == Settings(share=0.25)


def test_flags_may_stand_before_and_after_what_has_none():
    for argv in ("here it --rank 7", "--rank 7 here it", "here --rank 7 it", "--no-norm here --rank 7 it --norm"):
        assert parsed(*argv.split()) == ("here", "it", Settings(rank=7)), argv


@pytest.mark.parametrize("argv, words", [
    (["--rnak", "7"], ["unknown argument '--rnak'", "did you mean --rank?", "--help lists them all"]),
    (["--xyz"], ["unknown argument '--xyz'", "--help lists them all"]),
    (["--ran", "7"], ["unknown argument '--ran'"]),  # no abbreviations: they change their meaning with a new flag
    (["--rank", "7.5"], ["--rank", "7.5"]),
    (["--rank"], ["--rank", "expected one argument"]),
    (["--mode", "loud"], ["--mode", "loud", "soft", "hard"]),
    (["--some-files"], ["--some-files", "at least one"]),
    (["--norm", "a", "b", "more"], ["unknown argument 'more'"]),
])
def test_a_wrong_flag_is_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        parsed(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("some.program: error: "), lines
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize("name, fine, wrong, message", [
    ("rank", [1, 10**9], [0, -1], "--rank is {}, expected at least 1"),
    ("share", [0, 0.999], [1, -1e-9, math.nan], "--share is {}, expected at least 0 and below 1"),
    ("chance", [1e-9, 1], [0, 1.001, math.inf], "--chance is {}, expected above 0 and at most 1"),
    ("rate", [None, 1e-30, 1e30], [0, -1.0, math.nan, math.inf], "--rate is {}, expected above 0"),
])
def test_ranges_in_annotations_are_checked(name, fine, wrong, message):
    for value in fine:
        flags.check(replace(Settings(), **{name: value}))
    for value in wrong:
        with pytest.raises(UserError) as error:
            flags.check(replace(Settings(), **{name: value}))
        assert str(error.value) == message.format(value)


@pytest.fixture
def handlers():
    """Puts the handlers of signals back, which programs set for themselves."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_a_mistake_or_a_signal_ends_a_program_without_a_traceback(capsys, handlers):
    def fail(error):
        raise error

    for error in (UserError("a mistake"), FileNotFoundError(2, "No such file", "x.json")):
        with pytest.raises(SystemExit) as end:
            flags.command_line(lambda error=error: fail(error))
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and lines[0].endswith(f"error: {error}")
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as end:
            flags.command_line(lambda number=number: signal.raise_signal(number))
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 128 + number and len(lines) == 1 and lines[0].endswith(": stopped")
    for bug in (ValueError("a bug"), KeyError("x"), RuntimeError("x")):
        with pytest.raises(type(bug)):
            flags.command_line(lambda bug=bug: fail(bug))


@pytest.mark.parametrize("name, lr, steps, batch_size", [
    ("multilora", 5e-3, 600, 48), ("lora", 4e-3, 600, 48), ("csreft", 1e-2, 2000, 24), ("loreft", 1e-2, 2000, 24),
    ("cofitune", *(cofitune.DEFAULTS["cofitune"][key] for key in ("lr", "steps", "batch_size"))),
    ("sft", 1e-3, 600, 48)])
def test_a_methods_defaults_reach_a_config_however_it_is_made(name, lr, steps, batch_size):
    for config in (train.Config(method=name), train.parse(["--method", name])[0], replace(train.Config(method=name))):
        assert (config.lr, config.steps, config.batch_size) == (lr, steps, batch_size)
    asked = train.Config(method=name, lr=1.0, steps=3)
    assert (asked.lr, asked.steps, asked.batch_size) == (1.0, 3, batch_size)
    assert train.parse(["--method", name, "--batch-size", "7"])[0] == train.Config(method=name, batch_size=7)


def test_a_run_from_python_uses_its_methods_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    out = tmp_path / "out"
    results = train.run(train.Config(method="lora", tasks="currency", steps=1, eval_limit=1, out=str(out)))
    saved = json.loads((out / "config.json").read_text())
    assert saved["asked"]["settings"]["lr"] == 4e-3 and saved["settled"]["modules"] == 1
    assert results == json.loads((out / "results.json").read_text()) and results["steps"] == 1


METHOD = """
from dataclasses import dataclass

@dataclass
class Config:
    {field}: int = 3

def attach(model, config):
    ...
"""


def test_what_a_method_file_may_not_define_is_refused(tmp_path, monkeypatch):
    """A field of Config that train.py has too, a name that is taken, a default of a setting that is nobody's."""
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    find = train.find_methods.__wrapped__
    (tmp_path / "first_odd.py").write_text(METHOD.format(field="width"))
    assert find()["first_odd"][1].width == 3
    (tmp_path / "other_odd.py").write_text(METHOD.format(field="depth") + "PRESETS = {'first_odd': Config(4)}\n")
    with pytest.raises(UserError, match="other_odd.py defines the method 'first_odd', and so does first_odd.py"):
        find()
    (tmp_path / "other_odd.py").unlink()
    (tmp_path / "third_odd.py").write_text(METHOD.format(field="steps"))
    with pytest.raises(UserError, match="third_odd.py: Config has the field 'steps', which is train.py's.*DEFAULTS"):
        find()

    module = SimpleNamespace(DEFAULTS={"odd": {"lr": 1.0, "layers": 3}})
    monkeypatch.setattr(train, "find_methods", lambda: {"odd": (module, None), "even": (module, None)})
    with pytest.raises(UserError, match="DEFAULTS of 'odd' sets 'layers', expected some of steps, batch_size, lr"):
        train.Config(method="odd")
    assert train.Config(method="even").lr == train.STANDARD["lr"]


def test_the_rate_rises_and_falls_in_a_cosine():
    config = train.Config(steps=100, warmup=0.1)
    shares = [train.schedule(step, config) for step in range(1, 101)]
    assert shares[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and shares[10] == 1
    assert all(a > b for a, b in zip(shares[10:], shares[11:])) and 0 < shares[-1] < 1e-3
    assert shares[55] == pytest.approx(0.5, abs=0.01)
    assert train.schedule(1, train.Config(steps=1)) == 1


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises(runs):
    out = runs("--method", "multilora", *QUICK)
    results, config = (json.loads((out / name).read_text()) for name in ("results.json", "config.json"))
    for key in ("method", "seed", "base", "steps", "trainable_parameters", "total_parameters", "seconds",
                "peak_memory_bytes", "tasks", "speciality", "versatility", "uni", "report"):
        assert key in results, key
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
    assert [line["step"] for line in lines] == [3, 6, 9, 12] and lines[-1]["loss"] < lines[0]["loss"]
    assert load_file(out / "adapter.safetensors")
    ids = torch.tensor([[1, 5, 9]])
    assert not torch.equal(train.load_run(out)[0](ids), Llama.from_pretrained(BASE)(ids))


def test_the_peak_of_memory_is_the_programs_own():
    """Not that of the program which started it."""
    code = "from engine.folder import peak_memory; import torch; print(peak_memory(torch.device('cpu')))"
    held = b"1" * 2**30
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True).stdout)
    assert 2**26 < peak < len(held)


@pytest.mark.slow
def test_the_lowest_loss_on_validation_rows_is_kept_and_samples_are_told(runs):
    """By a second scoring of what the run has saved."""
    out = runs("--method", "lora", *QUICK, "--eval-every", "3", "--keep-best", "--lr", "0.1", "--samples", "3")
    looks = {r["step"]: r["validation_loss"] for r in json_lines(out / "metrics.jsonl") if "validation_loss" in r}
    assert list(looks) == [3, 6, 9, 12] and not (out / "best.safetensors").exists()
    best = min(looks, key=looks.get)
    printed = (out.parent / "printed.txt").read_text()
    assert f"lowest loss on validation rows, {looks[best]:.4f}" in printed
    assert f"  validation {looks[12]:.4f}  lr" in printed
    model, _, _, saved = train.load_run(out)
    config = replace(train.Config(**saved["settings"]), base=str(BASE))
    suite, tokenizer = train.load_data(config, train=False)
    assert {suite.names[e.task] for e in suite.validation} == {"currency", "cipher"} and len(suite.validation) == 10
    assert data.loss(model, suite.validation, tokenizer, 48, 0)["loss"] == pytest.approx(looks[best], abs=1e-5)

    told = json.loads((out / "samples.json").read_text())
    kinds = [train.builtin.TASKS[sample["task"]][0] for sample in told]
    assert kinds == sorted(kinds, key=kinds.index) and {kinds.count(kind) for kind in kinds} == {3}
    base = Llama.from_pretrained(BASE)
    for sample in told:
        for when, who in (("before", base), ("after", model)):
            row = who.generate([tokenizer.encode(sample["prompt"])], 48, tokenizer.stop_ids)[0]
            assert tokenizer.decode(row).strip() == sample[when]
    assert any(sample["before"] != sample["after"] for sample in told)
    assert "### Inst" not in printed and f"  {told[0]['task']}: " in printed


def test_samples_know_their_task(runs):
    """`--route-on task` opens a subspace by the task's number, also where it generates."""
    out = runs("--method", "csreft", "--route-on", "task", *QUICK, "--samples", "1")
    told = json.loads((out / "samples.json").read_text())
    assert {row["task"] for row in told} >= {"currency", "cipher"} and all("after" in row for row in told)


def test_what_had_the_lowest_loss_comes_back_after_a_break_too(tmp_path):
    losses, said = {2: 5.0, 4: 3.0, 6: 4.0, 7: 3.5}, []
    adapter = model.Adapter(torch.nn.Linear(1, 1, bias=False))

    def looks(done):
        return Best(RunFolder(tmp_path), adapter, lambda: losses[adapter.step], said.append, 2, True, done)

    for stopped in (7, 5, 3):  # a run that ends, then ones that go on from behind and from before the best step
        best = looks(0)
        for step in [*range(1, stopped + 1), None, *range(stopped // 2 * 2 + 1, 8)]:
            if step is None:
                best = looks(done=stopped // 2 * 2)
                continue
            adapter.step = step
            adapter.model.weight.data.fill_(step)
            best(step, 7)
        assert [r["step"] for r in said if "validation_loss" in r][-1] == 7
        best.restore()
        assert adapter.model.weight.item() == 4 and best.loss == 3.0
        best.file.unlink()


def test_epochs_are_steps_of_the_training_examples(runs):
    out = runs("--method", "lora", "--tasks", "currency", "--epochs", "0.02", "--batch-size", "8", "--eval-limit", "2",
               "--samples", "0")
    assert json.loads((out / "results.json").read_text())["steps"] == 5  # of 2,000 examples
    assert "2,000 training examples of 1 tasks, 5 steps of 8 = 0.02 epochs" in (out.parent / "printed.txt").read_text()
    assert json.loads((out / "samples.json").read_text()) == []
    for args, words in ((["--epochs", "1", "--steps", "3"], "one of --steps and --epochs"),
                        (["--keep-best"], "--keep-best needs --eval-every"), (["--epochs", "0"], "--epochs is 0")):
        assert words in one_line_error("train.py", "--method", "lora", *args, "--out", out.parent / "other")


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(runs, tmp_path):
    first = runs("--method", "multilora", *QUICK)
    other = runs("--method", "multilora", *QUICK, "--seed", "1")
    cli("train.py", "--method", "multilora", *QUICK, "--out", tmp_path / "again")  # in a process of its own
    weights = [(folder / "adapter.safetensors").read_bytes() for folder in (first, tmp_path / "again", other)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("dtype, bound, steps", [
    ("float64", 1e-9, 2), pytest.param("float64", 1e-9, 10, marks=pytest.mark.slow),
    pytest.param("float32", 1e-6, 10, marks=pytest.mark.slow)])
def test_gradient_accumulation_equals_one_large_batch(runs, dtype, bound, steps):
    """Exactly so in float64. In float32 the rounding of the gradients, which Adam divides by their size, adds up: these
    two tasks stay within 1e-6 for ten steps, all six together drift to about 1e-5."""
    common = ("--method", "multilora", "--tasks", "currency,cipher", "--steps", str(steps), "--eval-limit", "1",
              "--log-every", "1", "--dtype", dtype)
    large = runs(*common, "--batch-size", "32")
    small = runs(*common, "--batch-size", "8", "--grad-accum", "4")
    losses = [[line["loss"] for line in json_lines(folder / "metrics.jsonl")] for folder in (large, small)]
    assert len(losses[0]) == steps and losses[0] == pytest.approx(losses[1], abs=bound)


def test_gradient_checkpointing_is_the_same_training(runs, monkeypatch):
    plain, ran, real = runs("--method", "csreft", *QUICK), [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *args, **options: ran.append(1) or real(*args, **options))
    again = runs("--method", "csreft", *QUICK, "--grad-checkpointing")
    assert len(ran) >= 12 * 8, "the flag does not reach the layers"
    a, b = (load_file(out / "adapter.safetensors") for out in (plain, again))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_an_existing_run_is_never_overwritten_silently(runs):
    out = runs("--method", "multilora", *QUICK)
    before = {file: file.read_bytes() for file in out.iterdir()}
    message = one_line_error("train.py", "--method", "multilora", *QUICK, "--seed", "1", "--out", out)
    assert "--seed was 0, and is now 1" in message and "--overwrite" in message
    text = here("train.py", "--method", "multilora", *QUICK, "--out", out).stdout
    assert "finished: nothing was done" in text and "speciality" in text
    assert {file: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("args, names", [
    (["--method", "multilora", "--rnak", "3"], ["--rnak", "did you mean --rank"]),
    (["--method", "multilora", "--rank", "0"], ["--rank is 0"]),
    (["--method", "multilora", "--rank", "many"], ["--rank", "many"]),
    (["--method", "multilora", "--lr", "-1"], ["--lr is -1"]),
    (["--method", "multilora", "--lr", "nan"], ["--lr is nan"]),
    (["--method", "multilora", "--targets", "q_prj"], ["'q_prj' matches no linear layer", "q_proj", "down_proj"]),
    (["--method", "multilora", "--targets", ""], ["no target", "q_proj"]),
    (["--method", "multilora", "--scaling", "matrix"], ["vector", "scalar"]),
    (["--method", "multilora", "--base", "nowhere"], ["nowhere", "checkpoint"]),
    (["--method", "multilora", "--tasks", "currency,juggling"], ["'juggling'", "currency", "cipher"]),
    (["--method", "multilora", "--device", "abacus"], ["abacus"]),
    (["--method", "multilora", "--steps", "0"], ["--steps is 0"]),
    (["--method", "csreft", "--rank", "40"], ["--rank 40", "128"]),
    (["--method", "csreft", "--layers", "3,8"], ["layers '3,8'", "0 to 7"]),
    (["--method", "csreft", "--positions", "x5"], ["--positions 'x5'", "f5+l5"]),
    (["--method", "csreft", "--threshold", "1.5"], ["--threshold is 1.5"]),
    (["--method", "csreft", "--no-router", "--supervise-gates"], ["--supervise-gates"]),
    (["--method", "cofitune", "--layers", "90%-10%"], ["90%-10%"]),
    (["--method", "cofitune", "--layers", "49%-51%"], ["49%-51%", "none of the model's 8 layers"]),
    (["--method", "cofitune", "--layers", "all", "--modules", "up_prj"], ["'up_prj'", "up_proj"]),
    (["--method", "sft", "--mask-on", "update"], ["--mask-on none"]),
    (["--method", "sft", "--replay", "1"], ["--replay"]),
    (["--method", "dreamlora"], ["'dreamlora'", "multilora", "lora"]),
    (["--steps", "5"], ["--method", "multilora"]),
    (["--method", "multilora", "--pretrain"], ["--pretrain"]),
])
def test_a_mistake_is_one_clear_line(tmp_path, args, names):
    short = [word for flag, value in (("--steps", "1"), ("--tasks", "currency")) if flag not in args
             for word in (flag, value)]
    message = one_line_error("train.py", *args, *short, "--out", tmp_path / "out")
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists(), "a refused run must leave nothing behind"


def test_help_shows_a_methods_own_flags_and_defaults():
    text = cli("train.py", "--method", "lora", "--help").stdout
    for expected in ("--grad-accum", "--eval-split", "--modules", "--scaling", "(12)", "--method lora", "(0.004)"):
        assert expected in text, expected
    assert "--modules" in here("train.py", "--help").stdout


@pytest.mark.slow
def test_a_killed_search_resumes_and_chooses_the_same(runs, tmp_path):
    whole, killed = runs(*SEARCH), tmp_path / "killed"
    text = (whole.parent / "printed.txt").read_text()
    assert "tree search" in text and "*" in text and "nodes" in text
    process = start("train.py", *SEARCH, "--out", killed, stdout=subprocess.DEVNULL)
    finished = lambda: {file.parent.name: file.stat().st_mtime_ns for file in killed.glob("search/*/results.json")}
    while len(finished()) < 4:
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = finished()
    message = one_line_error("train.py", *SEARCH, "--out", killed, "--lr", "0.5")
    assert f"--lr was {train.Config(method='cofitune').lr}, and is now 0.5" in message
    here("train.py", *SEARCH, "--out", killed)
    assert before.items() <= finished().items(), "a scored node was trained again"
    figures = lambda folder: {file.parent.name: [json.loads(file.read_text())[key] for key in (
        "tasks", "speciality", "versatility", "points")] for file in folder.glob("search/*/results.json")}
    assert figures(killed) == figures(whole) and 13 <= len(figures(whole)) <= 14
    chosen = [json.loads((folder / "config.json").read_text())["settled"] for folder in (killed, whole)]
    assert chosen[0] == chosen[1] and chosen[0]["layers"] != "search"
    weights = [(folder / "adapter.safetensors").read_bytes() for folder in (killed, whole)]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------------------------------------- finished runs


@pytest.mark.parametrize("method", ["multilora", "csreft"])
def test_runs_of_the_first_build_still_load_and_score_the_same(tmp_path, monkeypatch, method):
    monkeypatch.chdir(HERE)  # the run names its base as `base`
    run = FIXTURES / f"first-build-{method}"
    _, adapter, module, saved = train.load_run(run)
    stored = load_file(run / "adapter.safetensors")
    assert (module.__name__, saved["method"]) == (method, method) and stored.keys() == adapter.tensors().keys()
    assert all(torch.equal(t, stored[name]) for name, t in adapter.tensors().items())
    text = here("train.py", "--eval-only", "--adapter", run, "--out", tmp_path / "eval").stdout
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "eval"))
    assert len(after["tasks"]) == 11 and "score" in text
    for task, row in before["tasks"].items():
        assert after["tasks"][task]["after"] == row["after"], task
    assert (after["speciality"], after["versatility"]) == (before["speciality"], before["versatility"])


def test_a_run_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "first-build-multilora", run)
    whole = json.loads((run / "config.json").read_text())

    def broken(match, base=None, **changes):
        (run / "config.json").write_text(json.dumps({**whole, **changes}))
        with pytest.raises(UserError, match=match):
            train.load_run(run, base=base)

    broken("was trained on other weights than base holds now", base_sha256="0" * 64)
    broken("was trained on the base nowhere, which is not here", settings={**whole["settings"], "base": "nowhere"})
    broken("is a run of the method 'gone', whose file is not here", method="gone")
    broken("has the setting 'colour', which train.py does not know", settings={**whole["settings"], "colour": 1})
    broken("has the setting 'colour', which multilora.py does not know",
           method_settings={**whole["method_settings"], "colour": 1})
    broken("has shape .* made with other settings", method_settings={**whole["method_settings"], "rank": 2})
    (run / "config.json").write_text(json.dumps(whole))
    monkeypatch.chdir(tmp_path)
    broken("was trained on the base base, which is not here")
    assert train.load_run(run, base=BASE)[3]["settings"]["tasks"] == "currency"
    (run / "adapter.safetensors").unlink()
    broken("holds no adapter.safetensors")
