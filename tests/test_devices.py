"""Several processes on CPUs. The oracle is the run of one process with the same --batch-size.

Started by torchrun this file is what each of them does: -m tests.test_devices FOLDER CASES. CASES is JSON, {name:
[method, its settings, train's settings]}; FOLDER gets each one's tensors, and their SHA-256 from every process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import devices
from engine.checkpoint import save_tensors
from engine.folder import digest
from tests.helpers import BASE, cli, json_lines, posix, settled, start, trained_on_builtin, written

pytestmark = posix
SIX = {"multilora": {}, "lora": {}, "csreft": {"sparsity": 0.1}, "loreft": {}, "cofitune": {}, "sft": {}}


def trained(case):
    """The adapter's tensors after the steps of a case, in this process or in all of them."""
    name, own, settings = case
    method, config = settled(name)
    settings = {"steps": 12, **settings, "dtype": getattr(torch, settings.get("dtype", "float64"))}
    return trained_on_builtin(method, replace(config, **own), **settings)[1].tensors()


def main():
    devices.init()
    folder = Path(sys.argv[1])
    for name, case in json.loads(sys.argv[2]).items():
        tensors, own = trained(case), folder / f"{name}.{devices.rank()}"
        save_tensors(folder / f"{name}.safetensors", tensors)
        own.write_bytes(b"".join(devices.full(tensors[key]).numpy().tobytes() for key in sorted(tensors)))
        own.write_text(digest(own))
    devices.end()


def torchrun(count, *args):
    """A job of several processes; --standalone finds a free port, so that jobs do not meet."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *args,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def done(job, code=0):
    out, err = job.communicate(timeout=900)
    assert job.returncode == code, f"exit code {job.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def compare(cases, folder, count=2, bound=1e-9):
    """Runs cases with several processes and with one: all of the several must end with the same bytes,
    within the bound of the one's."""
    done(torchrun(count, "-m", "tests.test_devices", folder, json.dumps(cases)))
    for name, (method, own, settings) in cases.items():
        assert len({(folder / f"{name}.{rank}").read_text() for rank in range(count)}) == 1, name
        wanted, found = trained([method, own, {**settings, "shard": False}]), load_file(folder / f"{name}.safetensors")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype and (found[key] - tensor).abs().max() < bound, (name, key)


def difference(one, other):
    one, other = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("shard", (False, True))
def test_all_methods_on_two_processes_equal_one(tmp_path, shard):
    compare({name: [name, own, {"shard": shard}] for name, own in SIX.items()}, tmp_path)
    compare({name: [name, own, {"shard": shard, "dtype": "float32", "lr": 1e-3}] for name, own in SIX.items()},
            tmp_path, bound=1e-4)
    if shard:  # a bfloat16 base trains in float32, as far from one process as other micro-batches are
        settings = {"steps": 4, "dtype": "bfloat16", "lr": 1e-3, "shard": True}
        compare({name: [name, {}, settings] for name in ("multilora", "cofitune")}, tmp_path, bound=5e-3)


@pytest.mark.slow
def test_uneven_shares_and_other_ways_to_sum(tmp_path):
    """Three processes: seven examples, fewer examples than processes (so one has no label), gradients of several
    micro-batches, layers that run twice."""
    shard = {"steps": 6, "shard": True}
    compare({"uneven": ["csreft", {"sparsity": 0.1}, {**shard, "batch_size": 7}],
             "copies of few": ["csreft", {"sparsity": 0.1}, {"steps": 6, "batch_size": 2}],
             "few": ["sft", {}, {**shard, "batch_size": 2}],
             "accumulated": ["csreft", {"sparsity": 0.1}, {"steps": 6, "batch_size": 4, "grad_accum": 3}],
             "masked gradients": ["cofitune", {"mask_on": "grad", "mask_source": "random"}, shard],
             "layers twice": ["cofitune", {}, {**shard, "grad_checkpointing": True}]}, tmp_path, count=3)


@pytest.mark.slow
def test_the_run_folder_is_that_of_one_process(tmp_path):
    """Scores, too, where text is generated: by three processes, of which each runs another number of steps."""
    rows = [{"question": f"What is {a} + {a}?", "answer": f"It is {2 * a}.\n#### {2 * a}"} for a in range(10, 60)]
    file = written(tmp_path / "sums.jsonl", rows)
    args = ("train.py", "--method", "sft", "--shares", "0.5", "--data", file, "--max-new-tokens", "12", "--steps", "12",
            "--batch-size", "8", "--eval-every", "6", "--dtype", "float64", "--out")
    one, split = tmp_path / "one", tmp_path / "split"
    cli(*args, one)
    out, _ = done(torchrun(3, *args, split, "--shard"))
    assert out.count("step    12/12") == 1
    assert {file.name for file in split.iterdir()} == {file.name for file in one.iterdir()}
    assert difference(one, split) < 1e-9
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, split)]
    assert results[0]["tasks"] == results[1]["tasks"] and results[0]["points"] == results[1]["points"]
    losses = [[line.get("loss", line.get("validation_loss")) for line in json_lines(folder / "metrics.jsonl")]
              for folder in (one, split)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9) and len(losses[0]) == 5
    command = json.loads((split / "config.json").read_text())["command"]
    assert command.startswith("torchrun --nproc-per-node 3 train.py")
    args = ("-m", "tools.score", split, "--eval-data", file, "--max-new-tokens", "4", "--dtype", "float64", "--json")
    done(torchrun(2, *args, tmp_path / "2.json", "--shard"))
    cli(*args, tmp_path / "1.json")
    tables = [json.loads((tmp_path / name).read_text())["tasks"] for name in ("1.json", "2.json")]
    assert tables[0] == tables[1]


STOPPED = ("train.py", "--method", "cofitune", "--layers", "25%-50%", "--importance-batches", "2", "--tasks",
           "currency", "--steps", "40", "--batch-size", "8", "--eval-limit", "3", "--save-every", "4", "--dtype",
           "float64")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of STOPPED on two processes, its weights split."""
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    done(torchrun(2, *STOPPED, "--shard", "--out", out))
    return out


def ended(job, out, number, victim):
    """What a job wrote to stderr that got a signal in the middle of training, itself or one of its workers."""
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 1:
        assert job.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    pids = {"launcher": job.pid, **dict(zip(("writer", "worker"), workers))}
    os.kill(pids[victim], number)
    _, err = job.communicate(timeout=60)  # all of them hold the pipe
    assert not (out / "results.json").exists()
    return err


@pytest.mark.slow
@pytest.mark.parametrize("victim", ("worker", "writer"))
def test_a_killed_run_ends_soon_and_continues_to_the_same_bytes(tmp_path, undisturbed, victim):
    command, out = (*STOPPED, "--shard", "--out", tmp_path / "run"), tmp_path / "run"
    ended(torchrun(2, *command), out, signal.SIGKILL, victim)
    done(torchrun(2, *command))
    assert (out / "adapter.safetensors").read_bytes() == (undisturbed / "adapter.safetensors").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["run"] and not list(out.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("victim, first, then", (("launcher", 3, 2), ("worker", 2, 1)))
def test_a_stopped_run_goes_on_with_another_number(tmp_path, undisturbed, victim, first, then):
    """SIGTERM to the launcher, or to one worker alone: all stop after the same step."""
    command, out = (*STOPPED, "--out", tmp_path / "run"), tmp_path / "run"
    err = ended(torchrun(first, *command, "--shard"), out, signal.SIGTERM, victim)
    assert len(set(re.findall(r"train.py: (stopped after step \d+)", err))) == 1, err
    done(torchrun(then, *command))
    assert difference(undisturbed, out) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("args, words", (
    (("--method", "multilora", "--batch-size", "1"), "--batch-size 1 counts over all processes"),
    (("--method", "multilora", "--ranc", "3"), "--ranc"),
    (("--method", "sft", "--out", BASE), "which this run reads"),
    (("--method", "sft", "--tasks", "currency", "--steps", "3", "--eval-limit", "1", "--lr", "1e30"), "lower --lr")))
def test_a_mistake_ends_all_processes(tmp_path, args, words):
    """Soon, each with a line at most, before torchrun's own report."""
    out = () if "--out" in args else ("--out", tmp_path / "run")
    _, err = done(torchrun(2, "train.py", *args, *out), code=1)
    ours = err[: err.index("elastic")]
    assert words in ours and ours.count("train.py: error: ") in (1, 2) and "Traceback" not in ours, err


if __name__ == "__main__":
    main()
