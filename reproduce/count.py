"""What a method trains at a published model size, and the memory that this takes. Makes no weights. The settings are
the paper's, where flags of `train.py` do not change them.

    python -m reproduce.count multilora llama-2-7b --modules 2 --devices 8
"""

import torch

from engine.flags import Parser, check, command_line
from model import Llama, LlamaConfig
from train import count_parameters, find_methods, method_of, parse

# V, d, MLP width, layers, heads, heads of keys and values; from their config.json.
SHAPES = {"llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32), "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40),
          "llama-33b": LlamaConfig(32000, 6656, 17920, 60, 52),
          "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8)}
# The papers' settings at these sizes.
PAPERS = {"multilora": "--modules 3 --rank 32", "lora": "--rank 96", "csreft": "--rank 4 --layers 3,9,18,24",
          "loreft": "--rank 4 --layers 3,9,18,24", "cofitune": "--layers 25%-50%"}


def trained(shape, method, config):
    """({kind: parameters trained}, how many of them are the base's); a kind is a tensor's last name, or the router."""
    with torch.device("meta"):
        model = Llama(shape)
        in_base = {name for name, _ in model.named_parameters()}
        method.attach(model, config)
    kinds, weights = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "router" if ".router." in name else name.removesuffix(".weight").rsplit(".", 1)[-1]
            kinds[kind] = kinds.get(kind, 0) + p.numel()
            weights += p.numel() * (name in in_base)
    return kinds, weights


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=find_methods())
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--devices", type=int, default=1, help="GPUs that the base is split over (%(default)s)")
    args, given = parser.parse_known_args()
    flags = [*PAPERS.get(args.method, "").split(), *given]
    _, config = parse(["--method", args.method, *flags])
    check(config)
    kinds, weights = trained(SHAPES[args.size], method_of(args.method)[0], config)
    base, total = count_parameters(SHAPES[args.size]), sum(kinds.values())
    print(f"{args.size}: {base:,} parameters; {args.method} {' '.join(flags)}")
    rows = {**kinds, "together": total}
    if "router" in kinds:
        rows["without the router"] = total - kinds["router"]
    if args.method == "loreft":  # the paper has an edit for the prompt's first tokens and one for its last
        rows["prefix and suffix apart"] = 2 * total
    for kind, number in rows.items():
        print(f"  {kind:<26}{number:>16,}{100 * number / base:>10.4f} %")
    # Frozen weights are bfloat16; trained tensors, gradients and AdamW's two moments float32. On several devices the
    # base's weights are split, as with `train.py --shard`.
    devices = max(1, args.devices)
    frozen, moved = 2 * (base - weights) / devices, 4 * 4 * (weights / devices + total - weights)
    print(f"GB on each device: frozen weights {frozen / 1e9:.1f}, trained, with gradients and moments "
          f"{moved / 1e9:.1f}")


if __name__ == "__main__":
    command_line(main)
