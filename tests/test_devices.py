"""Several processes on CPUs. The oracle is the run of one process with the same --batch-size."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from operator import sub
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import devices
from engine.checkpoint import save_tensors
from model import Llama, LlamaConfig
from reproduce.count import Machines, demands
from tests.helpers import BASE, cli, json_lines, settled, start, written
from tests.several import trained

SIX = {"multilora": {}, "lora": {}, "csreft": {"sparsity": 0.1}, "loreft": {}, "cofitune": {}, "sft": {}}
COMMON = ("--tasks", "currency", "--steps", "12", "--batch-size", "8", "--eval-limit", "3", "--log-every", "3",
          "--save-every", "4")


def torchrun(count, *args, **options):
    """A job of several processes; --standalone finds a free port, so that jobs do not meet."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *args, **options,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def done(job, code=0):
    out, err = job.communicate(timeout=900)
    assert job.returncode == code, f"exit code {job.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def workers(job):
    """Process ids of a job's workers."""
    found = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alike(cases, folder, count=2, bound=1e-9):
    """Runs cases (see several.py) with several processes and with one: all of the several must end with the same bytes,
    within the bound of the one's."""
    done(torchrun(count, "-m", "tests.several", folder, json.dumps(cases)))
    for name, (method, own, settings) in cases.items():
        assert len({(folder / f"{name}.{rank}").read_text() for rank in range(count)}) == 1, name
        _, adapter = trained([method, own, {**settings, "shard": False}])
        found, wanted = load_file(folder / f"{name}.safetensors"), adapter.tensors()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype and (found[key] - tensor).abs().max() < bound, (name, key)


def difference(one, other):
    one, other = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_processes_equal_one(tmp_path):
    alike({"copies": ["csreft", {"sparsity": 0.1}, {"steps": 3}],
           "split": ["cofitune", {"importance_batches": 1}, {"steps": 3, "shard": True}]}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shard", (False, True))
def test_all_methods_on_two_processes_equal_one(tmp_path, shard):
    alike({name: [name, own, {"shard": shard}] for name, own in SIX.items()}, tmp_path)
    alike({name: [name, own, {"shard": shard, "dtype": "float32", "lr": 1e-3}] for name, own in SIX.items()}, tmp_path,
          bound=1e-4)


@pytest.mark.slow
def test_uneven_shares_and_other_ways_to_sum(tmp_path):
    """Three processes: seven examples, fewer examples than processes (so one has no label), gradients of several
    micro-batches, a penalty on split weights, layers that run twice."""
    shard = {"steps": 6, "shard": True}
    alike({"uneven": ["csreft", {"sparsity": 0.1}, {**shard, "batch_size": 7}],
           "copies of few": ["csreft", {"sparsity": 0.1}, {"steps": 6, "batch_size": 2}],
           "few": ["sft", {}, {**shard, "batch_size": 2}],
           "accumulated": ["csreft", {"sparsity": 0.1}, {"steps": 6, "batch_size": 4, "grad_accum": 3}],
           "to the base": ["sft", {"l2_to_base": 0.1}, {**shard, "batch_size": 4, "grad_accum": 2}],
           "to the base, copies": ["sft", {"l2_to_base": 0.1}, {"steps": 6, "batch_size": 4, "grad_accum": 2}],
           "masked gradients": ["cofitune", {"mask_on": "grad", "mask_source": "random"}, shard],
           "layers twice": ["cofitune", {}, {**shard, "grad_checkpointing": True}]}, tmp_path, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ("multilora", "cofitune"))
def test_a_bfloat16_base_trains_in_float32(tmp_path, method):
    """As far from one process as other micro-batches are, and what is trained is wide."""
    settings = {"steps": 4, "dtype": "bfloat16", "lr": 1e-3}
    alike({"split": [method, {}, {**settings, "shard": True}]}, tmp_path, bound=5e-3)


@pytest.mark.slow
def test_the_run_folder_is_that_of_one_process(tmp_path):
    """Scores, too, where text is generated: by three processes, of which each runs another number of steps."""
    rows = [{"question": f"What is {a} + {a}?", "answer": f"It is {2 * a}.\n#### {2 * a}"} for a in range(10, 60)]
    args = ("train.py", "--method", "sft", "--data", written(tmp_path / "sums.jsonl", rows), "--max-new-tokens", "12",
            "--steps", "12", "--batch-size", "8", "--log-every", "3", "--dtype", "float64")
    cli(*args, "--out", tmp_path / "one")
    out, _ = done(torchrun(3, *args, "--shard", "--out", tmp_path / "split"))
    assert out.count("step    12/12") == 1
    names = lambda name: {file.name for file in (tmp_path / name).iterdir()}
    assert names("split") == names("one")
    assert difference(tmp_path / "one", tmp_path / "split") < 1e-9
    tables = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("one", "split")]
    assert tables[0] == tables[1]
    losses = [[line["loss"] for line in json_lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "split")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    config = json.loads((tmp_path / "split" / "config.json").read_text())
    assert config["command"].startswith("torchrun --nproc-per-node 3 train.py")
    args = ("--eval-only", "--adapter", tmp_path / "split", "--eval-data", tmp_path / "sums.jsonl", "--max-new-tokens",
            "4", "--dtype", "float64")
    done(torchrun(2, "train.py", *args, "--shard", "--out", tmp_path / "scored"))
    cli("train.py", *args, "--out", tmp_path / "scored by one")
    tables = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in (
        "scored", "scored by one")]
    assert tables[0] == tables[1]


STOPPED = ("train.py", "--method", "cofitune", "--layers", "25%-50%", "--importance-batches", "2", *COMMON, "--steps",
           "30", "--dtype", "float64")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of STOPPED on two processes, its weights split."""
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    done(torchrun(2, *STOPPED, "--shard", "--out", out))
    return out


def ended(job, out, number, victim):
    """What a job wrote to stderr that got a signal in the middle of training, itself or one of its workers."""
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        time.sleep(0.01)
    pids = {"launcher": job.pid, **dict(zip(("writer", "worker"), workers(job)))}
    os.kill(pids[victim], number)
    _, err = job.communicate(timeout=30)  # all of them hold the pipe
    states = [file.read_text().rpartition(")")[2].split()[0] for pid in pids.values()
              if (file := Path(f"/proc/{pid}/stat")).exists()]
    assert set(states) <= {"Z"}, states  # ended, whether or not somebody has asked how
    assert not (out / "results.json").exists()  # nor went on to the end without a launcher
    return err


@pytest.mark.slow
@pytest.mark.parametrize("victim", ("worker", "writer", "launcher"))
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
    assert len(re.findall("train.py: stopped after step", err)) == 1, err
    done(torchrun(then, *command))
    assert difference(undisturbed, out) < 1e-9


@pytest.mark.slow
def test_memory_of_split_weights_and_of_all_is_as_counted(tmp_path, monkeypatch):
    """Peaks of whole runs, loading included, less what a run on the small base needs beyond its own count."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))  # freed memory goes back, as it does with --shard
    big = tmp_path / "big"
    model = Llama(LlamaConfig(512, 384, 1344, 16, 6))
    model.init_weights(0)
    model.save_pretrained(big)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, big)
    text = written(tmp_path / "text.jsonl", [{"text": "1 2 3 4 " * 100}] * 40)
    method, config = settled("sft")

    def peak(base, count):
        out = tmp_path / f"{base.name}{count}"
        args = ("train.py", "--method", "sft", "--base", base, "--data", text, "--max-length", "100", "--batch-size",
                "2", "--grad-accum", "2", "--steps", "2", "--eval-limit", "1", "--save-every", "0", "--out", out)
        done(torchrun(count, *args, *("--shard",) * (count > 1)))  # a child's peak begins at its parent's: torchrun's
        measured = json.loads((out / "results.json").read_text())["peak_memory_bytes"]
        machines = Machines(count, count > 1, batch_size=2, length=100, dtype="float32")
        *steady, saved, _ = demands(LlamaConfig.from_pretrained(base), method, config, machines)[0].values()
        return measured, sum(steady) + saved

    found = {}
    for count in (1, 2):
        overhead, (measured, counted) = sub(*peak(BASE, count)), peak(big, count)
        found[count] = measured - overhead
        assert found[count] == pytest.approx(counted, rel=0.2)
    assert found[2] < 0.7 * found[1]  # two of 16 layers are whole for a while


@pytest.mark.slow
@pytest.mark.parametrize("args, words", (
    (("--method", "multilora", "--batch-size", "1"), "--batch-size 1 counts over all processes"),
    (("--method", "multilora", "--ranc", "3"), "unknown argument '--ranc'"),
    (("--method", "sft", "--out", BASE), "which this run reads"),
    (("--method", "sft", *COMMON, "--lr", "1e30"), "try a lower --lr")))
def test_a_mistake_is_one_line_of_one_process(tmp_path, args, words):
    out = () if "--out" in args else ("--out", tmp_path / "run")
    _, err = done(torchrun(2, "train.py", *args, *out), code=1)
    assert len(re.findall("train.py: ", err)) == 1 and words in err, err
    mine = err[: err.index("elastic")]  # what follows is torchrun's own report
    assert "Traceback" not in mine, err


def test_splitting_needs_several_processes(tmp_path):
    with pytest.raises(devices.UserError, match="torchrun"):
        devices.load(BASE, torch.device("cpu"), torch.float32, True)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    tensors = {"b": torch.randn(3, 5).T, "a": torch.randn(7), "number": torch.tensor(3.0),
               "wide": torch.randn(2).double(), "half": torch.randn(4, 1).bfloat16(), "nothing": torch.zeros(0, 4)}
    save_tensors(tmp_path / "ours", tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
