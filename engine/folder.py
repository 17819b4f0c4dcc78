"""A run is a folder, and the same command continues it.

The folder's config.json says what was asked for: settings, and the SHA-256 of the files that decide the numbers.
`--overwrite` renames the old run to OUT.old, where it stays until the new one is finished.
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
from model import UserError, read_json, write_json

try:
    import fcntl
    import resource
except ImportError:  # Windows, where runs are not locked, and their peak memory is not known
    fcntl = resource = None

MARK = "overwritten"  # a file that says of OUT.old that --overwrite made it
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "adapter.safetensors", "results.json",
             "samples.json", "plot.png", "search", MARK)


class RunFolder:
    """The folder of one run. The main process writes in it; what the others are asked to write is skipped."""

    def __init__(self, path):
        self.path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        self.old, self.handles = self.path.with_name(f"{self.path.name}.old"), []

    @contextmanager
    def locked(self):
        """Within, no other run works in this folder. The lock is the operating system's, on the folder itself, so a
        killed process leaves none. Raises UserError where another process has it."""
        if devices.is_main():
            self.lock()
        try:
            yield self
        finally:
            with suppress(OSError):  # not empty, or without an old run
                if devices.is_main():
                    self.path.rmdir()
                    (self.old / MARK).unlink()
                    self.old.rename(self.path)
            for handle in self.handles:
                os.close(handle)

    def lock(self):
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file, expected a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl:
            self.handles.append(os.open(self.path, os.O_RDONLY))
            try:
                fcntl.flock(self.handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process works in {self.path}: wait for it, or choose another --out") from None

    def saved(self, asked):
        """What config.json says in the folder of this very run; {} in an empty folder. Raises UserError for a folder
        that holds anything else, naming the first thing that differs."""
        files = list(self.path.iterdir())
        parts = [file for file in files if file.suffix == ".part"]  # of writes that were killed
        saved = read_json(self.path / "config.json") if (self.path / "config.json").exists() else {}
        other = difference(saved["asked"], asked) if "asked" in saved else "config.json is not a run's"
        if other and parts != files:
            raise UserError(f"{self.path} holds another run: {other}; choose another --out, or add --overwrite to "
                            "start anew")
        for part in parts:
            part.unlink()
        return saved

    def move_away(self):
        """The run in this folder becomes OUT.old; where there is one already, an unfinished run is removed instead."""
        if self.old.exists() and (self.path / "results.json").exists():
            raise UserError(f"--overwrite would rename {self.path} to {self.old}, which exists: remove one of them")
        if self.old.exists():
            self.remove(*RUN_FILES)
        elif any(self.path.iterdir()):
            (self.path / MARK).touch()
            self.path.rename(self.old)
            self.lock()

    def write(self, name, value):
        if devices.is_main():
            write_json(self.path / name, value)

    def remove(self, *names):
        for file in (self.path / name for name in names if devices.is_main()):
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    def finish(self, results):
        """Writes results.json; removes the checkpoint and OUT.old. Files there that belong to no run move here."""
        self.write("results.json", results)
        self.remove("checkpoint.safetensors")
        if devices.is_main() and (self.old / MARK).exists():
            for file in self.old.iterdir():
                if file.name not in RUN_FILES and not (self.path / file.name).exists():
                    file.rename(self.path / file.name)
            shutil.rmtree(self.old)


def refuse_inputs(out, inputs):
    """Raises UserError where an output folder has no name, or is, or holds, something that the run reads."""
    if out.name in ("", ".."):
        raise UserError(f"--out {out} has no name of its own: name a folder, such as out/lora")
    for file in inputs:
        if out.resolve() in (Path(file).resolve(), *Path(file).resolve().parents):
            raise UserError(f"--out {out} is or holds {file}, which this run reads: choose another --out")


def digest(file):
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
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
            if part in ("base", "data", "code"):
                values = [str(v)[:8] if v else "absent" for v in values]
                return f"{part} file {key} has changed since (SHA-256 {values[0]} then, {values[1]} now)"
            return "{} was {}, and is now {}".format(flag(key) if "settings" in part else key, *map(repr, values))


def provenance(argv):
    versions = {m.__name__: m.__version__ for m in (torch, numpy, tokenizers, safetensors)}
    processes = devices.world_size()
    start = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"]
    return {"command": shlex.join([*start, *(arg for arg in argv if arg != "--overwrite")]),
            "versions": {"python": platform.python_version(), **versions}}


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, else the process's largest resident size (0 where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where getrusage counts the program that started this one, too
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
