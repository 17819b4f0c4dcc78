"""A run is a folder, and the same command continues it.

The folder's config.json says what was asked for: settings, and the SHA-256 of the files that decide the numbers.
Nothing that lies there is deleted before something whole can take its place.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch

from engine import devices
from engine.flags import flag
from model import UserError, read_json

try:
    import fcntl
except ImportError:  # Windows, where runs are not locked
    fcntl = None

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "adapter.safetensors", "results.json",
             "search.json", "wise.json", "samples.json", "best.safetensors", "plot.png")


def open_folder(out, asked, overwrite):
    """What config.json says in the folder of this very run; {} where the run is to start. Raises UserError for a folder
    that holds anything else, naming the first thing that differs."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if overwrite or not out.is_dir() or all(file.suffix == ".part" for file in out.iterdir()):
        return {}
    saved = read_json(out / "config.json") if (out / "config.json").exists() else {}
    other = "config.json does not say what was asked for"
    if isinstance(saved.get("asked"), dict):
        other = difference(saved["asked"], asked)
        if other is None:
            return saved
    raise UserError(f"{out} holds another run: {other}; choose another --out, or add --overwrite to start anew")


def beside(out, kind):
    """The hidden file or folder of this kind beside a run folder."""
    out = out.resolve()
    return out.with_name(f".{out.name}.{kind}")


@contextmanager
def locked(out):
    """Within, no other process works in this run folder. The lock is the operating system's, on a file beside the
    folder, so one that a killed process left does not hold. Raises UserError where another process has it."""
    file = beside(out, "lock")
    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        while True:
            held = False
            with open(file, "w") as handle:
                try:
                    fcntl and fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise UserError(f"another process works in {out}: wait for it, or choose another --out") from None
                with suppress(FileNotFoundError):
                    held = os.path.samestat(os.fstat(handle.fileno()), file.stat())
                if not held:
                    continue  # its last holder has just removed it
                try:
                    repair(out)
                    yield
                finally:
                    repair(out)
                    file.unlink()
            return
    finally:
        with suppress(OSError):  # not empty: something was left there
            for folder in made:
                folder.rmdir()


def repair(out):
    """Ends what a process began that was killed while a new run took an old one's place."""
    new, old = beside(out, "new"), beside(out, "old")
    if not out.exists() and old.exists():
        (new if new.exists() else old).rename(out)
    for left in (new, old):
        if left.exists():
            shutil.rmtree(left)
    for file in out.glob("**/*.part"):  # not whole
        file.unlink()


class RunFolder:
    """The folder that a run works in: `path` is `out` itself, or with overwrite a new one beside it, until
    take_place()."""

    def __init__(self, out, overwrite=False):
        self.out = out.resolve() if out.is_symlink() else out
        self.path = beside(out, "new") if overwrite and out.exists() else out

    def take_place(self):
        """The new folder becomes `out`; what lies in the old one and belongs to no run moves along."""
        if self.path == self.out or not devices.first():
            return
        old = beside(self.out, "old")
        for file in self.out.iterdir():
            if file.name not in (*RUN_FILES, "search") and not (self.path / file.name).exists():
                file.rename(self.path / file.name)
        self.out.rename(old)
        self.path.rename(self.out)
        self.path = self.out
        shutil.rmtree(old)


def refuse_inputs(out, inputs):
    """Raises UserError where an output folder is, or holds, something that the run reads."""
    for file in inputs:
        if out.resolve() in (Path(file).resolve(), *Path(file).resolve().parents):
            raise UserError(f"--out {out} is or holds {file}, which this run reads: choose another --out")


def room_for(out, size):
    """Raises UserError where the disk has no room for `size` bytes below a folder that may not be there yet."""
    there = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise UserError(f"{there} has room for {free / 1e6:,.1f} MB, and checkpoints of this run need "
                        f"{size / 1e6:,.1f}: choose another --out")


def digest(*files):
    """SHA-256 over the bytes of files, one after the other."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def difference(old, new):
    """The first thing in which two identities of a run differ, in words with both values, or None."""
    for part in dict.fromkeys([*old, *new]):
        was, now = old.get(part), new.get(part)
        if not isinstance(was, dict) or not isinstance(now, dict):
            was, now = {part: was}, {part: now}
        for key in dict.fromkeys([*was, *now]):
            values = was.get(key), now.get(key)
            if values[0] == values[1]:
                continue
            if part.endswith("settings"):
                return "{} was {}, and is now {}".format(flag(key), *map(repr, values))
            if part in ("base", "data", "code"):
                values = [str(v)[:8] if v else "absent" for v in values]
                return f"{part} file {key} has changed since (SHA-256 {values[0]} then, {values[1]} now)"
            return "{} was {}, and is now {}".format(key, *values)


def provenance(argv):
    versions = {m.__name__: m.__version__ for m in (torch, numpy, tokenizers, safetensors)}
    return {"command": shlex.join([*devices.launcher(), *argv]),
            "versions": {"python": platform.python_version(), **versions}}


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, else the process's largest resident size (0 where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where getrusage counts the program that started this one, too
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
