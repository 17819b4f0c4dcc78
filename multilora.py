"""MultiLoRA: several low-rank updates side by side, so that no single direction dominates.

    y = W x + (alpha / r) * sum_i s_i * (B_i A_i dropout(x)),   i = 1..n

    x (..., in), y (..., out), W (out, in) frozen, A_i (r, in), B_i (out, r), s_i (out,) or a single number

Three changes to LoRA (Hu et al., arXiv 2106.09685), which is its special case n = 1, B = 0, no s (`--method lora`):
- n parallel modules instead of one of n times the rank: LoRA's updates concentrate on few singular directions, which
  suits one task better than many;
- B_i starts like A_i, Kaiming-uniform, instead of at zero: more varied starting points, less symmetry to break;
- a learned scale s_i, starting at zero, does what B = 0 did: training starts exactly at the base model.

Source: Wang et al., "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning", arXiv 2311.11501. Left open there
and chosen here: whether s_i is a vector or a number (`--scaling`; the public reimplementation uses a vector, so do we),
and one dropout mask shared by the n modules.

Read in this order: equation (above), Config, the module, attach, analysis.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LINEARS, SHAPES, Adapter, Llama, command_line, count_parameters, find_linears, write_json

# ---------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    modules: Annotated[int, "n, parallel modules"] = 3
    rank: Annotated[int, "r, rank of each module"] = 4
    alpha: Annotated[float, "the update is multiplied by alpha / r"] = 8.0
    scaling: Annotated[Literal["vector", "scalar", "none"],
                       "s_i: one factor per output, one per module, or none (B starts at zero, as in LoRA)"] = "vector"
    dropout: Annotated[float, "probability of dropping an input of the update"] = 0.0
    targets: Annotated[str, "linear layers to adapt, separated by commas"] = ",".join(LINEARS)
    lr: Annotated[float, "peak learning rate"] = 5e-3

    def __post_init__(self):
        for name in ("modules", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}, expected from 0 to below 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--alpha is {self.alpha}, expected a positive number")


# The same total rank in one module, alpha / r as above: LoRA.
PRESETS = {"lora": Config(modules=1, rank=12, alpha=24.0, scaling="none", lr=4e-3)}


# ---------------------------------------------------------------------------------------------- the module


class MultiLoRA(nn.Module):
    """The update of one linear layer: x (..., in) -> (alpha / r) sum_i s_i * (B_i A_i x), (..., out)."""

    def __init__(self, linear, config):
        super().__init__()
        n, r = config.modules, config.rank
        like = {"device": linear.weight.device,
                "dtype": torch.promote_types(linear.weight.dtype, torch.float32)}  # float32 whatever the base's
        self.factor, self.dropout = config.alpha / r, config.dropout
        self.A = nn.Parameter(torch.empty(n, r, linear.in_features, **like))
        self.B = nn.Parameter(torch.zeros(n, linear.out_features, r, **like))
        self.s = None
        nn.init.uniform_(self.A, -linear.in_features**-0.5, linear.in_features**-0.5)  # = kaiming_uniform_(a=sqrt(5))
        if config.scaling != "none":
            nn.init.uniform_(self.B, -(r**-0.5), r**-0.5)
            self.s = nn.Parameter(torch.zeros(n, linear.out_features if config.scaling == "vector" else 1, **like))

    def factors(self):
        """The n modules as one pair of matrices: down (n r, in) and up (out, n r) with up @ down = ΔW."""
        up = self.B if self.s is None else self.s[:, :, None] * self.B  # diag(s_i) B_i
        return self.A.flatten(0, 1), self.factor * up.transpose(0, 1).flatten(1)

    def forward(self, x):
        down, up = self.factors()
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), down), up)

    def delta(self):
        """ΔW (out, in), what merging adds to the weight."""
        down, up = self.factors()
        return up @ down


# ---------------------------------------------------------------------------------------------- attach


class MultiLoRAAdapter(Adapter):
    def __init__(self, model, linears, config):
        super().__init__(model)
        self.linears, self.handles = linears, []
        for linear in linears.values():
            linear.multilora = MultiLoRA(linear, config).train(linear.training)
            self.handles.append(linear.register_forward_hook(add_update))

    def param_groups(self, lr, weight_decay):
        """No weight decay on s: shrinking it would shrink the whole update, not its norm alone."""
        scales = [m.multilora.s for m in self.linears.values() if m.multilora.s is not None]
        matrices = [p for m in self.linears.values() for p in (m.multilora.A, m.multilora.B)]
        return [{"params": matrices, "lr": lr, "weight_decay": weight_decay},
                {"params": scales, "lr": lr, "weight_decay": 0.0}]

    @torch.no_grad()
    def merge(self):
        for linear, handle in zip(self.linears.values(), self.handles):
            delta = linear.multilora.delta()
            linear.weight.copy_((linear.weight.to(delta.dtype) + delta).to(linear.weight.dtype))
            handle.remove()
            del linear.multilora
        self.linears, self.handles = {}, []

    def deltas(self):
        """{name of the weight: ΔW (out, in)}"""
        return {f"{name}.weight": linear.multilora.delta().detach() for name, linear in self.linears.items()}

    def report(self):
        """Mean over the adapted weights: the first singular value's share, and the effective rank."""
        rank = min(next(iter(self.linears.values())).multilora.factors()[0].shape[0], self.model.config.hidden_size)
        shares, ranks = zip(*(spread(singular_values(delta, rank)) for delta in self.deltas().values()))
        return {"total_rank": rank, "first_value_share": sum(shares) / len(shares),
                "effective_rank": sum(ranks) / len(ranks)}


def add_update(linear, args, output):
    return output + linear.multilora(args[0])


def attach(model, config):
    """Adds a MultiLoRA update to every target layer. Raises ValueError for a target that matches nothing."""
    model.requires_grad_(False)
    linears = find_linears(model, [t.strip() for t in config.targets.split(",") if t.strip()])
    return MultiLoRAAdapter(model, linears, config)


# ---------------------------------------------------------------------------------------------- analysis


def singular_values(delta, count):
    """The `count` largest singular values of ΔW, divided by their sum: (count,) float64, zeros where ΔW is zero."""
    values = torch.linalg.svdvals(delta.double())[:count]
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def spread(values):
    """(share of the first value, effective rank) of normalised singular values. Effective rank: exp of the entropy
    (Roy and Vetterli, 2007); 1 where one direction does everything, their number where all do the same."""
    entropy = -(values * values.clamp_min(1e-300).log()).sum()
    return values[0].item(), entropy.exp().item()


def similarity(a, b, count):
    """Share of a's leading left subspace that lies in b's, 0 to 1: ||U_a^T U_b||_F^2 / count (LoRA, section 7.2)."""
    ua, ub = (torch.linalg.svd(m.double(), full_matrices=False).U[:, :count] for m in (a, b))
    return ((ua.T @ ub) ** 2).sum().item() / count


def changes(run_dir):
    """{weight name: ΔW} of any run that changes weights: from the factors, or as saved weight minus the base's."""
    from train import load_run

    model, adapter, _, saved = load_run(run_dir)
    if hasattr(adapter, "deltas"):
        return adapter.deltas(), adapter.report().get("total_rank")
    base = type(model).from_pretrained(saved["settings"]["base"]).state_dict()
    moved = {name: t - base[name] for name, t in adapter.tensors().items() if name in base and t.dim() == 2}
    if not moved:
        raise ValueError(f"{run_dir}: the method {saved['method']!r} changes no weight matrix, so there is no spectrum")
    return moved, None


@torch.no_grad()
def export_peft(run_dir, out):
    """Writes the update as a standard PEFT LoRA adapter of rank n r: A_i stacked, (alpha / r) s_i * B_i side by side,
    and a scaling of one. Exact, since the n modules are one pair of matrix products anyway."""
    from safetensors.torch import save_file
    from train import load_run

    model, adapter, _, saved = load_run(run_dir)
    if not hasattr(adapter, "deltas"):
        raise ValueError(f"{run_dir}: only MultiLoRA and LoRA are a LoRA adapter, and {saved['method']!r} is not")
    if out.exists():
        raise ValueError(f"--export-peft {out} is there already: name a new folder")
    tensors = {}
    for name, linear in adapter.linears.items():
        down, up = linear.multilora.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    rank = len(down)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": saved["settings"]["base"], "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in adapter.linears})})
    print(f"{out}: a PEFT LoRA adapter of rank {rank} for {len(adapter.linears)} layers")


def count(name, config):
    """Prints what MultiLoRA and a LoRA of the same total rank train at a published model size; makes no weights."""
    with torch.device("meta"):
        model = Llama(SHAPES[name])
    linears = find_linears(model, list(LINEARS)).values()
    n, r, base = config.modules, config.rank, count_parameters(SHAPES[name])
    scales = sum(n * linear.out_features for linear in linears)
    matrices = sum(n * r * (linear.in_features + linear.out_features) for linear in linears)
    print(f"{name}: {base:,} parameters; all seven linear layers, n {n}, r {r}")
    for title, trained in ((f"LoRA of rank {n * r}", matrices), ("MultiLoRA, with its scales", matrices + scales)):
        print(f"  {title:<28}{trained:>14,}{100 * trained / base:>8.2f} %")


def main():
    import argparse

    parser = argparse.ArgumentParser(description="Singular values of a run's learned update ΔW, and its export.",
                                     allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, nargs="?", help="run folder, such as out/multilora")
    parser.add_argument("--count", choices=SHAPES, help="count parameters at a published size instead")
    parser.add_argument("--modules", type=int, default=3, help="n, for --count (%(default)s)")
    parser.add_argument("--against", type=Path, help="another run on the same base, such as full fine-tuning's")
    parser.add_argument("--rank", type=int,
                        help="singular values to keep (default: the run's total rank); r, for --count (32)")
    parser.add_argument("--export-peft", type=Path, metavar="DIR", help="write it as a PEFT LoRA adapter instead")
    args = parser.parse_args()
    if args.count:
        return count(args.count, Config(modules=args.modules, rank=args.rank or 32))
    if not args.run_dir:
        raise ValueError("give a run folder such as out/multilora, or --count llama-2-7b")
    if args.export_peft:
        return export_peft(args.run_dir, args.export_peft)
    deltas, rank = changes(args.run_dir)
    rank = args.rank or rank or 12
    others = changes(args.against)[0] if args.against else {}

    print(f"{args.run_dir}: singular values of ΔW, the first {rank} scaled to sum 1, mean over layers")
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
