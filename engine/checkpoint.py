"""How far a run has come.

A checkpoint is one safetensors file with JSON in its header, so one rename makes it valid as a whole. It holds what
cannot be made again: the adapter's tensors, the optimiser's, the step, the losses not yet logged, the scores before
training, and seconds and tokens so far. It needs no random state, since the random numbers of a step come from
(seed, step), and no position in the data, since the order is drawn again.
"""

import json
import os
from contextlib import nullcontext

import torch

from engine import devices
from model import UserError, finite, open_tensors, written


class Checkpoint:
    """The checkpoint of a RunFolder, if there is one."""

    def __init__(self, folder):
        self.folder, self.facts = folder, {}  # what the last save said
        if self.path.exists():
            with open_tensors(self.path) as file:
                self.facts = json.loads(file.metadata()["facts"])

    @property
    def path(self):
        return self.folder.path / "checkpoint.safetensors"

    def save(self, adapter, optimizer, **facts):
        """facts are added to those of the last save; each is a JSON value."""
        facts = self.facts | facts
        tensors = {f"adapter.{name}": tensor for name, tensor in adapter.tensors().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": tensor for key, tensor in state.items()}
        save_tensors(self.path, tensors, {"facts": json.dumps(facts)})
        self.facts = facts
        self.folder.take_place()

    def load(self, adapter, optimizer):
        """Puts the adapter and the optimiser where the last save found them."""
        state, params = {}, [p for part in optimizer.param_groups for p in part["params"]]
        with open_tensors(self.path) as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}
        for name in [name for name in kept if name.startswith("optimizer.")]:
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = devices.like(params[int(i)], kept.pop(name))
        adapter.load_tensors({name.removeprefix("adapter."): tensor for name, tensor in kept.items()})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_tensors(path, tensors, metadata=None):
    """{name: tensor} as a safetensors file, which takes its place when it is whole. Raises UserError, and writes
    nothing, where one is not finite.

    Written one by one (safetensors' own function holds all of them in memory): the length of the header, the header,
    the bytes. A split tensor is put together for as long, by all processes; the first one writes, the others wait.
    """
    order, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    header = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": KINDS[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(path) if devices.first() else nullcontext(os.devnull) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            whole = devices.whole(tensors[name])
            if not finite(whole):
                raise UserError(f"{name} holds NaN or infinity and is not saved to {path}: try a lower --lr")
            if devices.first():
                file.write(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    devices.meet()
