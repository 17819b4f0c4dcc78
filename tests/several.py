"""What each of several processes does for test_devices.py: torchrun ... -m tests.several FOLDER CASES. CASES is JSON,
{name: [method, its settings, train's settings]}; FOLDER gets each one's tensors, and their SHA-256 from every process.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from engine import devices
from engine.checkpoint import save_tensors
from engine.folder import digest
from tests.helpers import settled, trained_on_builtin


def trained(case):
    """(model, adapter) after the steps of a case, in this process or in all of them."""
    name, own, settings = case
    method, config = settled(name)
    settings = {"steps": 12, **settings, "dtype": getattr(torch, settings.get("dtype", "float64"))}
    return trained_on_builtin(method, replace(config, **own), **settings)


def main():
    devices.join()
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, case in cases.items():
        _, adapter = trained(case)
        tensors = {key: devices.whole(tensor) for key, tensor in adapter.tensors().items()}
        save_tensors(folder / f"{name}.safetensors", adapter.tensors())
        own = folder / f"{name}.{devices.rank()}"
        own.write_bytes(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors)))
        own.write_text(digest(own))
    devices.leave(0)


if __name__ == "__main__":
    main()
