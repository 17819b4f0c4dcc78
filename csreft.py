"""CS-ReFT: edits of the hidden states in several orthonormal subspaces, opened for each prompt by a small router.

    h' = h + sum_i α_i R_i^T (W_i h + b_i - R_i h),   i = 1..k        the edit
    α = sigmoid(V_2 relu(V_1 x + c_1) + c_2)                          the router; x: the prompt's input embedding
                                                                      (see below), at unit root mean square
    loss + λ mean(α)                                                  the paper's regulariser Ω; the mean is ours

    h (d,) output of a decoder layer, R_i (r, d) with orthonormal rows, W_i (r, d), b_i (r,), α (k,) in [0, 1],
    V_1 (d/2, d), V_2 (k, d/2)

Inside each subspace i the edit replaces the coordinates R_i h by learned ones, W_i h + b_i; α_i says how far. One
subspace without a router is LoReFT (Wu et al., arXiv 2404.03592): `--method loreft`. The base's weights stay unchanged.

Source: Zhou, "Compositional Subspace Representation Fine-tuning for Adaptive Large Language Models", arXiv 2503.10617.
Our choices where it is silent or contradicts itself:
- W_i starts at R_i and b_i at zero, so training starts at the base model.
- `--ortho joint` makes the subspaces orthogonal to each other, as the text promises ("disjoint"); `separate` constrains
  each R_i alone, as its equation does.
- The paper routes on the first token's embedding (`--route-on first_token`). Behind a shared prompt template or a BOS
  that token is the same for every prompt, and then the gates cannot depend on the task. Default: the prompt's mean.
- Input embeddings are small (0.02 is a usual start), and a two-layer MLP that reads them as they are hardly leaves 1/2
  with its gates. Ours reads them at unit root mean square; `--no-router-norm` restores the bare embedding.
- In a talk of several turns a prompt is all before the answer in question. Each answer is a training example by
  itself, with gates (and positions) from that whole prompt, as in a chat.
- One router for the whole model, soft gates in training and evaluation. The paper's experiments threshold them at 0.5
  (its section 4): `--gate hard`.
- Every token is edited after every layer. LoReFT's instruction tuning edits the prompt's first and last tokens after
  four layers (Wu et al., table 7): `--layers 3,9,18,24 --positions f5+l5`, which shares one edit between both ends
  where pyreft has two. pyreft starts W and b as nn.Linear does (interventions.py, LoreftIntervention), not at R and 0.
- R is a plain tensor. After each optimiser step a thin QR puts it back on the manifold; torch's orthogonal
  parametrisation would keep a d x d buffer for each layer, and cannot be saved and resumed exactly.

The released code (github.com/IntologyAI/Zochi, folder csreft) differs from the paper: forward and generate call the
bare model, so no edit is applied (pyreft/reft_model.py); what it trains is the router, by a penalty of 1e-3 times
mean((α - 1/2)²), which pulls gates to 1/2 (csrf_trainer.py); the router reads position 0, the template's first token or
BOS; the base is Llama-2-7b-chat (csrf_train_instruct.py), where the paper says Llama-2-7B.

Read in this order: equation (above), Config, the module, attach. `reproduce/gates.py` looks at what a run learned.

Two subspaces of a plane, the axes, with W_i = 0: the first one is open and replaces its coordinate by b_1 = 10, the
second one is half open and goes half the way to b_2 = 20.

>>> from model import Context, Llama, LlamaConfig
>>> edits = attach(Llama(LlamaConfig(4, 2, 2, 1, 1)), Config(subspaces=2, rank=1)).edits
>>> edits.R.data, edits.W.data = torch.eye(2).view(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
>>> edits.b.data = torch.tensor([[[10.], [20.]]])
>>> ctx = Context(memory={"gates": torch.tensor([[1.0, 0.5]])})
>>> edits.edit(0, torch.tensor([[[1.0, 2.0]]]), ctx).tolist()
[[[10.0, 11.0]]]
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Adapter, UserError, parse_layers

# ---------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    subspaces: Annotated[int, "k, subspaces of each edited layer", "[1, inf)"] = 4
    rank: Annotated[int, "r, dimensions of each subspace", "[1, inf)"] = 5
    layers: Annotated[str, "layers to edit after: all, a list such as 3,9,18, or a range such as 25%-50%"] = "all"
    positions: Annotated[str, "tokens to edit: all, or the first and last of the prompt, such as f5+l5"] = "all"
    ortho: Annotated[Literal["joint", "separate"], "subspaces orthonormal together, or each alone"] = "joint"
    router: Annotated[bool, "gate the subspaces; without it every α is 1"] = True
    route_on: Annotated[Literal["prompt_mean", "first_token"],
                        "the router's input: the prompt's mean embedding, or its first token's"] = "prompt_mean"
    router_norm: Annotated[bool, "the router's input at unit root mean square"] = True
    router_lr: Annotated[float | None, "the router's peak learning rate; default: 0.4 times --lr", "(0, inf)"] = None
    sparsity: Annotated[float, "λ, weight of the mean gate in the loss", "[0, inf)"] = 0.0
    gate: Annotated[Literal["soft", "hard"], "gates at evaluation, hard: open above 0.5; training is soft"] = "soft"

    def __post_init__(self):
        parse_positions(self.positions)


def parse_positions(text):
    """None for "all", else (first, last) from a text such as "f5+l5", "f3" or "l1"."""
    if text == "all":
        return None
    counts = {"f": 0, "l": 0}
    for part in text.split("+"):
        if part[:1] not in counts or not part[1:].isdecimal() or counts[part[0]]:
            raise UserError(f"--positions {text!r}: expected all, or first and last prompt tokens such as f5+l5 or l1")
        counts[part[0]] = int(part[1:])
    if not any(counts.values()):
        raise UserError(f"--positions {text!r} edits no token")
    return counts["f"], counts["l"]


# All rank in one subspace, always open: LoReFT.
PRESETS = {"loreft": Config(subspaces=1, rank=20, router=False)}
# Of train.py's own flags. 2,000 x 24 = 48,000 examples, 1.7 x the usual 28,800.
DEFAULTS = {name: {"lr": lr, "steps": 2000, "batch_size": 24} for name, lr in (("csreft", 1e-2), ("loreft", 5e-3))}


# ---------------------------------------------------------------------------------------------- the module


class CSReFT(nn.Module):
    """The edits of all chosen layers, and the router that serves them all.

    Trained: R and W (L, k, r, d), b (L, k, r) for L edited layers; router: Linear, ReLU, Linear with biases as torch
    starts them, or None. All are on the base's device, in float32, or float64 beside such a base. At first R is normal
    with its rows made orthonormal, W equal to it, b zero. Beside them: config, positions (parsed), and off = None.
    """

    def __init__(self, model, config, layers):
        super().__init__()
        d, k, r = model.config.hidden_size, config.subspaces, config.rank
        weight = model.model.embed_tokens.weight
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.config, self.positions = config, parse_positions(config.positions)
        self.off = None  # a subspace to switch off, for the ablation table
        self.R = nn.Parameter(torch.empty(len(layers), k, r, d, **like))
        nn.init.normal_(self.R)
        self.orthonormalize()
        self.W = nn.Parameter(self.R.detach().clone())
        self.b = nn.Parameter(torch.zeros(len(layers), k, r, **like))
        self.router = None
        if config.router:
            self.router = nn.Sequential(nn.Linear(d, d // 2, **like), nn.ReLU(), nn.Linear(d // 2, k, **like))

    @torch.no_grad()
    def orthonormalize(self):
        """Orthonormal rows in place of R's: the thin QR of R^T, with signs that keep every row's direction. Over the
        k r rows of a layer together, or (config.ortho "separate") over the r rows of each subspace."""
        rows = self.R.flatten(1, 2) if self.config.ortho == "joint" else self.R  # (L, k r, d) or (L, k, r, d)
        rows = rows.cpu() if rows.device.type == "mps" else rows  # where older torches have no QR
        q, upper = torch.linalg.qr(rows.transpose(-1, -2))
        q = q * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :].to(q.dtype)
        self.R.copy_(q.transpose(-1, -2).reshape(self.R.shape))

    def read(self, h, prompt):
        """x, what the router reads: embeddings h (B, T, d), prompt (B, T) bool -> (B, d), in R's dtype. At unit root
        mean square means F.rms_norm, with its own eps."""
        h = h.to(self.R.dtype)
        if self.config.route_on == "first_token":
            x = h[:, 0]
        else:
            x = torch.where(prompt[..., None], h, 0.0).sum(1) / prompt.sum(1, keepdim=True)
        return F.rms_norm(x, x.shape[-1:]) if self.config.router_norm else x

    def route(self, h, ctx):
        """Decides the gates α (B, k) from the embeddings h (B, T, d); while decoding they stay as they are.

        ctx.memory gets "gates", in R's dtype (no autocast), and with --positions "edited" (B, T) bool: the prompt's
        tokens to edit. Without a router every gate is 1; hard gates are for evaluation alone. At last the subspace
        number `off`, if any, gets the gate 0. Without a prompt mask every token is the prompt's.
        """
        if ctx.decoding:
            return
        prompt = ctx.prompt_mask
        if prompt is None:
            prompt = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        k = self.config.subspaces
        if self.router is None:
            gates = h.new_ones(len(h), k, dtype=self.R.dtype)
        else:
            with torch.autocast(h.device.type, enabled=False):
                gates = self.router(self.read(h, prompt)).sigmoid()
            if self.config.gate == "hard" and not self.training:
                gates = (gates > 0.5).to(gates.dtype)
        if self.off is not None:
            gates = gates * (torch.arange(k, device=h.device) != self.off)
        ctx.memory["gates"] = gates
        if self.positions is not None:
            first, last = self.positions  # where they overlap in a short prompt, a token is edited once
            place, length = torch.arange(h.shape[1], device=h.device), prompt.sum(1, keepdim=True)
            ctx.memory["edited"] = ((place < first) | (place >= length - last)) & prompt

    def edit(self, i, h, ctx):
        """h (B, T, d) after the i-th edited layer -> h' in h's dtype, by what route() left in ctx.memory: with
        --positions at the marked tokens, and at none that is generated. All subspaces as one pair of products."""
        if self.positions is not None and ctx.decoding:
            return h  # only prompt tokens are edited
        r = self.config.rank
        R, W, b = self.R[i].flatten(0, 1), self.W[i].flatten(0, 1), self.b[i].flatten()  # (k r, d), (k r, d), (k r,)
        update = F.linear(h, W - R, b)  # W h + b - R h, (B, T, k r)
        gates = ctx.memory["gates"].repeat_interleave(r, dim=1)[:, None]  # (B, 1, k r)
        update = F.linear(update * gates.to(update.dtype), R.T)  # (B, T, d)
        if self.positions is not None:
            update = torch.where(ctx.memory["edited"][..., None], update, 0.0)
        return h + update.to(h.dtype)


# ---------------------------------------------------------------------------------------------- attach


class CSReFTAdapter(Adapter):
    def __init__(self, model, config):
        super().__init__(model)
        self.config, self.constant = config, None  # whether the router's input is; found by prepare()
        self.layers = parse_layers(config.layers, model.config.num_hidden_layers)
        d, k, r = model.config.hidden_size, config.subspaces, config.rank
        if r * (k if config.ortho == "joint" else 1) > d:
            raise UserError(f"--rank {r} with --subspaces {k} and --ortho {config.ortho} needs more orthonormal rows "
                             f"than the hidden width {d} has")
        self.edits = model.csreft = CSReFT(model, config, self.layers).train(model.training)
        self.prepare_steps = 4 if self.edits.router else 0
        layers = model.model.layers
        layers[0].register_forward_pre_hook(lambda layer, args: self.edits.route(*args))
        for i, number in enumerate(self.layers):
            layers[number].register_forward_hook(lambda layer, args, h, i=i: self.edits.edit(i, h, args[1]))

    def param_groups(self, lr, weight_decay):
        """No decay on R, which the QR would undo, nor on biases; the router at its own rate."""
        R, W, b, router = self.edits.R, self.edits.W, self.edits.b, [*(self.edits.router or nn.Module()).parameters()]
        router_lr = self.config.router_lr or 0.4 * lr
        groups = (([W], lr, weight_decay), ([R, b], lr, 0.0),
                  ([p for p in router if p.dim() > 1], router_lr, weight_decay),
                  ([p for p in router if p.dim() == 1], router_lr, 0.0))
        return [dict(zip(("params", "lr", "weight_decay"), group)) for group in groups]

    @torch.no_grad()
    def prepare(self, steps):
        """Says so where the router would read the same thing for every prompt, so that its gates must be constant."""
        if not self.edits.router:
            return
        read = torch.cat([self.edits.read(self.model.model.embed_tokens(b.ids), b.ctx.prompt_mask)
                          for batches in steps for b in batches])
        self.constant = bool(torch.allclose(read, read[:1].expand_as(read), atol=1e-6))
        if self.constant:
            print(f"note: --route-on {self.config.route_on} reads the same embedding for every prompt, so the gates "
                  "cannot depend on the task; with --route-on prompt_mean they can")

    def penalty(self, ctx):
        """λ Ω(α)"""
        return self.config.sparsity * ctx.memory["gates"].mean() if self.config.sparsity else 0.0

    def after_step(self):
        self.edits.orthonormalize()

    def merge(self):
        raise UserError("CS-ReFT cannot be merged: its edit of the hidden states depends on the prompt, which no "
                         "weight can hold; keep the adapter beside its base")

    def orthonormality_error(self):
        """Largest entry of |R_i R_i^T - I|, with --ortho joint also of |R_i R_j^T|."""
        R = self.edits.R.detach().cpu().double()  # an Apple GPU has no float64
        R = R.flatten(1, 2) if self.config.ortho == "joint" else R
        return (R @ R.transpose(-1, -2) - torch.eye(R.shape[-2], device=R.device)).abs().max().item()

    def report(self):
        router = sum(p.numel() for p in self.edits.router.parameters()) if self.edits.router else 0
        edits = sum(p.numel() for p in (self.edits.R, self.edits.W, self.edits.b))
        return {"orthonormality_error": self.orthonormality_error(), "edit_parameters": edits,
                "router_parameters": router, "constant_gates": self.constant}


def attach(model, config):
    """Edits the hidden states after the chosen layers. Raises UserError for a layer that does not exist or more
    orthonormal rows than the model is wide."""
    model.requires_grad_(False)
    return CSReFTAdapter(model, config)
