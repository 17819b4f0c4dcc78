"""Nothing is lost: whatever stops a run, either the old one or the new one is whole, and one line says why."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import Tokenizer
from engine.checkpoint import Checkpoint
from engine.flags import told
from engine.folder import RunFolder, beside, locked
from model import Llama, UserError
from reproduce import compare
from tests.helpers import BASE, HERE, SEARCH, cli, here, json_lines, one_line_error, start, tiny, written
from tests.test_resume import kill, left, lines

RUN = ("train.py", "--method", "lora", "--tasks", "currency", "--steps", "6", "--batch-size", "4", "--eval-limit", "2",
       "--log-every", "2", "--save-every", "2")


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def old(runs, tmp_path):
    """A finished run that must not be lost, with somebody's note beside its files."""
    shutil.copytree(runs(*RUN[1:]), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def alone(out):
    """No half of a run lies beside the folder."""
    return [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("flags", [("--lr", "1e30"), ("--targets", "q_prj"), ("--tasks", "juggling"),
                                   ("--rank", "1000000000")])
def test_a_new_run_that_fails_leaves_the_old_one_as_it_was(old, flags):
    before = content(old)
    one_line_error(*RUN, *flags, "--out", old, "--overwrite")
    assert content(old) == before and alone(old)


def test_a_new_run_takes_the_place_of_the_old_one_when_it_has_a_checkpoint(old):
    adapter = (old / "adapter.safetensors").read_bytes()
    process = kill((*RUN, "--steps", "400", "--seed", "1", "--out", old, "--overwrite"),
                   lambda: beside(old, "new").exists() and lines(beside(old, "new")) >= 0)
    assert process and (old / "adapter.safetensors").read_bytes() == adapter
    here(*RUN, "--seed", "1", "--out", old, "--overwrite")
    assert (old / "adapter.safetensors").read_bytes() != adapter and alone(old)
    assert (old / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("new", [True, False])
def test_a_kill_between_the_two_renames_is_repaired(old, new):
    """The folder is gone, the old one lies beside it, and the new one does or was not whole."""
    before = content(old)
    if new:
        shutil.copytree(old, beside(old, "new"))
    old.rename(beside(old, "old"))
    assert "finished" in here(*RUN, "--out", old).stdout
    assert content(old) == before and alone(old)


PLACES = ("create", "write", "flush", "rename")  # where the writer of files can fail


@contextmanager
def failing(monkeypatch, how):
    """The n-th use of the writer fails in the place that how(path, n) names, if any. Gives a list of what it named."""
    calls, limit = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    touch, fsync, replace = Path.touch, os.fsync, os.replace

    def fail(place, number, *args):
        if calls and calls[-1] == place:
            raise OSError(number, os.strerror(number), *args)

    def create(self, *args, **options):
        calls.append(how(self, len(calls) + 1))
        fail("create", errno.ENOSPC, str(self))
        if calls[-1] == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
        touch(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", create)
        patch.setattr(os, "fsync", lambda number: fail("flush", errno.EIO) or fsync(number))
        patch.setattr(os, "replace", lambda *paths: fail("rename", errno.EIO, str(paths[0])) or replace(*paths))
        try:
            yield calls
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def whole(folder):
    """Every file below is whole, and none is half written."""
    for file in folder.rglob("*"):
        assert file.suffix not in (".part", ".lock"), file
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_whichever_write_of_a_run_fails_the_old_or_the_new_is_whole(runs, tmp_path, monkeypatch, overwrite):
    """The same command with room ends at the same bytes. A run of six steps writes config, metrics, three checkpoints,
    adapter, samples, results."""
    wanted, out = runs(*RUN[1:]), tmp_path / "run"
    with failing(monkeypatch, lambda path, call: None) as every:
        here(*RUN, "--out", out)
    shutil.rmtree(out)
    assert len(every) == 8
    for n in range(1, len(every) + 1):
        place = PLACES[(n + 2 * overwrite) % 4]
        if overwrite:
            shutil.copytree(runs(*RUN[1:], "--seed", "1"), out)
        before = content(out)
        with failing(monkeypatch, lambda path, call: place if call == n else None) as calls:
            message = one_line_error(*RUN, "--out", out, *["--overwrite"] * overwrite)
        assert len(calls) == n
        said = "run holds the first" if n > 3 else "run is as it was" if overwrite and n > 1 else "error"
        assert said in message and (n > 3 or content(out) == before or not overwrite)
        whole(tmp_path)
        assert alone(out) or not overwrite and not list(tmp_path.iterdir())
        here(*RUN, "--out", out, *["--overwrite"] * overwrite)
        assert left(out) == left(wanted)
        shutil.rmtree(out)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["--peft", pytest.param("--hf", marks=pytest.mark.slow)])
def test_whichever_write_of_an_export_fails_nothing_half_is_left(runs, tmp_path, monkeypatch, kind, place):
    command = ("-m", "tools.export", runs(*RUN[1:]), kind)
    with failing(monkeypatch, lambda path, call: None) as calls:
        here(*command, tmp_path / "whole")
    wanted = content(tmp_path / "whole")
    assert len(calls) >= len(wanted) >= 2
    for n in range(1, len(calls) + 1):
        with failing(monkeypatch, lambda path, call: place if call == n else None):
            one_line_error(*command, tmp_path / "out")
        assert alone(tmp_path / "whole"), "nothing of the export is there"
    here(*command, tmp_path / "out")
    assert content(tmp_path / "out") == wanted


@pytest.mark.slow
def test_a_search_in_which_each_file_fails_once_ends_at_the_same_bytes(runs, tmp_path, monkeypatch):
    """In turn at each place, the same command after each."""
    failed, out, starts = [], tmp_path / "run", 0

    def how(path, call):
        file = str(path).rsplit(".", 2)[0]
        if file not in failed:
            failed.append(file)
            return PLACES[len(failed) % 4]

    while not (out / "results.json").exists():
        seen, starts = len(failed), starts + 1
        with failing(monkeypatch, how):
            with suppress(AssertionError):  # the last one succeeds
                assert len(here("train.py", *SEARCH, "--out", out, code=2).stderr.strip().splitlines()) == 1
        assert len(failed) > seen or (out / "results.json").exists()
        whole(out)
    assert starts > 30 and left(out) == left(runs(*SEARCH))


@pytest.mark.parametrize("place", PLACES)
def test_whichever_write_of_a_comparison_fails_the_old_figures_or_the_new_are_whole(tmp_path, monkeypatch, place):
    args = Namespace(out=tmp_path, jobs=1, threads=1)
    for n in (1, 2):  # compare.json, compare.csv
        compare.store(args, "quick", {"old": n})
        before = content(tmp_path)
        with failing(monkeypatch, lambda path, call: place if call == n else None), pytest.raises(OSError):
            compare.store(args, "quick", {"new": 1})
        after = content(tmp_path)
        assert sorted(after) == sorted(before) and after["compare.csv"] == before["compare.csv"]
        assert compare.load(tmp_path / "compare.json")["quick"] == ({"old": 1} if n == 1 else {"new": 1})


@pytest.mark.slow
def test_a_file_size_limit_is_one_line_and_the_same_command_goes_on(runs, tmp_path):
    out = tmp_path / "run"
    process = subprocess.run([sys.executable, *RUN, "--out", out], cwd=HERE, capture_output=True, text=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    assert process.returncode == 2 and len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert not list(out.glob("*.part")) and not (out / "checkpoint.safetensors").exists()
    cli(*RUN, "--out", out)
    assert left(out) == left(runs(*RUN[1:]))


FULL = """
mount -t tmpfs -o size=24m none {there} && cd {here} || exit 77
{command} & until [ -e {there}/run/checkpoint.safetensors ]; do sleep 0.02; done
dd if=/dev/zero of={there}/ballast bs=4k 2> /dev/null
wait $!; code=$?
cp -r {there}/run {kept} && rm {there}/ballast
{command} && cp -r {there}/run {done}
exit $code
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_later_is_one_line_and_the_same_command_goes_on(runs, tmp_path):
    """A small file system of its own, in which something else takes the room after the first checkpoint."""
    (there := tmp_path / "disk").mkdir()
    command = (*RUN, "--steps", "30", "--out", there / "run")
    script = FULL.format(there=there, here=HERE, command=shlex.join(map(str, [sys.executable, *command])),
                         kept=tmp_path / "kept", done=tmp_path / "done")
    process = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if process.returncode in (1, 77):
        pytest.skip(f"no file system of its own here: {process.stderr}")
    assert process.returncode == 2 and len(process.stderr.strip().splitlines()) == 1, process.stderr
    steps = int(re.search(r"No space left on device.*run holds the first (\d+) steps", process.stderr)[1])
    keep = Checkpoint(RunFolder(tmp_path / "kept"))
    assert steps == keep.facts["step"] < 30 and f"first {steps} steps: going on from there" in process.stdout
    whole(tmp_path / "kept")
    assert left(tmp_path / "done") == left(runs(*RUN[1:], "--steps", "30"))


def test_too_small_a_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    message = one_line_error(*RUN, "--out", tmp_path / "run")
    assert "has room for 0.0 MB" in message and not (tmp_path / "run").exists()


def test_a_folder_that_is_read_is_never_written_to(old, tmp_path):
    before, base = content(old), content(BASE)
    for args in ((*RUN, "--out", "base", "--overwrite"), (*RUN, "--out", HERE, "--overwrite"),
                 ("train.py", "--eval-only", "--adapter", old, "--out", old, "--overwrite")):
        assert "which this run reads" in one_line_error(*args)
    assert content(old) == before and content(BASE) == base


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.4] * 2)
def test_two_processes_never_work_in_one_folder(tmp_path, delay):
    """Started together, or nearly: one runs, the other is refused, whichever it is."""
    command, both = (*RUN, "--steps", "20", "--out", tmp_path / "run"), []
    for wait in (0, delay):
        time.sleep(wait)
        both.append(start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ended = [(*process.communicate(timeout=600), process.returncode) for process in both]
    assert sorted(code for *_, code in ended) == [0, 2]
    refused = next(err for _, err, code in ended if code)
    assert "another process works in" in refused and len(refused.strip().splitlines()) == 1
    assert json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 20 and alone(tmp_path / "run")
    whole(tmp_path)
    assert "nothing was done" in here(*command).stdout


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    assert kill((*RUN, "--steps", "4000", "--out", tmp_path / "run"), lambda: lines(tmp_path / "run") >= 1)
    assert beside(tmp_path / "run", "lock").exists()
    with locked(tmp_path / "run"):
        pass
    assert alone(tmp_path / "run")


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
    *((lambda loss: loss + (loss - loss.detach()).sqrt(), "norm nan", clip) for clip in ("0", "1"))],
    ids=["loss", "slope alone", "slope alone, clipped"])
def test_a_step_that_is_not_finite_names_its_rows_and_the_last_checkpoint(tmp_path, monkeypatch, harm, words, clip):
    written(tmp_path / "rows.jsonl", [{"prompt": f"number {i}", "completion": "x"} for i in range(30)])
    seen = broken_at(monkeypatch, 5, harm)
    message = one_line_error(*RUN[:3], *RUN[5:], "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run",
                             "--clip", clip)
    assert "at step 5 " in message and words in message and message.endswith("run holds the first 4 steps")
    lines = [int(line) for line in re.findall(r"rows\.jsonl:(\d+)", message)]
    texts = map(Tokenizer.from_pretrained(BASE).decode, seen[0].tolist())
    assert len(lines) == 3 and "and 1 more" in message
    assert set(lines) <= {int(re.search(r"number (\d+)", text)[1]) + 1 for text in texts}
    assert Checkpoint(RunFolder(tmp_path / "run")).facts["step"] == 4


def test_a_model_whose_numbers_overflow_is_not_scored(tmp_path):
    """Every weight is finite, the logits are not: no figure of results.json would mean anything."""
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("pretraining"))
    tensors = load_file(BASE / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 0 + 3e38},
              tmp_path / "base" / "model.safetensors")
    message = one_line_error("train.py", "--eval-only", "--base", tmp_path / "base", "--eval-limit", "2", "--tasks",
                             "currency", "--out", tmp_path / "run")
    assert "(example currency " in message and "overflow" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel"), OSError(12, "Cannot allocate memory")])
def test_too_little_memory_is_one_line(error):
    assert told(error) == f"not enough memory: {str(error).partition(chr(10))[0]}"
    with pytest.raises(type(bug := RuntimeError("shapes differ"))):
        told(bug)


def test_after_too_little_memory_the_last_checkpoint_stays(runs, tmp_path, monkeypatch):
    def harm(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    broken_at(monkeypatch, 5, harm)
    message = one_line_error(*RUN, "--out", tmp_path / "run")
    assert "not enough memory: CUDA out of memory. Tried to allocate 2.00 GiB.; " in message
    assert message.endswith("holds the first 4 steps")
    monkeypatch.undo()
    here(*RUN, "--out", tmp_path / "run")
    assert left(tmp_path / "run") == left(runs(*RUN[1:]))


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    broken_at(monkeypatch, 2, lambda loss: loss @ loss)
    with pytest.raises(RuntimeError, match="both arguments"):
        here(*RUN, "--out", tmp_path / "run")


def test_what_is_not_finite_is_neither_saved_nor_loaded(old, tmp_path):
    message = one_line_error("train.py", "--method", "sft", "--lr", "2e37", "--steps", "2", "--batch-size", "4",
                             "--tasks", "currency", "--eval-limit", "2", "--out", tmp_path / "sft")
    assert ("NaN or infinity" in message or "loss is" in message) and not list(tmp_path.glob("sft/*.safetensors"))
    tensors = load_file(old / "adapter.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] * float("nan")}, old / "adapter.safetensors")
    with pytest.raises(UserError, match="NaN or infinity"):
        train.load_run(old)
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    weights = {k: t.clone() for k, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'model.norm.weight' holds NaN or infinity"):
        Llama.from_pretrained(tmp_path / "base")


def test_files_of_a_run_have_the_users_ordinary_permissions(runs):
    mask = os.umask(0)
    os.umask(mask)
    for file in runs(*RUN[1:]).iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file
    json.loads((runs(*RUN[1:]) / "results.json").read_text(), parse_constant=lambda x: pytest.fail(x))
