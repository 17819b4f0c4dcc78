"""Machines that this one is not: a GPU that is made of CPU tensors, and the rules that Windows has for files.

Within `gpu("cuda")` or `gpu("mps")`, what is made for the device or moved there is an OnDevice: a CPU tensor which says
that it lies elsewhere. Each call of a torch function is held to the device's rules. Not imitated: speed, rounding,
random numbers, and a backward pass from the inside.
"""

import os
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = {"item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
# What an Apple GPU lacks with the oldest torch of requirements.txt: {function: dtype, or None for all}.
LACKS = {"linalg_qr": None, "linalg_svd": None, "linalg_svdvals": None, "index_add_": torch.int64}


class OnDevice(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # Rules alone looks on
    device = None  # see gpu


class Rules(TorchFunctionMode):
    """waits: how often the host has waited for the device."""

    def __init__(self, device, broken):
        super().__init__()
        self.device, self.broken, self.waits = device, broken, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if func is torch.device:
            return func(*args, **kwargs)
        names = lambda x, kind: isinstance(x, (str, torch.device)) and str(x).split(":")[0] == kind
        leaves = tree_leaves((args, kwargs))
        arrives = any(names(x, self.device.type) for x in leaves)  # at the device
        leaves_it = name == "cpu" or name == "to" and any(names(x, "cpu") for x in leaves)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        if self.device.type == "mps" and kwargs.get("non_blocking"):
            raise RuntimeError("the numbers may be gone, or others, before they have arrived")
        if here:
            self.check(name, here, [x for x in tensors if x.dim() and not isinstance(x, OnDevice)], kwargs)
            self.waits += name in WAITS or leaves_it and here[0].dim() > 0
        args, kwargs = tree_map(lambda x: "cpu" if names(x, self.device.type) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if here and leaves_it:
            return result.as_subclass(torch.Tensor).clone()
        return tree_map(self.put, result) if arrives or here and name != "copy_" else result

    def check(self, name, here, elsewhere, kwargs):
        """Raises what the device would, for tensors of its own and of the CPU (numbers of the CPU are no harm)."""
        if self.broken:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        if elsewhere and name not in ("to", "copy_"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {self.device} and cpu")
        if name == "numpy":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        if self.device.type == "mps" and name in LACKS and LACKS[name] in (None, here[0].dtype):
            raise NotImplementedError(f"The operator {name!r} is not currently implemented for the MPS device")

    def put(self, x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        if self.device.type == "mps" and x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none")
        return x.as_subclass(OnDevice)


@contextmanager
def gpu(kind, broken=False, bfloat16=True):
    """A machine with one GPU, "cuda" or "mps". broken: it is there, and computes nothing. bfloat16: not emulated."""
    device, autocast = torch.device(kind, 0), torch.autocast
    with ExitStack() as stack:
        patch = lambda of, name, value: stack.enter_context(mock.patch.object(of, name, value))
        patch(OnDevice, "device", device)
        patch(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch(torch.cuda, "is_available", cache(lambda: kind == "cuda"))
        patch(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation)
        patch(torch.cuda, "max_memory_allocated", lambda device: 0)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)  # the optimiser asks, in one of two ways
        patch(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch(torch.backends.mps, "is_available", cache(lambda: kind == "mps"))
        yield stack.enter_context(Rules(device, broken))


# ---------------------------------------------------------------------------------------------- Windows

RULES = {}  # an audit hook is added once, and cannot be taken away again


def held(path):
    """Whether this process has the file open or mapped, or one in the folder."""
    files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    files += [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(os.path.isfile(file) and (file == path or file.startswith(f"{path}/")) for file in files)


def on_windows(event, args):
    if not RULES["windows"] or event not in ("os.remove", "os.rename"):
        return
    folder = "" if args[-1] == -1 else f"/proc/self/fd/{args[-1]}"  # where shutil.rmtree names it by its handle
    paths = [path for path in args if not isinstance(path, int)]
    first, *second = (os.path.realpath(os.path.join(folder, os.fsdecode(path))) for path in paths)
    if held(first) or any(held(path) or os.path.isdir(path) for path in second):
        raise PermissionError(13, "WinError 5, 32 or 1224: something has it open or mapped, or it is a folder", first)


@contextmanager
def windows():
    """Within, no file that is open or mapped is removed, replaced or renamed, nor a folder with one in it; no folder is
    replaced; runs are not locked."""
    if not RULES:
        sys.addaudithook(on_windows)
    RULES["windows"] = True
    try:
        with mock.patch("engine.folder.fcntl", None):
            yield
    finally:
        RULES["windows"] = False
