"""Singular values of the update ΔW that a run learned, and how near it is to another run's.

    python -m reproduce.spectra out/multilora
    python -m reproduce.spectra out/multilora --against out/sft

The first values are divided by their sum; their effective rank is the exponential of their entropy (Roy and Vetterli,
2007). "Similarity" is the share of one update's leading subspace that lies in the other's (LoRA, section 7.2).
"""

from pathlib import Path

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
    """({weight name: ΔW}, its total rank or None) of any run that changes weights: from the factors, or as saved weight
    minus the base's."""
    model, adapter, _, saved = load_run(run_dir)
    if hasattr(adapter, "deltas"):
        return adapter.deltas(), adapter.report().get("total_rank")
    base = type(model).from_pretrained(saved["settings"]["base"]).state_dict()
    moved = {name: t - base[name] for name, t in adapter.tensors().items() if name in base and t.dim() == 2}
    if not moved:
        raise UserError(f"{run_dir}: the method {saved['method']!r} changes no weight matrix, so there is no spectrum")
    return moved, None


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/multilora")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same base, such as out/sft")
    parser.add_argument("--rank", type=int, help="singular values to keep (default: the run's total rank)")
    args = parser.parse_args()
    deltas, rank = changes(args.run)
    rank = args.rank or rank or 12
    others = changes(args.against)[0] if args.against else {}

    print(f"{args.run}: singular values of ΔW, the first {rank} scaled to sum 1, mean over layers")
    head = f"{'layer kind':<12}{'first share':>12}{'eff. rank':>11}"
    print(head + (f"{'other first':>13}{'other eff.':>12}{'similarity':>12}" if others else "") + "   values")
    rows = []
    for kind in LINEARS:
        names = [name for name in deltas if name.endswith(f"{kind}.weight")]
        if not names:
            continue
        values = torch.stack([singular_values(deltas[name], rank) for name in names])
        row = [sum(column) / len(names) for column in zip(*(spread(v) for v in values))]
        if others:
            against = [spread(singular_values(others[name], rank)) for name in names if name in others]
            alike = [similarity(deltas[name], others[name], rank) for name in names if name in others]
            row += [sum(c) / len(against) for c in zip(*against)] + [sum(alike) / len(alike)] if against else []
        rows.append(row)
        cells = "".join(f"{x:>{w}.3f}" for x, w in zip(row, (12, 11, 13, 12, 12)))
        print(f"{kind:<12}{cells}   " + " ".join(f"{v:.3f}" for v in values.mean(0)[:12]))
    cells = "".join(f"{sum(c) / len(c):>{w}.3f}" for c, w in zip(zip(*rows), (12, 11, 13, 12, 12)))
    print(f"{'mean':<12}{cells}")


if __name__ == "__main__":
    command_line(main)
