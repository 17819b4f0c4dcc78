"""One run on several devices, by torch's own engine: `torchrun --nproc-per-node N train.py ...`.

Every process draws the same group of examples and works on its share of it. Each holds a copy of the model, and the
trained tensors stay equal because one sum a step adds up their gradients. With `--shard` the base's weights are split
instead (FSDP2). With one process every function here is the identity. gloo serves CPUs, nccl GPUs.
"""

import os
import random
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from engine.progress import progress
from model import Llama, UserError

is_initialized = getattr(dist, "is_initialized", lambda: False)  # some builds of torch have no more than the name

# ---------------------------------------------------------------------------------------------- processes


def init():
    """Joins the other processes where torchrun started this one. Only the main one prints from here on."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def end():
    """Waits for the other processes and ends this one at once: torch's threads may abort while Python shuts down."""
    if is_initialized():
        barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def world_size():
    return dist.get_world_size() if is_initialized() else 1


def rank():
    return dist.get_rank() if is_initialized() else 0


def is_main():
    """Whether this process writes the files."""
    return rank() == 0


def barrier():
    """Waits until all processes have come so far."""
    all_reduce_max(0)


def local_device(device):
    """The device of this process: "cuda" means the GPU of its local number. Other devices stay as they are."""
    if world_size() == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda" or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes take a GPU each: give --device cuda where there "
                        f"are as many (here {torch.cuda.device_count()}), or --device cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def from_main(function):
    """function() of the main process, given to all."""
    found = [function() if is_main() else None]
    if world_size() > 1:
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def map_over_processes(function, parts, what):
    """[function(part) for part in parts] in every process, the calls dealt out to them. All make the same number of
    calls, padded with dummies: each call of a sharded model needs every process. what: see progress."""
    calls = -(-len(parts) // world_size())
    turns = (parts[min(call * world_size() + rank(), len(parts) - 1)] for call in range(calls))
    mine = [function(part) for part in progress(turns, what, calls)]
    if world_size() == 1:
        return mine
    found = [None] * world_size()
    dist.all_gather_object(found, mine)
    return [found[i % world_size()][i // world_size()] for i in range(len(parts))]


# ---------------------------------------------------------------------------------------------- one step


def share(examples):
    """This process's part of a micro-batch; instead of none an example without labels, see map_over_processes."""
    part = examples[rank() :: world_size()]
    return part or [replace(examples[0], labels=[-100] * len(examples[0].labels))]


def scale_penalty(penalty, examples):
    """A micro-batch's mean penalty, scaled by this process's share of its examples."""
    return penalty if world_size() == 1 else penalty * (len(examples[rank() :: world_size()]) / len(examples))


def seed(*numbers):
    """A seed from these numbers and the rank; rank 0 has the seed of a run with one process."""
    return random.Random(" ".join(map(str, numbers + (rank(),) * (rank() > 0)))).getrandbits(63)


def all_reduce_gradients(params, loss):
    """Adds up the processes' gradients (FSDP2 has, for sharded weights) and losses; returns the losses' sum."""
    if world_size() > 1:
        for p in params:
            if p.grad is not None and not is_sharded(p):
                dist.all_reduce(p.grad)
        dist.all_reduce(loss)
    return loss


def all_reduce_max(number):
    """The largest of a whole number over all processes."""
    if world_size() > 1:
        dist.all_reduce(found := torch.tensor(number), dist.ReduceOp.MAX)
        return found.item()
    return number


# ---------------------------------------------------------------------------------------------- sharded weights


def is_sharded(tensor):
    """Whether each process holds only a part of this tensor (a DTensor, whose module takes a second to import)."""
    return hasattr(tensor, "full_tensor")


def load(base, device, dtype, shard):
    """The base model; with shard each process keeps only its part of every weight, by FSDP2. Until then the weights are
    mapped from the file, so no process ever holds them all. A method is attached afterwards: its tensors stay whole."""
    if not shard:
        return Llama.from_pretrained(base, device, dtype)
    if not is_initialized():
        raise UserError("--shard splits the base over processes: torchrun --nproc-per-node N train.py ... starts them")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    model, mesh = Llama.from_pretrained(base, dtype=None), dist.init_device_mesh(device.type, (world_size(),))
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
    model.generate = partial(model.generate, finished=lambda ended: -all_reduce_max(-int(ended.all())))
    for name in ("labelled_logits", "continuation_logits", "generate"):
        register_fsdp_forward_method(model, name)
    return model.to(dtype)


@contextmanager
def unsharded(model):
    """Within, the weights outside the layers are whole, for what reads them without a pass through the model."""
    sharded = is_sharded(model.lm_head.weight)
    if sharded:
        model.unshard()
    yield
    if sharded:
        model.reshard()


def allow_sharded(model):
    """Within, a whole tensor meets a sharded one as if it were sharded in the same way."""
    if not is_sharded(model.lm_head.weight):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication
    return implicit_replication()


def full(tensor):
    """The whole of a tensor, put together by all processes where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(weight, tensor):
    """This process's part of a tensor that has the shape of a sharded weight."""
    if not is_sharded(weight) or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
