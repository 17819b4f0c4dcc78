"""How far a run has come.

A checkpoint is one safetensors file with JSON in its header, so one rename makes it valid as a whole. It holds the
adapter's tensors, the optimiser's, the step, the losses not yet logged, the scores before training, and seconds and
tokens so far. It needs no random state, since the random numbers of a step come from (seed, step), and no position in
the data, since the order is drawn again.
"""

import json

import torch
from safetensors.torch import save_file

from engine import devices
from model import UserError, open_tensors, written


class Checkpoint:
    """The checkpoint of a run folder, if there is one. facts: JSON values that are saved with it."""

    def __init__(self, path):
        self.file, self.facts = path / "checkpoint.safetensors", {}
        if self.file.exists():
            with open_tensors(self.file) as file:
                self.facts = json.loads(file.metadata()["facts"])

    def save(self, adapter, optimizer, **facts):
        """facts are added to those of the last save."""
        facts = self.facts | facts
        tensors = {f"adapter.{name}": tensor for name, tensor in adapter.tensors().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items()
                        if value is not None}
        save_tensors(self.file, tensors, {"facts": json.dumps(facts)})
        self.facts = facts

    def load(self, adapter, optimizer):
        """Puts the adapter and the optimiser where the last save found them."""
        state, params = {}, [p for part in optimizer.param_groups for p in part["params"]]
        saved = load_tensors(self.file)
        for name in [name for name in saved if name.startswith("optimizer.")]:
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = devices.shard_like(params[int(i)], saved.pop(name))
        adapter.load_tensors({name.removeprefix("adapter."): tensor for name, tensor in saved.items()})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_tensors(path):
    """{name: tensor} of a safetensors file, copied out of it: the file may be replaced afterwards."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def save_tensors(path, tensors, metadata=None):
    """{name: tensor} as a safetensors file, by one process. Raises UserError, writing nothing, for NaN or infinity."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = devices.full(tensor)
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity and is not saved to {path}: try a lower --lr")
        if devices.is_main():
            whole[name] = tensor.cpu().contiguous()
    if devices.is_main():
        with written(path) as part:
            save_file(whole, part, {"format": "pt", **(metadata or {})})
    devices.barrier()
