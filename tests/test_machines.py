"""Whole runs on machines that this one is not (pretend.py): an Nvidia and an Apple GPU, Windows, a torch without
distributed, checkouts with other line ends; and in a notebook."""

import importlib
import json
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model
import train
from engine import devices
from engine.checkpoint import save_tensors
from engine.flags import Stopped
from engine.folder import digest
from model import UserError, open_tensors
from tests.helpers import HERE, cli, clone, here, one_line_error, settled, tiny, tokenizer_folder, written
from tests.pretend import OnDevice, gpu, windows


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random base of two narrow layers, with the built-in tokenizer."""
    folder = tokenizer_folder(tmp_path_factory.mktemp("small") / "base")
    tiny(vocab_size=512, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128).save_pretrained(
        folder)
    return folder


@pytest.fixture
def job(small, tmp_path):
    """job(name, ...) -> (Config, the method's Config) of a short run on few rows."""
    rows = written(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(40)])

    def make(name, **changes):
        settings = dict(base=str(small), data=[str(rows)], steps=4, batch_size=4, samples=0, eval_every=4,
                        out=str(tmp_path / "run"))
        return train.Config(method=name, **{**settings, **changes}), settled(name)[1]
    return make


def stop_after(monkeypatch, step, look=lambda: None):
    """A SIGINT in each run's optimiser step of this number, counted over all runs; look() is called at each."""
    real, count = torch.optim.AdamW.step, iter(range(1, 10**6))

    def stepped(self):
        look()
        real(self)
        if next(count) == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


# ---------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", train.find_methods())
def test_a_run_stays_on_its_device(name, kind, dtype, job, monkeypatch):
    """Stopped, continued, scored, loaded, merged; a training step does not wait for the device, but where an Apple GPU
    has no QR. A cache holds numbers of the computation's dtype."""
    config, own = job(name, dtype=dtype, steps=5, eval_every=5)
    waits, caches, wide, narrow = [], [], torch.float32, getattr(torch, dtype)
    put = model.Cache.put
    monkeypatch.setattr(model.Cache, "put", lambda self, *args: caches.append(self.layers[0][0]) or put(self, *args))
    with gpu(kind) as machine:
        stop_after(monkeypatch, 3, lambda: waits.append(machine.waits))
        with pytest.raises(Stopped, match="stopped after step 3 of 5; the same call continues$"):
            train.run(config, own)
        report = train.run(config, own)["report"]
        assert json.dumps(report, allow_nan=False)
        each = 1 if kind == "mps" and name in ("csreft", "loreft") else 0
        assert [waits[2] - waits[1], waits[4] - waits[3]] == [each, each]  # the first step is logged
        device, dtype = train.device_and_dtype(config)
        tuned, adapter, saved = train.load_run(config.out, device, dtype)
        assert saved["asked"]["device"] == kind and {p.device for p in tuned.parameters()} == {machine.device}
        assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {wide}
        with tuned.autocast():
            tuned.generate([[1, 2, 3], [4, 5]], 9, (2,))
        assert {cache.dtype for cache in caches} == {narrow}
        if name not in ("csreft", "loreft"):
            adapter.merge()


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_gpu_that_cannot_add_two_numbers_is_passed_over(kind, capsys):
    with gpu(kind, broken=True):
        assert train.device_and_dtype(train.Config()) == (torch.device("cpu"), torch.float32)
        assert f"note: --device {kind} cannot be used: CUDA error: no kernel image" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"--device {kind} cannot be used: CUDA error"):
            train.device_and_dtype(train.Config(device=kind))


def test_auto_is_a_dtype_that_the_device_computes_in(tmp_path):
    auto = lambda **settings: train.device_and_dtype(train.Config(**settings))
    with gpu("cuda"):
        assert auto() == (torch.device("cuda"), torch.bfloat16)
    with gpu("cuda", bfloat16=False):  # emulated
        assert auto() == (torch.device("cuda"), torch.float32)
    with gpu("mps"):
        assert auto() == (torch.device("mps"), torch.float32)
        assert auto(dtype="float64") == (torch.device("cpu"), torch.float64)
        message = one_line_error("train.py", "--method", "lora", "--device", "mps", "--dtype", "float64", "--out",
                                 tmp_path / "run")
        assert "--device mps cannot be used: Cannot convert a MPS Tensor to float64" in message


def test_the_imitation_is_strict():
    with gpu("mps") as machine:
        x, y = torch.ones(2, 2, device="mps"), torch.ones(2, 2)
        assert isinstance(x + 1, OnDevice) and (x.cpu() + y).device.type == "cpu" and y.to("mps").device == x.device
        assert (x + torch.tensor(1.0)).sum().item() == 8 and machine.waits == 2
        for wrong in (lambda: x + y, lambda: torch.cat([y, x]), lambda: x[y.long()], lambda: x.double(),
                      lambda: torch.linalg.qr(x), lambda: y.to("mps", non_blocking=True), lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


def test_no_test_sees_a_gpu_but_a_pretended_one():
    said = "import torch; print(torch.cuda.is_available.__module__, torch.backends.mps.is_available.__module__)"
    assert cli("-c", said).stdout.split() == ["sitecustomize"] * 2
    assert torch.cuda.is_available.__module__ == "sitecustomize" and not torch.backends.mps.is_available()


# ---------------------------------------------------------------------------------------------- other systems


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="open and mapped files are looked up in Linux's /proc")
def test_windows_rules_for_files(job, tmp_path, monkeypatch):
    """A run stopped and continued, then overwritten by another one, likewise; scored, exported. A search. As a notebook
    does, something holds the frames of what was stopped."""
    config, own = job("lora", save_every=1)
    out, other, stopped = Path(config.out), replace(config, seed=1), []
    save_tensors(tmp_path / "held", {"x": torch.ones(9)})
    with windows():
        for hold in (open, open_tensors):  # the imitation is strict
            with hold(tmp_path / "held"), pytest.raises(PermissionError):
                (tmp_path / "held").unlink()
        for then in (config, replace(other, overwrite=True), other):
            with monkeypatch.context() as patch:
                stop_after(patch, 2)
                with pytest.raises(Stopped) as error:
                    train.run(then, own)
            stopped.append(error)
            assert (out / "checkpoint.safetensors").exists()
        train.run(other, own)
        train.run(replace(config, overwrite=True), own)
        for flag in ("--hf", "--peft"):
            here("-m", "tools.export", out, flag, tmp_path / f"as{flag}")
        here("-m", "tools.score", out, "--eval-data", *config.data)
        rows = written(tmp_path / "known.jsonl", [{"prompt": "Go on.", "completion": "Yes."}] * 40)
        search, _ = job("cofitune", general_data=[str(rows)], out=str(tmp_path / "search"), eval_every=0)
        train.run(search, replace(train.method_of("cofitune")[1], search_steps=1, importance_batches=1))
    left = {file.name for file in tmp_path.rglob("*") if file.suffix in (".part", ".old") or "checkpoint" in file.name}
    assert not left and (tmp_path / "as--hf" / "model.safetensors").exists()


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_checkouts_are_the_same_bytes_on_each_system(tmp_path):
    """So one takes up the other's run: with Windows' line ends asked for, in a folder with a space."""
    project = clone(tmp_path / "project")
    shutil.copy(HERE / ".gitattributes", project)
    git = lambda *args: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=project,
                                       check=True, capture_output=True)
    for args in (["init"], ["add", "."], ["commit", "-m", "all"],
                 ["clone", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", ".", tmp_path / "a copy"]):
        git(*args)
    files = [file.relative_to(project) for file in project.rglob("*") if file.is_file() and ".git" not in file.parts]
    assert len(files) > 80 and all((project / f).read_bytes() == (tmp_path / "a copy" / f).read_bytes() for f in files)


def test_a_torch_without_distributed(job, monkeypatch):
    for name in [name for name in dir(torch.distributed) if not name.startswith("__") and name != "is_available"]:
        monkeypatch.delattr(torch.distributed, name)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    try:
        importlib.reload(devices)
        assert "report" in train.run(*job("lora"))
        devices.end()
    finally:
        monkeypatch.undo()
        importlib.reload(devices)


# ---------------------------------------------------------------------------------------------- notebooks


def test_an_edited_method_is_imported_anew(small, tmp_path):
    project = clone(tmp_path / "project")
    written(project / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(40)])
    code = f"""if True:
        from pathlib import Path
        import train
        base = {str(small)!r}
        def report(out):
            return train.run(train.Config("lora", base, ["rows.jsonl"], steps=1, samples=0, out=out))["report"]
        assert report("one") and report("one")
        file = Path("multilora.py")
        file.write_text(file.read_text().replace('"total_rank"', '"edited"'))
        print("going:", "total_rank" in report("two"), "edited" in report("two"))
    """
    assert "going: False True" in cli("-c", code, cwd=project).stdout
    kept = json.loads((project / "two" / "config.json").read_text())["asked"]["code"]["multilora.py"]
    assert kept == digest(project / "multilora.py")


def test_readmes_python_runs_in_a_kernel():
    """Nothing is in its way there, such as another loop of events; the losses are a list, and fall."""
    pytest.importorskip("ipykernel")
    jupyter = pytest.importorskip("jupyter_client.manager")
    code, said = re.search("```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1], []
    manager, client = jupyter.start_new_kernel(cwd=str(HERE))
    listen = lambda message: said.extend(message["content"].get(key, "") for key in ("text", "evalue"))
    try:
        client.execute_interactive(f"{code}\nprint(len(losses), losses[0] > 9 * losses[-1])", output_hook=listen,
                                   timeout=120)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "".join(said) == "you did\n20 True\n"
