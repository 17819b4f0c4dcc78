"""A run is a folder, and the same command continues it.

The folder's config.json says what was asked for: settings, and the SHA-256 of the files that decide the numbers.
"""

import hashlib
import platform
import shlex
import shutil
import sys

import numpy
import safetensors
import tokenizers
import torch

from engine.flags import flag
from model import UserError, read_json

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "adapter.safetensors", "results.json",
             "search.json", "wise.json")


def open_folder(out, asked, overwrite):
    """What config.json says in the folder of this very run; {} where the run is to start. Raises UserError for a folder
    that holds anything else, naming the first thing that differs."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if overwrite or not out.is_dir() or all(file.suffix == ".part" for file in out.iterdir()):
        return {}
    saved = read_json(out / "config.json") if (out / "config.json").exists() else {}
    other = "config.json does not say what was asked for"
    if "asked" in saved:
        other = difference(saved["asked"], asked)
        if other is None:
            return saved
    raise UserError(f"{out} holds another run: {other}; choose another --out, or add --overwrite to start anew")


def clear_folder(out):
    """Makes the folder, and removes what an earlier run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    clear_parts(out)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "search", ignore_errors=True)


def clear_parts(out):
    """Removes files that a killed process had not finished writing."""
    for file in out.glob("*.part"):
        file.unlink(missing_ok=True)


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
                values = [v[:8] if v else "absent" for v in values]
                return f"{part} file {key} has changed since (SHA-256 {values[0]} then, {values[1]} now)"
            return "{} was {}, and is now {}".format(key, *values)


def provenance(argv):
    versions = {m.__name__: m.__version__ for m in (torch, numpy, tokenizers, safetensors)}
    return {"command": shlex.join(["python", *argv]),
            "versions": {"python": platform.python_version(), **versions}}


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, else the process's largest resident size (0 where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
