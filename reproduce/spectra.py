"""Singular values of the update ΔW that a run learned, and how near it is to another run's.

    python -m reproduce.spectra out/multilora --against out/sft

The first values are divided by their sum; their effective rank is the exponential of their entropy (Roy and Vetterli,
2007). "Similarity" is the share of one update's leading subspace that lies in the other's (LoRA, section 7.2).
"""

from pathlib import Path
from statistics import mean

import torch

from engine.flags import Parser, command_line
from model import LINEARS, UserError
from multilora import singular_values, spread
from train import load_run


def similarity(a, b, count):
    """Share of a's leading left subspace that lies in b's, 0 to 1: ||U_a^T U_b||_F^2 / count."""
    ua, ub = (torch.linalg.svd(m.double(), full_matrices=False).U[:, :count] for m in (a, b))
    return ((ua.T @ ub) ** 2).sum().item() / count


def changes(run_dir):
    """({weight name: ΔW}, its total rank or None) of a run: from its factors, or as saved weight minus the base's."""
    model, adapter, saved = load_run(run_dir)
    if hasattr(adapter, "deltas"):
        return adapter.deltas(), adapter.report()["total_rank"]
    base = type(model).from_pretrained(saved["asked"]["settings"]["base"]).state_dict()
    moved = {name: tensor - base[name] for name, tensor in adapter.tensors().items() if name in base
             and name.removesuffix(".weight").endswith(LINEARS)}
    if not moved:
        raise UserError(f"{run_dir}: the method {saved['method']!r} changes no weight matrix, so there is no spectrum")
    return moved, None


def figures(deltas, rank, others):
    """Means over {name: ΔW}: the first `rank` singular values, their spread, and the similarity to others' of the same
    name (None without any)."""
    values = torch.stack([singular_values(delta, rank) for delta in deltas.values()])
    shares, ranks = zip(*map(spread, values))
    shared = [similarity(delta, others[name], rank) for name, delta in deltas.items() if name in others]
    return {"values": values.mean(0).tolist(), "first_value_share": mean(shares), "effective_rank": mean(ranks),
            "similarity_to_sft": mean(shared) if shared else None}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/multilora")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same base, such as out/sft")
    args = parser.parse_args()
    deltas, rank = changes(args.run)
    others, rank = changes(args.against)[0] if args.against else {}, rank or 12
    print(f"{args.run}: singular values of ΔW, the first {rank} scaled to sum 1, mean over layers")
    heads = ["first share", "eff. rank", *(["other first", "other eff.", "similarity"] if others else [])]
    print(f"{'layer kind':<12}" + "".join(f"{head:>12}" for head in heads))
    kinds = {kind: {name: d for name, d in deltas.items() if name.endswith(f"{kind}.weight")} for kind in LINEARS}
    for kind, mine in {**kinds, "mean": deltas}.items():
        if not mine:
            continue
        found = figures(mine, rank, others)
        numbers = [found["first_value_share"], found["effective_rank"]]
        if theirs := {name: others[name] for name in mine if name in others}:
            other = figures(theirs, rank, {})
            numbers += [other["first_value_share"], other["effective_rank"], found["similarity_to_sft"]]
        print(f"{kind:<12}" + "".join(f"{number:>12.3f}" for number in numbers))
    print("\nvalues, mean " + "".join(f"{value:>6.3f}" for value in found["values"]))


if __name__ == "__main__":
    command_line(main)
