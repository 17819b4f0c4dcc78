"""MultiLoRA: several low-rank updates side by side, so that no single direction dominates.

    y = W x + (alpha / r) * sum_i s_i * (B_i A_i dropout(x)),   i = 1..n

    x (..., in), y (..., out), W (out, in) frozen, A_i (r, in), B_i (out, r), s_i (out,) or a single number

Three changes to LoRA (Hu et al., arXiv 2106.09685), which is its special case n = 1, B = 0, no s (`--method lora`):
- n parallel modules instead of one of n times the rank: LoRA's updates concentrate on few singular directions, which
  suits one task better than many;
- B_i starts like A_i, Kaiming-uniform, instead of at zero: more varied starting points, less symmetry to break;
- a learned scale s_i, starting at zero, does what B = 0 did: training starts exactly at the base model.

Source: Wang et al., "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning", arXiv 2311.11501. Left open there
and chosen here: whether s_i is a vector or a number (`--scaling`), and one dropout mask shared by the n modules. The
public reimplementation, a baseline in MTL-LoRA's code (arXiv 2410.09437, src/adapter/multilora.py), has a vector from
zero and one shared mask, so do we.

What to know when comparing with LoRA:
- n modules of rank r are the same functions as one LoRA of rank n r (algebra: stack the A_i, put the diag(s_i) B_i side
  by side). Only the start, the scales and dropout can make a difference.
- Kaiming-uniform with a = sqrt 5 draws A from ±1/sqrt(in) and B from ±1/sqrt(r): at width 128 and r = 4 B's range is
  5.7 times A's (torch.nn.init.kaiming_uniform_'s formula).

Read in this order: equation (above), Config, the module, attach. `reproduce/spectra.py` looks at what a run learned.

Two modules of rank 1 are one LoRA of rank 2. At the start s = 0, so y = W x, and the first step moves s alone, each s_i
along B_i A_i x:

>>> m = MultiLoRA(nn.Linear(2, 2, bias=False), Config(modules=2, rank=1, alpha=1.0))
>>> m.A.data, m.B.data = torch.tensor([[[1., 0.]], [[0., 1.]]]), torch.tensor([[[1.], [2.]], [[3.], [1.]]])
>>> y = m(torch.tensor([5., 7.]))
>>> y.sum().backward()
>>> y.tolist(), m.s.grad.tolist(), m.A.grad.abs().sum().item()
([0.0, 0.0], [[5.0, 10.0], [21.0, 7.0]], 0.0)
>>> m.s.data = torch.tensor([[1., 0.], [0., 1.]])
>>> down, up = m.factors()
>>> (up @ down).tolist(), m(torch.tensor([5., 7.])).tolist()
([[1.0, 0.0], [0.0, 1.0]], [5.0, 7.0])
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LINEARS, Adapter, find_linears

# ---------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    modules: Annotated[int, "n, parallel modules", "[1, inf)"] = 3
    rank: Annotated[int, "r, rank of each module", "[1, inf)"] = 4
    alpha: Annotated[float, "the update is multiplied by alpha / r", "(0, inf)"] = 8.0
    scaling: Annotated[Literal["vector", "scalar", "none"],
                       "s_i: one factor per output, one per module, or none and B = 0 at first, as in LoRA"] = "vector"
    dropout: Annotated[float, "probability of dropping an input of the update", "[0, 1)"] = 0.0
    targets: Annotated[str, "linear layers to adapt, separated by commas"] = ",".join(LINEARS)


# The same total rank in one module, alpha / r as above: LoRA.
PRESETS = {"lora": Config(modules=1, rank=12, alpha=24.0, scaling="none")}
# Over train.py's STANDARD. By muP the rate of A, which sums over the width, falls with it; that of B and s does not. So
# one rate for all falls with the root (Hayou et al., "LoRA+", arXiv 2402.12354).
DEFAULTS = {"multilora": {"lr": 8e-3, "width_power": 0.5}, "lora": {"lr": 4e-3, "width_power": 0.5}}


# ---------------------------------------------------------------------------------------------- the module


class MultiLoRA(nn.Module):
    """The update of one linear layer: x (..., in) -> (alpha / r) sum_i s_i * (B_i A_i x), (..., out).

    Trained: A (n, r, in), B (n, out, r), and s (n, out), for --scaling scalar (n, 1), for none None. At first A is
    uniform in ±1/sqrt(in), B in ±1/sqrt(r), s zero; for none B is zero. All are on the weight's device, in its dtype or
    float32, whichever is wider. Beside them: factor, alpha / r, and dropout, the probability.
    """

    def __init__(self, linear, config):
        super().__init__()
        n, r = config.modules, config.rank
        like = {"device": linear.weight.device,
                "dtype": torch.promote_types(linear.weight.dtype, torch.float32)}  # float32 whatever the base's
        self.factor, self.dropout = config.alpha / r, config.dropout
        self.A = nn.Parameter(torch.empty(n, r, linear.in_features, **like))
        self.B = nn.Parameter(torch.zeros(n, linear.out_features, r, **like))
        nn.init.uniform_(self.A, -linear.in_features**-0.5, linear.in_features**-0.5)  # = kaiming_uniform_(a=sqrt(5))
        self.s = None
        if config.scaling != "none":
            nn.init.uniform_(self.B, -(r**-0.5), r**-0.5)
            self.s = nn.Parameter(torch.zeros(n, linear.out_features if config.scaling == "vector" else 1, **like))

    def factors(self):
        """The n modules as one pair of matrices: down (n r, in) and up (out, n r) with up @ down = ΔW."""
        up = self.B if self.s is None else self.s[:, :, None] * self.B  # diag(s_i) B_i
        return self.A.flatten(0, 1), self.factor * up.transpose(0, 1).flatten(1)

    def forward(self, x):  # with one dropout mask on x, in training alone
        down, up = self.factors()
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), down), up)

    def delta(self):
        """ΔW (out, in), what merging adds to the weight."""
        down, up = self.factors()
        return up @ down

    def core(self):
        """A matrix of at most n r rows and columns with ΔW's singular values, float64: up = Q R and down^T = Q' R' give
        ΔW = Q (R R'^T) Q'^T. From ΔW itself they would take more than half an hour for a 7B model."""
        down, up = (m.detach().cpu().double() for m in self.factors())  # an Apple GPU has no float64
        return torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T


# ---------------------------------------------------------------------------------------------- attach


def singular_values(delta, count):
    """The `count` largest singular values of ΔW, divided by their sum: (count,) float64, zeros where ΔW is zero."""
    values = torch.linalg.svdvals(delta.cpu().double())[:count]  # an Apple GPU has no float64
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def spread(values):
    """(share of the first value, effective rank) of normalised singular values. Effective rank: exp of the entropy
    (Roy and Vetterli, 2007), from 1 (a single direction) to their number (all values equal)."""
    entropy = -(values * values.clamp_min(1e-300).log()).sum()
    return values[0].item(), entropy.exp().item()


class MultiLoRAAdapter(Adapter):
    def __init__(self, model, linears, config):
        super().__init__(model)
        self.linears, self.handles = linears, []
        for linear in linears.values():
            linear.multilora = MultiLoRA(linear, config).train(linear.training)
            self.handles.append(linear.register_forward_hook(add_update))

    def param_groups(self, lr, weight_decay):
        """A and B have weight decay, s (where there is one) none: shrinking it would shrink the whole update."""
        scales = [m.multilora.s for m in self.linears.values() if m.multilora.s is not None]
        matrices = [p for m in self.linears.values() for p in (m.multilora.A, m.multilora.B)]
        return [{"params": matrices, "lr": lr, "weight_decay": weight_decay},
                {"params": scales, "lr": lr, "weight_decay": 0.0}]

    @torch.no_grad()
    def merge(self):
        """W + ΔW, added in the wider dtype and rounded once, to W's. The modules and their hooks leave the model."""
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
        shares, ranks = zip(*(spread(singular_values(m.multilora.core(), rank)) for m in self.linears.values()))
        return {"total_rank": rank, "first_value_share": sum(shares) / len(shares),
                "effective_rank": sum(ranks) / len(ranks)}


def add_update(linear, args, output):  # a forward hook; args: (x,), output: W x
    return output + linear.multilora(args[0])


def attach(model, config):
    """Adds a MultiLoRA update to every target layer. Raises UserError for a target that matches nothing."""
    model.requires_grad_(False)
    linears = find_linears(model, [t.strip() for t in config.targets.split(",") if t.strip()])
    return MultiLoRAAdapter(model, linears, config)
