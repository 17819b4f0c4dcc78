"""A run is a folder, and the same command continues it. The oracle is the run that nobody disturbed."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

import cofitune
import csreft
import multilora
import train
from data import Batch
from engine import checkpoint
from engine.folder import RunFolder
from model import Context, Llama
from tests.helpers import (BASE, HERE, SOURCES, builtin_examples, cli, json_lines, one_line_error, random_ids, start,
                           tiny, written)

COMMON = ("--tasks", "currency", "--steps", "40", "--batch-size", "8", "--eval-limit", "6", "--log-every", "3",
          "--save-every", "4")
COMMANDS = {
    "multilora with dropout": ("--method", "multilora", "--dropout", "0.2", *COMMON),
    "csreft": ("--method", "csreft", "--sparsity", "0.1", "--weight-decay", "0.1", *COMMON),
    "sft": ("--method", "sft", *COMMON, "--grad-accum", "2", "--batch-size", "4"),
    "cofitune with mask": ("--method", "cofitune", "--layers", "25%-50%", "--importance-batches", "2", *COMMON),
    "cofitune's search": ("--method", "cofitune", "--importance-batches", "2", "--search-steps", "6", *COMMON,
                          "--steps", "8"),
}


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


def kill(command, moment, number=signal.SIGKILL):
    """Starts a command, sends it a signal as soon as moment() is true, and returns the ended process with its output;
    None where the command ended before."""
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not moment():
        if process.poll() is not None:
            return None
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def moments(out, rng):
    """Moments to kill at: before training, in training, while a checkpoint is written, after training, between two
    trials and within one."""
    wait = time.monotonic() + rng.uniform(2, 4)
    some, trials = rng.randint(2, 9), lambda: len(list(out.glob("search/*/results.json")))
    return [lambda: (out / "config.json").exists(), lambda: lines(out) >= some,
            lambda: any(out.glob("checkpoint*.part")) or (out / "results.json").exists(),
            lambda: trials() >= some or (out / "adapter.safetensors").exists(),
            lambda: any(lines(f) for f in out.glob("search/*")), lambda: time.monotonic() > wait,
            lambda: (out / "adapter.safetensors").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_again_and_again_ends_at_the_same_bytes(tmp_path, name):
    command, out = ("train.py", *COMMANDS[name], "--out", tmp_path / "killed"), tmp_path / "killed"
    cli("train.py", *COMMANDS[name], "--out", tmp_path / "whole")
    rng, kills = random.Random(name), 0
    for i in range(7):
        kills += kill(command, moments(out, rng)[i]) is not None
    text = cli(*command).stdout
    assert kills >= 4 and left(out) == left(tmp_path / "whole"), f"{kills} kills"
    assert "going on from there" in text or "finished: nothing was done" in text


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_bytes(tmp_path):
    """One kill, with a checkpoint and more steps after it. (In one process: test_a_checkpoint_is_all_that_a_run_needs.)
    """
    command = ("train.py", *COMMANDS["multilora with dropout"], "--steps", "60", "--save-every", "8", "--out")
    cli(*command, tmp_path / "whole")
    assert kill((*command, tmp_path / "killed"), lambda: lines(tmp_path / "killed") >= 4)
    text = cli(*command, tmp_path / "killed").stdout
    assert 8 <= int(re.search(r"holds the first (\d+) steps: going on from there", text)[1]) < 60
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_loses_at_most_the_step_in_hand(tmp_path, number, code):
    out = tmp_path / "run"
    command = ("train.py", "--method", "multilora", *COMMON, "--steps", "4000", "--save-every", "0", "--log-every", "1",
               "--out", out)
    done = kill(command, lambda: lines(out) >= 3, number)
    assert done.returncode == code and len(done.stderr.strip().splitlines()) == 1
    step = int(re.search(r"stopped after step (\d+) of 4000; the same command continues: python train\.py --method",
                         done.stderr)[1])
    assert step == json_lines(out / "metrics.jsonl")[-1]["step"]
    assert checkpoint.Checkpoint(RunFolder(out)).facts["step"] == step
    again = kill(command, lambda: lines(out) > step, number)
    assert f"holds the first {step} steps" in again.stdout and again.returncode == code


def test_a_signal_outside_of_training_is_one_line_too(tmp_path):
    done = kill(("train.py", *COMMANDS["sft"], "--out", tmp_path / "run"),
                lambda: (tmp_path / "run" / "config.json").exists(), signal.SIGTERM)
    assert done.returncode == 143 and "the same command continues" in done.stderr and "Traceback" not in done.stderr


def pieces(method, config, tmp_path, without=None):
    """({tensor: value}, records) of eight steps with a checkpoint after the fourth, one piece of which may be lost."""
    tokenizer, examples = builtin_examples()
    settings = train.Config(steps=8, batch_size=8, lr=1e-2, log_every=3, save_every=4)
    records = []

    def go(keep):
        model = Llama.from_pretrained(BASE)
        torch.manual_seed(0)
        adapter = train.start_adapter(model, method, config)
        train.train(model, adapter, examples, settings, tokenizer.pad_id, records.append, keep)
        return {name: tensor.clone() for name, tensor in adapter.tensors().items()}

    class Stop(Exception):
        pass

    class First(checkpoint.Checkpoint):
        def save(self, *args, **facts):
            super().save(*args, **facts)
            raise Stop

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        go(First(RunFolder(tmp_path)))
    keep = checkpoint.Checkpoint(RunFolder(tmp_path))
    if without in keep.facts:
        keep.facts[without] = {"step": 3, "losses": [], "tokens": 0, "seconds": 0.0}[without]
    elif without:
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        lost = [name for name in tensors if name.startswith(without)]
        assert lost, f"there is no piece {without}"
        fresh = pieces_at_start(method, config, tensors, lost)
        checkpoint.save_tensors(path, {**tensors, **fresh}, {"facts": json.dumps(keep.facts)})
    return go(keep), [without_times(r) | {"tokens": round(r["tokens_per_second"] * r["seconds"])} for r in records
                      if r["step"] > 3]


def pieces_at_start(method, config, tensors, lost):
    """What the lost tensors of a checkpoint are where nothing is restored: the start's, or zero for an optimiser's."""
    torch.manual_seed(0)
    model = Llama.from_pretrained(BASE)
    start = train.start_adapter(model, method, config).tensors()
    return {name: start.get(name.removeprefix("adapter."), torch.zeros_like(tensors[name])).clone() for name in lost}


LORA = multilora, multilora.Config(modules=2, rank=2, dropout=0.3)
EDITS = csreft, csreft.Config(subspaces=2, rank=2, layers="3,4", sparsity=0.1)
MASKED = cofitune, cofitune.Config(layers="3", importance_batches=2)


@pytest.mark.parametrize("method, config", [LORA, EDITS, MASKED], ids=["multilora", "csreft", "cofitune"])
def test_a_checkpoint_is_all_that_a_run_needs(tmp_path, method, config):
    tokenizer, examples = builtin_examples()
    settings, records = train.Config(steps=8, batch_size=8, lr=1e-2, log_every=3), []
    model = Llama.from_pretrained(BASE)
    torch.manual_seed(0)
    adapter = train.start_adapter(model, method, config)
    train.train(model, adapter, examples, settings, tokenizer.pad_id, records.append)
    tensors, after = pieces(method, config, tmp_path)
    for name, tensor in adapter.tensors().items():
        assert torch.equal(tensors[name], tensor), name
    assert after == [without_times(r) | {"tokens": round(r["tokens_per_second"] * r["seconds"])} for r in records
                     if r["step"] > 3]


@pytest.mark.slow
@pytest.mark.parametrize("method, config, without", [
    (*LORA, "adapter.model.layers.3.mlp.up_proj.multilora.A"), (*LORA, "optimizer.0.exp_avg"),
    (*LORA, "optimizer.0.exp_avg_sq"), (*LORA, "optimizer.0.step"), (*LORA, "losses"), (*LORA, "step"),
    (*LORA, "tokens"), (*EDITS, "adapter.csreft.R"), (*EDITS, "adapter.csreft.router"),
    (*MASKED, "adapter.importance"), (*MASKED, "adapter.model")], ids=lambda value: value if type(value) is str else "")
def test_every_piece_of_a_checkpoint_is_needed(tmp_path, method, config, without):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, records = pieces(method, config, tmp_path / "whole")
    broken, others = pieces(method, config, tmp_path / "broken", without)
    assert records != others or any(not torch.equal(whole[name], broken[name]) for name in whole)


def test_a_finished_run_is_shown_and_left_alone(runs):
    args = ("--method", "multilora", *COMMON, "--steps", "5")
    out = runs(*args)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    start = time.monotonic()
    text = cli("train.py", *args, "--out", out).stdout
    assert time.monotonic() - start < 10
    assert "speciality" in text and "finished: nothing was done" in text and "step " not in text
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before
    cli("train.py", *args, "--out", out, "--save-every", "7", "--log-every", "2")  # still this very run
    for flag, old, new in (("--rank", "4", "3"), ("--seed", "0", "1"), ("--dtype", "'auto'", "float64"),
                           ("--base", "'base'", str(BASE)), ("--tasks", "'currency'", "tool")):
        message = one_line_error("train.py", *args, flag, new, "--out", out)
        assert f"holds another run: {flag} was {old}, and is now" in message and new in message
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before


@pytest.mark.slow
def test_other_code_other_data_and_another_base_are_named(tmp_path):
    for name in SOURCES:
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, tmp_path / name)
        else:
            shutil.copy(HERE / name, tmp_path / name)
    written(tmp_path / "a.jsonl", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(60)])
    command = ("train.py", "--method", "lora", "--data", "a.jsonl", "--steps", "2", "--batch-size", "4")
    cli(*command, cwd=tmp_path)
    assert "finished" in cli(*command, cwd=tmp_path).stdout

    def changed(file, name):
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(kept + b"\n")
        message = one_line_error(*command, cwd=tmp_path, run=cli)
        assert f"out/lora holds another run: {name} has changed since (SHA-256 " in message, message
        assert "--overwrite" in message
        (tmp_path / file).write_bytes(kept)

    changed("multilora.py", "code file multilora.py")
    changed("formats/known.py", "code file formats/known.py")
    changed("a.jsonl", "data file a.jsonl")
    changed("base/tokenizer_config.json", "base file tokenizer_config.json")
    # another method's file is not part of this run
    (tmp_path / "csreft.py").write_text((tmp_path / "csreft.py").read_text() + "\n")
    assert "finished" in cli(*command, cwd=tmp_path).stdout
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    checkpoint.save_tensors(tmp_path / "base" / "model.safetensors", {n: t * 1.01 for n, t in tensors.items()})
    assert "base file model.safetensors" in one_line_error(*command, cwd=tmp_path, run=cli)
    before = (tmp_path / "out" / "lora" / "adapter.safetensors").read_bytes()
    cli(*command, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "out" / "lora" / "adapter.safetensors").read_bytes() != before


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = one_line_error("train.py", "--method", "lora", *COMMON, "--out", tmp_path)
    assert "config.json does not say what was asked for" in message and (tmp_path / "notes.txt").exists()
    (tmp_path / "config.json").write_text("{}")
    assert "holds another run" in one_line_error("train.py", "--method", "lora", *COMMON, "--out", tmp_path)


def test_a_bfloat16_base_is_computed_with_in_bfloat16_even_where_every_weight_is_trained():
    for name in ("sft", "multilora"):
        method, config = train.method_of(name)
        model = Llama.from_pretrained(BASE, dtype=torch.bfloat16)
        train.start_adapter(model, method, config)
        with model.autocast():
            assert model(random_ids(model)).dtype == torch.bfloat16, name


def test_micro_batches_of_a_step_are_one_batch_for_the_importance(monkeypatch):
    """Without dropout's draws, which differ: KL is replaced by the summed loss."""
    monkeypatch.setattr(cofitune, "two_pass_kl", lambda model, b: model(b.ids, b.labels, reduction="sum"))
    model = tiny(torch.float64)
    linears = cofitune.find_linears(model, ["up_proj", "q_proj"])
    ids = random_ids(model, 6, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    batch = lambda rows: Batch(ids[rows], labels[rows], Context(labels[rows] == -100))
    one = cofitune.importance(model, linears, [[batch(slice(0, 6))]], 1e-12)
    cut = cofitune.importance(model, linears, [[batch(slice(0, 2)), batch(slice(2, 6))]], 1e-12)
    apart = cofitune.importance(model, linears, [[batch(slice(0, 2))], [batch(slice(2, 6))]], 1e-12)
    for name in linears:
        torch.testing.assert_close(cut[name], one[name], atol=1e-9, rtol=0)
    assert any((apart[name] - one[name]).abs().max() > 1e-3 for name in linears)
