"""One run on several devices, by torch's own engine: `torchrun --nproc-per-node N train.py ...`.

Every process draws the same group of examples and works on its share of it. Unless the base is split, each holds the
whole model; what is trained are copies, which stay equal because one sum a step adds up their gradients. With one
process every function here is the identity. gloo carries what lies on CPUs, nccl what lies on GPUs.
"""

import ctypes
import os
import random
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby

import torch
import torch.distributed as dist

from engine.progress import progress
from model import Llama, UserError

PIECE = 2**24  # numbers that are sent at once, about: they are copied for it
store = None  # what all processes can write to, also while some of them wait or have failed

# ---------------------------------------------------------------------------------------------- processes


def join():
    """Meets the other processes where torchrun started this one. Only the first one prints from here on."""
    global store
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    store, rank, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=count)
    if rank:
        sys.stdout = open(os.devnull, "w")
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(launcher):
    """Ends this process once its launcher has been killed, whatever it is waiting for."""
    while os.getppid() == launcher:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def meet():
    """Waits until all processes have come so far."""
    largest(0)


def leave(code):
    """Ends this process; one of several at once, since threads of torch may abort while Python takes itself down."""
    if not dist.is_initialized():
        sys.exit(code)
    if not code:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def first():
    """Whether this is the process that writes."""
    return rank() == 0


def speaks():
    """Whether this process may say why the run ends: the first one that asks."""
    try:
        return store is None or store.add("spoken", 1) == 1
    except RuntimeError:  # the launcher, which holds the store, has gone
        return False


def lost(error):
    """Whether an exception means that another process has gone."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def launcher():
    """What stands before the program's name in the command that started this process."""
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if dist.is_initialized() else ["python"]


def own(device):
    """What "cuda" means for this process: the GPU of its number on this machine. Other devices stay as they are."""
    if count() == 1 or not device.startswith("cuda"):
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cuda" or local >= there:
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes take a GPU each: give --device cuda where there "
                        f"are as many (here {there}), or --device cpu")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


# ---------------------------------------------------------------------------------------------- one step


def share(examples):
    """This process's part of a micro-batch. Where there are fewer examples than processes, some get one without
    labels, because every process must call a split model equally often."""
    part = examples[rank() :: count()]
    return part or [replace(examples[0], labels=[-100] * len(examples[0].labels))]


def weigh(penalty, examples):
    """This process's addend of a micro-batch's penalty. One that is a mean over examples counts by its share of them;
    one of split weights is a sum, of which each process has its own."""
    if split(penalty):
        return penalty.to_local()
    return penalty if count() == 1 else penalty * (len(examples[rank() :: count()]) / len(examples))


def seed(*numbers):
    """A seed from these numbers and from that of the process; the first one's is that of a run without others."""
    return random.Random(" ".join(map(str, numbers + (rank(),) * (rank() > 0)))).getrandbits(63)


def add_up(params, loss):
    """Adds up the gradients of all processes, and returns the sum of their losses. Gradients of split weights are added
    up where backward() makes them."""
    if count() == 1:
        return loss
    grads = [p.grad for p in params if p.grad is not None and not split(p)]
    for _, piece in groupby(zip(grads, accumulate(g.numel() for g in grads)), lambda pair: pair[1] // PIECE):
        piece = [g for g, _ in piece]
        flat = torch.cat([g.flatten() for g in piece])
        dist.all_reduce(flat)
        for g, part in zip(piece, flat.split([g.numel() for g in piece])):
            g.copy_(part.view_as(g))
    dist.all_reduce(loss)
    return loss


def largest(number):
    """The largest of a whole number over all processes."""
    if count() > 1:
        dist.all_reduce(found := torch.tensor(number), dist.ReduceOp.MAX)
        return found.item()
    return number


# ---------------------------------------------------------------------------------------------- around the steps


def from_first(function):
    """function() of the first process, given to all."""
    if count() == 1:
        return function()
    found = [function() if first() else None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def every(function, parts, what):
    """[function(part) for part in parts] everywhere, the calls dealt out to the processes. All make equally many, the
    last ones in vain, because a call of a split model is everybody's. what: as in progress."""
    calls = -(-len(parts) // count())
    turns = (parts[min(call * count() + rank(), len(parts) - 1)] for call in range(calls))
    mine = [function(part) for part in progress(turns, what, calls)]
    if count() == 1:
        return mine
    found = [None] * count()
    dist.all_gather_object(found, mine)
    return [found[i % count()][i // count()] for i in range(len(parts))]


# ---------------------------------------------------------------------------------------------- split weights


def split(tensor):
    """Whether each process holds only a part of this tensor (a DTensor, whose module takes a second to import)."""
    return hasattr(tensor, "full_tensor")


def load(base, device, dtype, shard):
    """The base model; with shard each process keeps only its part of every weight, by FSDP2.

    Until then the weights are mapped from the file as they are stored, so no process ever holds them all. A method is
    attached afterwards, so its own tensors stay whole.
    """
    if not shard:
        return Llama.from_pretrained(base, device, dtype)
    if not dist.is_initialized():
        raise UserError("--shard splits the base over processes: torchrun --nproc-per-node N train.py ... starts them")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    if device.type == "cpu":  # M_MMAP_THRESHOLD: glibc would keep what was put together, for later
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(-3, 2**20)
    model, mesh = Llama.from_pretrained(base, dtype=None), dist.init_device_mesh(device.type, (count(),))
    # Autocast would keep a whole narrow copy of each wide weight until backward(), so they are sent narrow already.
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # The root, too, or its weights would stay whole after an evaluation, unseen by the optimiser.
        fully_shard(module, mesh=mesh, reshard_after_forward=True,
                    mp_policy=narrow if dtype == torch.bfloat16 else MixedPrecisionPolicy())
        module.set_gradient_divide_factor(1.0)  # sums, as the loss is divided by the labels of all
        module.set_force_sum_reduction_for_comms(True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes to it
    model.dtype = dtype
    model.generate = partial(model.generate, finished=lambda ended: -largest(-int(ended.all())))  # all together
    for name in ("labelled_logits", "generate"):
        register_fsdp_forward_method(model, name)
    return model.to(dtype)


@contextmanager
def prepared(model):
    """Within, the weights outside the layers are whole, for what reads them without a pass through the model."""
    parts = split(model.lm_head.weight)
    if parts:
        model.unshard()
    yield
    if parts:
        model.reshard()


def mixed(model):
    """Within, a whole tensor meets a split one as if it were split alike."""
    if not split(model.lm_head.weight):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication
    return implicit_replication()


def whole(tensor):
    """The whole of a tensor, put together by all processes where it is split."""
    return tensor.full_tensor() if split(tensor) else tensor


def like(weight, tensor):
    """This process's part of a tensor, where it has the shape of a split weight."""
    if not split(weight) or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
