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
- One router for the whole model, soft gates in training; `--gate hard` thresholds them at evaluation.
- R is a plain tensor. After each optimiser step a thin QR puts it back on the manifold; torch's orthogonal
  parametrisation would keep a d x d buffer for each layer, and cannot be saved and resumed exactly.

Read in this order: equation (above), Config, the module, attach, analysis.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SHAPES, Adapter, Context, command_line, count_parameters, parse_layers

# ---------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    subspaces: Annotated[int, "k, subspaces of each edited layer"] = 4
    rank: Annotated[int, "r, dimensions of each subspace"] = 5
    layers: Annotated[str, "layers to edit after: all, a list such as 3,9,18, or a range such as 25%-50%"] = "all"
    positions: Annotated[str, "tokens to edit: all, or the first and last of the prompt, such as f5+l5"] = "all"
    ortho: Annotated[Literal["joint", "separate"], "subspaces orthonormal together, or each alone"] = "joint"
    router: Annotated[bool, "gate the subspaces; without it every α is 1"] = True
    route_on: Annotated[Literal["prompt_mean", "first_token", "last_token"], "what the router reads"] = "prompt_mean"
    router_norm: Annotated[bool, "the router's input at unit root mean square"] = True
    router_lr: Annotated[float, "the router's peak learning rate"] = 4e-3
    sparsity: Annotated[float, "λ, weight of the mean gate in the loss"] = 0.0
    supervise_gates: Annotated[bool, "also teach the router to open subspace (task number mod k) for a task"] = False
    gate: Annotated[Literal["soft", "hard"], "gates at evaluation; training is always soft"] = "soft"
    threshold: Annotated[float, "hard gates open above it"] = 0.5
    lr: Annotated[float, "peak learning rate"] = 1e-2
    steps: Annotated[int, "optimiser steps"] = 2000  # of half the size, so 1.7 times the examples of the other methods
    batch_size: Annotated[int, "examples in a micro-batch"] = 24

    def __post_init__(self):
        for name in ("subspaces", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        for name, high in (("sparsity", math.inf), ("threshold", 1.0)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected from 0 to {high}")
        if not 0 < self.router_lr < math.inf:
            raise ValueError(f"--router-lr is {self.router_lr}, expected a positive number")
        if self.supervise_gates and not self.router:
            raise ValueError("--supervise-gates needs a router, and --no-router is set")
        parse_positions(self.positions)


def parse_positions(text):
    """None for "all", else (first, last) from a text such as "f5+l5", "f3" or "l1"."""
    if text == "all":
        return None
    counts = {"f": 0, "l": 0}
    for part in text.split("+"):
        if part[:1] not in counts or not part[1:].isdigit() or counts[part[0]]:
            raise ValueError(f"--positions {text!r}: expected all, or first and last prompt tokens such as f5+l5 or l1")
        counts[part[0]] = int(part[1:])
    if not any(counts.values()):
        raise ValueError(f"--positions {text!r} edits no token")
    return counts["f"], counts["l"]


# All rank in one subspace, always open: LoReFT.
PRESETS = {"loreft": Config(subspaces=1, rank=20, router=False)}


# ---------------------------------------------------------------------------------------------- the module


class CSReFT(nn.Module):
    """The edits of all chosen layers, and the router that serves them all."""

    def __init__(self, model, config, layers):
        super().__init__()
        d, k, r = model.config.hidden_size, config.subspaces, config.rank
        weight = model.model.embed_tokens.weight
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.config, self.positions = config, parse_positions(config.positions)
        self.off = None  # a subspace to switch off, for the ablation table
        self.R = nn.Parameter(torch.empty(len(layers), k, r, d, **like))  # L edited layers
        nn.init.normal_(self.R)
        self.orthonormalize()
        self.W = nn.Parameter(self.R.detach().clone())
        self.b = nn.Parameter(torch.zeros(len(layers), k, r, **like))
        self.router = None
        if config.router:
            self.router = nn.Sequential(nn.Linear(d, d // 2, **like), nn.ReLU(), nn.Linear(d // 2, k, **like))

    @torch.no_grad()
    def orthonormalize(self):
        """Nearest-in-span orthonormal rows: the thin QR of R^T, with signs that keep every row's direction."""
        rows = self.R.flatten(1, 2) if self.config.ortho == "joint" else self.R  # (L, k r, d) or (L, k, r, d)
        q, upper = torch.linalg.qr(rows.transpose(-1, -2))
        q = q * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :].to(q.dtype)
        self.R.copy_(q.transpose(-1, -2).reshape(self.R.shape))

    def read(self, h, prompt):
        """x, what the router reads: embeddings h (B, T, d), prompt (B, T) bool -> (B, d)."""
        h = h.to(self.R.dtype)
        if self.config.route_on == "first_token":
            x = h[:, 0]
        elif self.config.route_on == "last_token":
            x = h[torch.arange(len(h), device=h.device), prompt.sum(1) - 1]
        else:
            x = torch.where(prompt[..., None], h, 0.0).sum(1) / prompt.sum(1, keepdim=True)
        return F.rms_norm(x, x.shape[-1:]) if self.config.router_norm else x

    def route(self, h, ctx):
        """Decides the gates α (B, k) from the embeddings of the prompts; while decoding they stay as they are."""
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
                logits = self.router(self.read(h, prompt))
            ctx.memory["gate_logits"], gates = logits, logits.sigmoid()
            if self.config.gate == "hard" and not self.training:
                gates = (gates > self.config.threshold).to(gates.dtype)
        if self.off is not None:
            gates = gates * (torch.arange(k, device=h.device) != self.off)
        ctx.memory["gates"] = gates
        if self.positions is not None:
            first, last = self.positions  # where they overlap in a short prompt, a token is edited once
            place, length = torch.arange(h.shape[1], device=h.device), prompt.sum(1, keepdim=True)
            ctx.memory["edited"] = ((place < first) | (place >= length - last)) & prompt

    def edit(self, i, h, ctx):
        """h (B, T, d) after the i-th edited layer -> h'. All subspaces as one pair of matrix products."""
        if self.positions is not None and ctx.decoding:
            return h  # only prompt tokens are edited
        k, r = self.config.subspaces, self.config.rank
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
            raise ValueError(f"--rank {r} with --subspaces {k} and --ortho {config.ortho} needs more orthonormal rows "
                             f"than the hidden width {d} has")
        self.edits = model.csreft = CSReFT(model, config, self.layers).train(model.training)
        layers = model.model.layers
        layers[0].register_forward_pre_hook(lambda layer, args: self.edits.route(*args))
        for i, number in enumerate(self.layers):
            layers[number].register_forward_hook(lambda layer, args, h, i=i: self.edits.edit(i, h, args[1]))

    def param_groups(self, lr, weight_decay):
        """No decay on R, which the QR would undo; the router at its own rate."""
        groups = [{"params": [self.edits.R], "lr": lr, "weight_decay": 0.0},
                  {"params": [self.edits.W, self.edits.b], "lr": lr, "weight_decay": weight_decay}]
        if self.config.router:
            groups.append({"params": list(self.edits.router.parameters()), "lr": self.config.router_lr,
                           "weight_decay": weight_decay})
        return groups

    @torch.no_grad()
    def prepare(self, batches):
        """Says so where the router would read the same thing for every prompt, so that its gates must be constant."""
        if not self.config.router:
            return
        read = []
        for _, batch in zip(range(4), batches):
            read.append(self.edits.read(self.model.model.embed_tokens(batch.ids), batch.prompt_mask))
        read = torch.cat(read)
        self.constant = bool(torch.allclose(read, read[:1].expand_as(read), atol=1e-6))
        if self.constant:
            print(f"note: --route-on {self.config.route_on} reads the same embedding for every prompt, so the gates "
                  "cannot depend on the task; with --route-on prompt_mean they can")

    def penalty(self, ctx):
        """λ Ω(α), and the supervision of the gates by task number where it is on."""
        loss = 0.0
        if self.config.sparsity:
            loss = loss + self.config.sparsity * ctx.memory["gates"].mean()
        if self.config.supervise_gates:
            own = F.one_hot(ctx.tasks % self.config.subspaces, self.config.subspaces).to(self.edits.R.dtype)
            loss = loss + F.binary_cross_entropy_with_logits(ctx.memory["gate_logits"], own)
        return loss

    def after_step(self):
        self.edits.orthonormalize()

    def merge(self):
        raise ValueError("CS-ReFT cannot be merged: its edit of the hidden states depends on the prompt, which no "
                         "weight can hold; keep the adapter beside its base")

    def orthonormality_error(self):
        """Largest entry of |R_i R_i^T - I|, with --ortho joint also of |R_i R_j^T|."""
        R = self.edits.R.detach().double()
        R = R.flatten(1, 2) if self.config.ortho == "joint" else R
        return (R @ R.transpose(-1, -2) - torch.eye(R.shape[-2], device=R.device)).abs().max().item()

    def report(self):
        router = sum(p.numel() for p in self.edits.router.parameters()) if self.config.router else 0
        edits = sum(p.numel() for p in (self.edits.R, self.edits.W, self.edits.b))
        return {"orthonormality_error": self.orthonormality_error(), "edit_parameters": edits,
                "router_parameters": router, "constant_gates": self.constant}


def attach(model, config):
    """Edits the hidden states after the chosen layers. Raises ValueError for a layer that does not exist or more
    orthonormal rows than the model is wide."""
    model.requires_grad_(False)
    return CSReFTAdapter(model, config)


# ---------------------------------------------------------------------------------------------- analysis


def count(name, config):
    """Prints what LoReFT and CS-ReFT train on a published model size, beside the published shares."""
    shape = SHAPES[name]
    d, base = shape.hidden_size, count_parameters(shape)
    layers = len(parse_layers(config.layers, shape.num_hidden_layers))
    subspace = config.rank * (2 * d + 1)  # R_i and W_i (r, d), b_i (r,)
    router = (d + 1) * (d // 2) + (d // 2 + 1) * config.subspaces
    rows = [("LoReFT, prefix and suffix apart", 2 * layers * subspace, "0.0039 %" if name == "llama-2-7b" else ""),
            ("CS-ReFT, edits alone", layers * config.subspaces * subspace, ""),
            ("CS-ReFT, router alone", router, ""),
            ("CS-ReFT, edits and router", layers * config.subspaces * subspace + router,
             "0.0098 %" if name == "llama-2-7b" else "")]
    print(f"{name}: {base:,} parameters; rank {config.rank}, {layers} layers, {config.subspaces} subspaces")
    for title, trained, published in rows:
        print(f"  {title:<34}{trained:>12,}{100 * trained / base:>10.4f} %   {published and 'published ' + published}")


def table(title, columns, rows):
    print(f"\n{title}\n{'':<14}" + "".join(f"{c:>12}" for c in columns))
    for name, values in rows.items():
        print(f"{name:<14}" + "".join(f"{v:>12.2f}" for v in values))


@torch.no_grad()
def gates_by_task(model, adapter, tests, pad):
    """{task: mean gates (k,)} over encoded examples. Only embeddings are needed: the router reads nothing else."""
    import data

    means = {}
    for task, examples in tests.items():
        total = 0.0
        for start in range(0, len(examples), 64):
            batch = data.collate(examples[start : start + 64], pad).to(model.device)
            ctx = Context(prompt_mask=batch.prompt_mask, tasks=batch.tasks)
            adapter.edits.route(model.model.embed_tokens(batch.ids), ctx)
            total = total + ctx.memory["gates"].sum(0)
        means[task] = (total / len(examples)).tolist()
    return means


def main():
    import argparse

    import train

    parser = argparse.ArgumentParser(description="Gates and ablations of a CS-ReFT run.", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, nargs="?", help="run folder, such as out/csreft")
    parser.add_argument("--count", choices=SHAPES, help="count parameters at a published size instead")
    parser.add_argument("--rank", type=int, default=4, help="for --count (%(default)s)")
    parser.add_argument("--layers", default="3,9,18,24", help="for --count (%(default)s)")
    parser.add_argument("--subspaces", type=int, default=4, help="for --count (%(default)s)")
    parser.add_argument("--eval-limit", type=int, default=0, help="examples of each task, 0 for all")
    args = parser.parse_args()
    if args.count:
        return count(args.count, Config(rank=args.rank, layers=args.layers, subspaces=args.subspaces))
    if not args.run_dir:
        raise ValueError("give a run folder such as out/csreft, or --count llama-2-7b")

    model, adapter, method, saved = train.load_run(args.run_dir)
    if not hasattr(adapter, "edits"):
        raise ValueError(f"{args.run_dir} is a run of {saved['method']!r}, expected csreft or loreft")
    settings = train.Config(**saved["settings"])
    tokenizer = train.data.Tokenizer.from_pretrained(settings.base)
    suite = train.load_suite(settings, settings.eval_split, args.eval_limit or settings.eval_limit, tokenizer)
    _, tests = train.encode_suite(suite, tokenizer, settings, train.longest_of(settings, model.config))
    new = {task: examples for task, examples in tests.items() if suite.group[task] == "new"}
    k, names = adapter.edits.config.subspaces, [f"subspace {i}" for i in range(adapter.edits.config.subspaces)]
    score = lambda some: {task: next(iter(figures.values())) for task, figures in train.evaluate(
        model, some, tokenizer, suite.score, settings.batch_size, settings.max_new_tokens).items()}

    table("mean gate of each subspace", names, gates_by_task(model, adapter, tests, tokenizer.pad_id))
    soft, without = score(new), []
    for i in range(k):
        adapter.edits.off = i
        without.append(score(new))
    adapter.edits.off = None
    table("score in % (or loss), and with one subspace switched off", ["all on"] + [f"no {i}" for i in range(k)],
          {task: [soft[task]] + [w[task] for w in without] for task in new})
    if adapter.edits.router is not None:
        adapter.edits.config.gate = "hard"
        hard, opened = score(new), gates_by_task(model, adapter, new, tokenizer.pad_id)
        table(f"soft gates, hard gates (α > {adapter.edits.config.threshold}) and share of them open",
              ["soft", "hard", "open"], {task: [soft[task], hard[task], sum(opened[task]) / k] for task in new})
        rated = [task for task in new if suite.score[task] != "loss"]
        if rated:
            means = (sum(s[task] for task in rated) / len(rated) for s in (soft, hard))
            print(f"{'mean, in %':<14}" + "".join(f"{value:>12.2f}" for value in means))
    report = adapter.report()
    print(f"\nlargest |R R^T - I|: {report['orthonormality_error']:.1e}")
    base = count_parameters(model.config)
    for title, number in (("edits", report["edit_parameters"]), ("router", report["router_parameters"]),
                          ("together", report["edit_parameters"] + report["router_parameters"])):
        print(f"{title:<9}{number:>10,} parameters, {100 * number / base:.3f} % of the base")


if __name__ == "__main__":
    command_line(main)
