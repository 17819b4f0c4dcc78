"""A run is a folder, and the same command continues it. Whatever stops a run, nothing is lost, and one line says why.
The oracle is the run that nobody disturbed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import cofitune
import csreft
import multilora
import train
from data import Tokenizer
from engine.checkpoint import Checkpoint
from engine.flags import Stopped, user_message
from engine.folder import MARK, RunFolder
from model import Llama
from tests.helpers import (BASE, HERE, cli, clone, here, json_lines, kill, one_line_error, posix, start,
                           trained_on_builtin, written)

COMMON = ("--tasks", "currency", "--steps", "200", "--batch-size", "4", "--eval-limit", "6", "--save-every", "4")
COMMANDS = {
    "multilora": ("--method", "multilora", "--dropout", "0.2", *COMMON),
    "csreft": ("--method", "csreft", "--sparsity", "0.1", "--weight-decay", "0.1", *COMMON),
    "sft": ("--method", "sft", *COMMON, "--grad-accum", "2", "--batch-size", "2"),
    "cofitune": ("--method", "cofitune", "--layers", "25%-50%", "--importance-batches", "2", *COMMON),
    "search": ("--method", "cofitune", "--importance-batches", "2", "--search-steps", "20", *COMMON, "--steps", "8"),
}
RUN = ("train.py", "--method", "lora", "--tasks", "currency", "--steps", "6", "--batch-size", "4", "--eval-limit", "2",
       "--save-every", "2")


def without_times(value):
    """A copy of JSON without seconds, speeds and memory."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items()
                if "seconds" not in key and "per_second" not in key and key != "peak_memory_bytes"}
    return value


def left(out):
    """What a finished run left, as far as it may not depend on time."""
    weights = (out / "adapter.safetensors").read_bytes() if (out / "adapter.safetensors").exists() else None
    results = without_times(json.loads((out / "results.json").read_text()))
    searched = {folder.name: left(folder) for folder in sorted(out.glob("search/*"))}
    assert not list(out.glob("*.part")) and not (out / "checkpoint.safetensors").exists()
    return weights, [without_times(line) for line in json_lines(out / "metrics.jsonl")], results, searched


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lines(out):
    """Records of a run, and of the trials of its search."""
    return sum(file.read_text().count("\n") for file in out.rglob("metrics.jsonl"))


# ---------------------------------------------------------------------------------------------- killed and continued


def some_moment(out, rng):
    """After a while, after another record, or while a checkpoint is written."""
    wait, more = time.monotonic() + rng.uniform(1, 2), lines(out) + 1
    return rng.choice((lambda: time.monotonic() > wait, lambda: lines(out) >= more,
                       lambda: any(out.rglob("checkpoint*.part")) or lines(out) > more))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_ten_times_ends_at_the_same_bytes(tmp_path, name):
    out, rng = tmp_path / "killed", random.Random(name)
    command = ("train.py", *COMMANDS[name], "--out", out)
    cli("train.py", *COMMANDS[name], "--out", tmp_path / "whole")
    kills = sum(kill(command, some_moment(out, rng)) is not None for _ in range(10))
    if not (out / "results.json").exists():
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 3')  # a record that was cut off
    nodes = {file: file.stat().st_mtime_ns for file in out.glob("search/*/results.json")}
    cli(*command)
    assert kills >= 8 and left(out) == left(tmp_path / "whole"), f"{kills} kills"
    assert all(file.stat().st_mtime_ns == time for file, time in nodes.items()), "a scored node was trained again"


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(tmp_path, number):
    out = tmp_path / "run"
    done = kill((*RUN, "--steps", "4000", "--out", out), lambda: lines(out) > 0, number)
    step = int(re.fullmatch(r"train.py: stopped after step (\d+) of 4000; the same command continues: python train\.py "
                            r"--method .*\n", done.stderr)[1])
    assert done.returncode == 128 + number and Checkpoint(out).facts["step"] == step >= 1


@pytest.mark.parametrize("method, config", [
    (multilora, multilora.Config(modules=2, rank=2, dropout=0.3)),
    (csreft, csreft.Config(subspaces=2, rank=2, layers="3,4", sparsity=0.1)),
    (cofitune, cofitune.Config(layers="3", importance_batches=2))], ids=["multilora", "csreft", "cofitune"])
def test_a_checkpoint_is_all_that_a_run_needs(tmp_path, monkeypatch, method, config):
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    records, stop = [], lambda adapter, step: step == 4 and signal.raise_signal(signal.SIGINT)
    run = lambda **more: trained_on_builtin(method, config, 8, save_every=0, log=records.append, **more)[1].tensors()
    wanted = run()
    with pytest.raises(Stopped, match="stopped after step 5 of 8"):
        run(keep=Checkpoint(tmp_path), after=stop)
    tensors = run(keep=Checkpoint(tmp_path))
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    records = [without_times(r) | {"tokens": round(r["tokens_per_second"] * r["seconds"])} for r in records]
    assert [r["step"] for r in records] == [1, 3, 6, 8] * 2 and records[:4] == records[4:]


# ---------------------------------------------------------------------------------------------- which run is it?


def test_a_finished_run_is_shown_and_left_alone_and_another_is_refused(runs):
    out = runs(*RUN[1:])
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    os.umask(mask := os.umask(0))
    assert {file.stat().st_mode & 0o777 for file in before} == {0o666 & ~mask}, "not the user's ordinary permissions"
    for more in ((), ("--save-every", "7")):  # still this very run
        text = here(*RUN, *more, "--out", out).stdout
        assert "speciality" in text and "finished: nothing was done" in text and "step " not in text
    for flag, old, new in (("--rank", "12", "3"), ("--seed", "0", "1"), ("--dtype", "'auto'", "float64"),
                           ("--base", "'base'", str(BASE)), ("--tasks", "'currency'", "tool")):
        message = one_line_error(*RUN, flag, new, "--out", out)
        assert f"holds another run: {flag} was {old}, and is now" in message and "--overwrite" in message
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before


@pytest.mark.slow
def test_other_code_other_data_and_another_base_are_named(tmp_path):
    project = clone(tmp_path / "project")
    written(project / "a.jsonl", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(60)])
    command = ("train.py", "--method", "lora", "--data", "a.jsonl", "--steps", "2", "--batch-size", "4")
    cli(*command, cwd=project)
    for kind, file in (("code", "multilora.py"), ("code", "formats/known.py"), ("data", "a.jsonl"),
                       ("base", "tokenizer_config.json"), ("base", "model.safetensors")):
        path = project / ("base" if kind == "base" else "") / file
        kept = path.read_bytes()
        if file == "model.safetensors":
            save_file({name: t * 1.01 for name, t in load_file(path).items()}, path)
        else:
            path.write_bytes(kept + b"\n")
        message = one_line_error(*command, cwd=project, run=cli)
        assert f"out/lora holds another run: {kind} file {file} has changed since (SHA-256 " in message, message
        path.write_bytes(kept)
    (project / "csreft.py").write_text((project / "csreft.py").read_text() + "\n")  # no part of this run
    assert "finished" in cli(*command, cwd=project).stdout


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds another run" in one_line_error(*RUN, "--out", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds another run" in one_line_error(*RUN, "--out", tmp_path) and (tmp_path / "notes.txt").exists()
    for out in ("base", HERE):
        before = content(BASE)
        assert "which this run reads" in one_line_error(*RUN, "--out", out, "--overwrite") and content(BASE) == before


@posix
def test_two_processes_never_work_in_one_folder(tmp_path):
    out = tmp_path / "run"
    with RunFolder(out).locked():
        assert "another process works in" in one_line_error(*RUN, "--out", out) and out.exists()
    assert not out.exists()
    process = start(*RUN, "--steps", "4000", "--out", out, stdout=subprocess.DEVNULL)
    while not lines(out):
        time.sleep(0.01)
    assert "another process works in" in one_line_error(*RUN, "--out", out, "--overwrite")
    process.kill()
    process.wait()
    with RunFolder(out).locked():
        assert {file.name for file in tmp_path.iterdir()} == {"run"}


# ---------------------------------------------------------------------------------------------- --overwrite


@pytest.fixture
def old(runs, tmp_path):
    """A finished run that must not be lost, with somebody's note beside its files."""
    shutil.copytree(runs(*RUN[1:]), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def test_the_old_run_lies_beside_until_the_new_one_is_finished(old, monkeypatch):
    """Twice overwritten, too, with an unfinished run between; the first one is what stays."""
    before, beside = content(old), old.with_name("run.old")
    for seed in ("1", "2"):
        with monkeypatch.context() as patch:
            broken_at(patch, 5, lambda loss: loss / 0)
            message = one_line_error(*RUN, "--seed", seed, "--out", old, "--overwrite")
        assert message.endswith(f"holds the first 4 steps; the run before this one is in {beside}")
        assert content(beside) == {**before, MARK: b""} and Checkpoint(old).facts["step"] == 4
    assert "--seed was 2, and is now 1" in one_line_error(*RUN, "--seed", "1", "--out", old)
    assert "going on from step 4" in here(*RUN, "--seed", "2", "--out", old).stdout
    assert [file.name for file in old.parent.iterdir()] == ["run"] and (old / "notes.txt").read_text() == "mine"
    after = content(old)
    assert after.keys() == before.keys() and after["adapter.safetensors"] != before["adapter.safetensors"]


@pytest.mark.parametrize("flags", [("--targets", "q_prj"), ("--tasks", "juggling"), ("--rank", "1000000000000")])
def test_a_new_run_that_fails_at_its_start_changes_nothing(old, flags):
    before = content(old)
    one_line_error(*RUN, *flags, "--out", old, "--overwrite")
    assert content(old) == before and [file.name for file in old.parent.iterdir()] == ["run"]


def test_a_folder_that_only_has_the_name_of_an_old_run_stays(runs, tmp_path):
    """Somebody has renamed a run to run.old, and starts another one."""
    shutil.copytree(runs(*RUN[1:]), tmp_path / "run.old")
    before = content(tmp_path / "run.old")
    here(*RUN, "--out", tmp_path / "run")
    assert "which exists" in one_line_error(*RUN, "--out", tmp_path / "run", "--overwrite")
    one_line_error(*RUN, "--out", tmp_path / "other", "--targets", "q_prj")
    assert content(tmp_path / "run.old") == before and (tmp_path / "run" / "results.json").exists()


# ---------------------------------------------------------------------------------------------- training that fails


@posix
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(runs, tmp_path):
    """No file may grow larger than 300 kB, which the first checkpoint is."""
    import resource
    out = tmp_path / "run"
    full = start(*RUN, "--out", out, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    error = full.communicate()[1]
    assert full.returncode == 2 and len(error.strip().splitlines()) == 1, error
    assert {file.name for file in out.iterdir()} == {"config.json", "metrics.jsonl"}
    here(*RUN, "--out", out)
    assert left(out) == left(runs(*RUN[1:]))


def broken_at(monkeypatch, step, harm):
    """Training whose forward pass ends as harm(loss) from this step on. Returns a list for the ids of that pass."""
    forward, seen, count = Llama.forward, [], iter(range(1, 10**6))

    def broken(self, ids, *args, **options):
        loss, now = forward(self, ids, *args, **options), next(count)
        if now == step:
            seen.append(ids)
        return loss if now < step else harm(loss)

    monkeypatch.setattr(Llama, "forward", broken)
    return seen


@pytest.mark.parametrize("harm, words, clip", [
    (lambda loss: loss / 0, "the loss is inf", "1"),
    (lambda loss: loss + (loss - loss.detach()).sqrt(), "norm nan", "0")], ids=["loss", "slope alone"])
def test_a_step_that_is_not_finite_names_its_rows_and_the_last_checkpoint(tmp_path, monkeypatch, harm, words, clip):
    written(tmp_path / "rows.jsonl", [{"prompt": f"number {i}", "completion": "x"} for i in range(30)])
    seen = broken_at(monkeypatch, 5, harm)
    message = one_line_error(*RUN[:3], *RUN[5:], "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run",
                             "--clip", clip)
    assert "at step 5 " in message and words in message and message.endswith("run holds the first 4 steps")
    found = [int(line) for line in re.findall(r"rows\.jsonl:(\d+)", message)]
    texts = map(Tokenizer.from_pretrained(BASE).decode, seen[0].tolist())
    assert len(found) == 3 and "and 1 more" in message
    assert set(found) <= {int(re.search(r"number (\d+)", text)[1]) + 1 for text in texts}


def test_after_too_little_memory_the_last_checkpoint_stays(runs, tmp_path, monkeypatch):
    def harm(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    with monkeypatch.context() as patch:
        broken_at(patch, 5, harm)
        message = one_line_error(*RUN, "--out", tmp_path / "run")
    assert "not enough memory: CUDA out of memory. Tried to allocate 2.00 GiB.; " in message
    assert message.endswith("holds the first 4 steps")
    here(*RUN, "--out", tmp_path / "run")
    assert left(tmp_path / "run") == left(runs(*RUN[1:]))
    for error in (MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")):
        assert user_message(error) == f"not enough memory: {error}"
    with pytest.raises(RuntimeError, match="shapes differ"):  # a bug, which keeps its traceback
        user_message(RuntimeError("shapes differ"))
