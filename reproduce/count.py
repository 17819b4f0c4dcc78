"""What a method trains at a published model size, beside the published share; with --devices also the memory that each
device needs, and what it sends in a step. Makes no weights.

    python -m reproduce.count csreft llama-2-7b
    python -m reproduce.count multilora llama-2-7b --modules 2
    python -m reproduce.count sft llama-2-70b --devices 64 --shard
"""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch._subclasses import FakeTensorMode

from engine.flags import Parser, add_flags, check, command_line
from model import LOGITS, Context, Llama, LlamaConfig, count_parameters
from train import find_methods, method_of

# V, d, MLP width, layers, heads; from their config.json.
SHAPES = {"llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32), "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40),
          "llama-33b": LlamaConfig(32000, 6656, 17920, 60, 52),
          "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8)}
# The papers' settings at these sizes, which are the defaults here.
PAPERS = {"multilora": {"modules": 3, "rank": 32}, "lora": {"rank": 96}, "csreft": {"rank": 4, "layers": "3,9,18,24"},
          "loreft": {"rank": 4, "layers": "3,9,18,24"}, "cofitune": {"layers": "25%-50%"}}
PUBLISHED = {("csreft", "llama-2-7b"): "0.0098 % (which the router alone exceeds)",
             ("loreft", "llama-2-7b"): "0.0039 % (prefix and suffix have edits of their own: twice these)"}


def trained(shape, method, config):
    """{kind of tensor: parameters trained}; a kind is the last part of its name, or the router's whole."""
    with torch.device("meta"):
        model = Llama(shape)
        method.attach(model, config)
    kinds = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "router" if ".router." in name else name.removesuffix(".weight").rsplit(".", 1)[-1]
            kinds[kind] = kinds.get(kind, 0) + p.numel()
    return kinds


@dataclass
class Machines:
    """What --devices asks about."""

    devices: Annotated[int, "processes, each with a device of its own; 0 leaves the memory out", "[0, inf)"] = 0
    shard: Annotated[bool, "the base's weights are split over them"] = False
    batch_size: Annotated[int, "examples in a micro-batch, over all devices", "[1, inf)"] = 16
    grad_accum: Annotated[int, "micro-batches in a step", "[1, inf)"] = 1
    length: Annotated[int, "tokens of an example, each with a label", "[2, inf)"] = 512
    dtype: Annotated[Literal["bfloat16", "float32"], "of frozen weights and computation"] = "bfloat16"


def activations(shape, method, config, rows, length, dtype, wide):
    """(bytes kept for backward(), the same with --grad-checkpointing): what autograd saves in one pass over rows of
    this length, on tensors without storage, and the logits of one piece with their gradients. wide: trained weights
    are float32, of which autocast makes narrow copies; split ones are narrow already."""
    kept, marks = {}, []
    held = lambda: sum(size for _, size in kept.values())

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage, storage.nbytes()  # held, so that no other one gets its number
        return tensor

    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        model = Llama(shape).train()
        torch.set_default_dtype(torch.float32)
        model.dtype = dtype
        method.attach(model, config)
        for p in model.parameters():
            if p.requires_grad and wide:
                p.data = p.data.float()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for module in (*model.model.layers, model.model.norm):
            module.register_forward_pre_hook(lambda *_: marks.append(held()))
        ids = torch.zeros(rows, length, dtype=torch.long)
        labelled = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
        ctx = Context(torch.ones(rows, length, dtype=torch.bool), ids[:, 0], labelled)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), model.autocast():
            model(ids, ids, ctx)
    layers = [after - before for before, after in pairwise(marks)]
    logits = rows * (length - 1) * shape.vocab_size
    # Their log-softmax is kept where they are one piece; pieces are made again, narrow and wide, for their own.
    outside = held() - sum(layers) + (4 * logits if logits <= LOGITS else (dtype.itemsize + 12) * LOGITS)
    inputs = sum(size > 0 for size in layers) * rows * length * shape.hidden_size * dtype.itemsize
    return outside + sum(layers), inputs + max(outside, *layers)


def demands(shape, method, config, machines):
    """{what: bytes on each device}, and the bytes that each device sends in a step."""
    n, dtype = machines.devices, getattr(torch, machines.dtype)
    size, parts = dtype.itemsize, n if machines.shard else 1
    with torch.device("meta"):
        model = Llama(shape)
        names = {name for name, _ in model.named_parameters()}
        method.attach(model, config)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in names}
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    base = sum(trained.get(name, 0) for name in names)  # of what is trained, the weights of the base
    own = sum(trained.values()) - base
    layer = [name for name in sizes if name.startswith("model.layers.0.")]
    outside = [name for name in sizes if not name.startswith("model.layers.")]
    most = lambda of, some: sum(of.get(name, 0) for name in some)
    moved = 4 * (base / parts + own)
    saved, again = activations(shape, method, config, -(-machines.batch_size // n), machines.length, dtype,
                               not machines.shard)
    # Whole for a while, where weights are split: what lies outside the layers, a layer, the next one, and gradients.
    whole = (most(sizes, outside) + 2 * most(sizes, layer) + most(trained, outside)) * size
    whole += most(trained, layer) * (size + 4)
    share = (n - 1) / n
    sums = 2 * share * 4 * own + share * 4 * base * (machines.grad_accum if machines.shard else 2)
    gathers = 2 * share * size * sum(sizes.values()) * machines.grad_accum if machines.shard else 0
    return {"frozen weights": (sum(sizes.values()) - base) * size / parts, "trained tensors": moved,
            "gradients": moved, "optimiser, two moments": 2 * moved,
            "whole for a while": whole if machines.shard else 0,
            "kept for the backward pass": saved, "with --grad-checkpointing": again}, sums + gathers


def show_demands(memory, sent):
    *steady, saved, again = memory.values()
    for what, number in [*memory.items(), ("together", sum(steady) + saved),
                         ("together, --grad-checkpointing", sum(steady) + again), ("sent in a step", sent)]:
        print(f"  {what:<34}{number / 1e9:>9.1f}")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=find_methods())
    parser.add_argument("size", choices=SHAPES)
    name = parser.parse_known_args()[0].method
    method, defaults = method_of(name)
    add_flags(parser.add_argument_group(name), replace(defaults, **PAPERS.get(name, {})))
    add_flags(parser.add_argument_group("memory"), Machines())
    args = parser.parse_args()
    config, machines = (replace(of, **{key: getattr(args, key) for key in asdict(of)}) for of in (defaults, Machines()))
    for settings in (config, machines):
        check(settings)
    kinds, base = trained(SHAPES[args.size], method, config), count_parameters(SHAPES[args.size])
    changed = " ".join(f"{key} {value}" for key, value in asdict(config).items() if value != getattr(defaults, key))
    print(f"{args.size}: {base:,} parameters; {name} {changed}")
    total = sum(kinds.values())
    rows = [*kinds.items(), ("together", total)]
    if "router" in kinds:
        rows.append(("without the router", total - kinds["router"]))
    if name == "loreft":
        rows.append(("prefix and suffix apart", 2 * total))
    for kind, number in rows:
        print(f"  {kind:<26}{number:>16,}{100 * number / base:>10.4f} %")
    if (name, args.size) in PUBLISHED:
        print(f"  published: {PUBLISHED[name, args.size]}")
    if machines.devices:
        print(f"GB (1e9 bytes) for each of {machines.devices} devices, {'split' if machines.shard else 'copies'}, "
              f"{machines.dtype}, {machines.grad_accum} x {machines.batch_size} x {machines.length} tokens in a step")
        show_demands(*demands(SHAPES[args.size], method, config, machines))


if __name__ == "__main__":
    command_line(main)
