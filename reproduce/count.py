"""What a method trains at a published model size, beside the published share. Makes no weights.

    python -m reproduce.count csreft llama-2-7b
    python -m reproduce.count multilora llama-2-7b --modules 2
"""

from dataclasses import asdict, replace

import torch

from engine.flags import Parser, add_flags, check, command_line
from model import Llama, LlamaConfig, count_parameters
from train import find_methods, method_of

# V, d, MLP width, layers, heads; from their config.json.
SHAPES = {"llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32), "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40),
          "llama-33b": LlamaConfig(32000, 6656, 17920, 60, 52)}
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


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=find_methods())
    parser.add_argument("size", choices=SHAPES)
    name = parser.parse_known_args()[0].method
    method, defaults = method_of(name)
    add_flags(parser.add_argument_group(name), replace(defaults, **PAPERS.get(name, {})))
    args = parser.parse_args()
    config = replace(defaults, **{key: getattr(args, key) for key in asdict(defaults)})
    check(config)
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


if __name__ == "__main__":
    command_line(main)
