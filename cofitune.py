"""CoFiTune: choose which weights may move (coarse), then how far each unit of them may move (fine).

Coarse: a tree search over layer ranges and modules, each node a short fine-tune, scored on validation data by

    S, V = accuracy on the new tasks, on the general ones        speciality, versatility
    H    = 2 S V / (S + V)                                       the paper's is Uni = S + V

    level 1   0%-50%, 25%-75%, 50%-100% of the layers, each with attention (MHA) and with the MLP (FFN)
    level 2   the quarters inside the winner, with its modules
    level 3   the modules inside the winner, in its layers; the winner stays chosen unless one inside it has a higher H

Everything outside the chosen layers and modules is frozen. The published finding is FFN up and down projections of
layers 25%-50%.

Fine: an output unit u of a module m gets an importance from the unchanged model, and moves by 1 - I_u of its update:

    L      = KL(p_2 || p_1), mean over labelled tokens; p_1, p_2: two passes with dropout on attention and MLP outputs
    I_raw  = mean over batches |∂L / ∂g_u|          g: a mask of ones on the module's output, through both passes
    I      = |tanh(zscore(I_raw))|                  over the units of one module in one layer
    θ_u   <- θ_u + (1 - I_u) Δθ_u

Units are heads for q, k and v, and single outputs for o, gate, up and down; a unit's mask holds for its rows of the
weight and for its bias. Because of |.|, the *least* important units are held back as well as the most important ones.

Source: Zhang et al., "Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large
Language Model", arXiv 2404.10306; the importance is that of Ke et al., arXiv 2302.03241. Where we depart from it:
- Where the untouched base scores high, a sum is highest for the node that learns nothing: V alone is 98 here. The
  harmonic mean H wants both. Uni is printed beside it.
- Each node is scored at θ_0 + a (θ - θ_0) for several shares a and counts by the best one, so that regions are compared
  and not the lengths of their steps.
- Adam divides a gradient by its own size, so a constant factor on the gradient nearly cancels. `--mask-on update`, our
  default, scales the step itself (weight decay included); `--mask-on grad` is the published form.
- The released code (github.com/rattlesnakey/CoFiTune, src/) departs from the description, which ours follows. Its
  importance (softmask_utils.py, softmask_llama.py): one mask on the softmaxed attention serves q, k and v, none is on o
  and gate; dropout of 0.003 acts on attention weights and on the MLP's output; the KL is summed over all positions,
  padding included, in one pass over the training set; signed gradients add up, |.| comes after tanh, and the mask's
  gradient is never cleared between batches. Its mask is tiled over the flattened [out, in] weight, where it misses the
  output units (setup/stage3.py). Its loss counts the instruction's tokens as well (training.py, converter).

Order within a step: gradients of all micro-batches add up, clipping sees them unmasked, then the mask, then the
optimiser (`grad`), or the optimiser and then the mask on what it did (`update`).
Full supervised fine-tuning is the special case of everything trainable and no mask: `--method sft`.

Read in this order: equation (above), Config, the module (search and importance), attach.

Three units with z = -0.5, 0 and 1, and a step of the optimiser that would move every weight by 1:

>>> from model import Llama, LlamaConfig
>>> adapter = attach(Llama(LlamaConfig(4, 2, 3, 1, 1)), Config(layers="0", modules="up_proj"))
>>> [(name, weight)] = adapter.trained.items()
>>> I = torch.tensor([-0.5, 0.0, 1.0]).tanh().abs()
>>> adapter.masks, _ = {name.removesuffix(".weight"): 1 - I}, weight.data.fill_(0.0)
>>> adapter.before_step()
>>> _ = weight.data.add_(1.0)
>>> adapter.after_step()
>>> weight.detach()
tensor([[0.5379, 0.5379],
        [1.0000, 1.0000],
        [0.2384, 0.2384]])
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from model import LINEARS, Adapter, UserError, find_linears, parse_layers

# ---------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    layers: Annotated[str, "layers to train: search, all, a list such as 3,9, or a range such as 25%-50%"] = "search"
    modules: Annotated[str, "what to train in them: linear layers, or all; searched too"] = "up_proj,down_proj"
    search_steps: Annotated[int, "optimiser steps of each node of the search", "[1, inf)"] = 400
    search_lr: Annotated[float | None, "peak learning rate of each node, which has no mask; default: --lr's default",
                         "(0, inf)"] = None
    mask_on: Annotated[Literal["update", "grad", "none"], "what 1 - I multiplies"] = "update"
    mask_source: Annotated[Literal["importance", "random"],
                           "random: the same values on shuffled units, a control"] = "importance"
    importance_dropout: Annotated[float, "dropout of the two passes", "(0, 1)"] = 0.1
    importance_batches: Annotated[int, "batches that the importance is a mean over", "[1, inf)"] = 16
    shares: Annotated[str, "also score these shares of the way from the base, such as 0.25,0.5 (Wise-FT)"] = ""

    def __post_init__(self):
        if self.modules == "all" and self.mask_on != "none":
            raise UserError("--modules all trains embeddings and norms too, which have no units to mask: "
                             "use --mask-on none, or name linear layers")
        parse_shares(self.shares)


def parse_shares(text):
    """[share] in order, from a text such as "0.25,0.5"."""
    with suppress(ValueError):
        shares = sorted(float(part) for part in text.split(",") if part)
        if all(map(math.isfinite, shares)):
            return shares
    raise UserError(f"--shares {text!r}: expected numbers such as 0.25,0.5")


# Everything trainable, no mask: full supervised fine-tuning.
PRESETS = {"sft": Config(layers="all", modules="all", mask_on="none")}
# Of train.py's own flags: the best H on validation data, seed 0, of 2e-3, 4e-3 and 8e-3 (`reproduce.compare --tune`).
# The mask halves the step (mean(1 - I) is about 1/2), which twice the nodes' steps make up for.
DEFAULTS = {"cofitune": {"steps": 800, "batch_size": 24, "lr": 2e-3}}


# ---------------------------------------------------------------------------------------------- coarse: the tree search

RANGES = ("0%-50%", "25%-75%", "50%-100%")
QUARTERS = {"0%-50%": ("0%-25%", "25%-50%"), "25%-75%": ("25%-50%", "50%-75%"), "50%-100%": ("50%-75%", "75%-100%")}
KINDS = {"MHA": "q_proj,k_proj,v_proj,o_proj", "FFN": "gate_proj,up_proj,down_proj"}
PARTS = {KINDS["MHA"]: ("q_proj", "k_proj", "v_proj", "o_proj", "q_proj,k_proj,v_proj"),
         KINDS["FFN"]: ("up_proj", "down_proj", "up_proj,down_proj", "gate_proj,up_proj")}
SHARES = "0.25,0.5,0.75,1"  # a: each node is scored at θ_0 + a (θ - θ_0), so that regions compete, not step sizes


def harmonic(point):
    """(H, its standard error) of {"speciality": S, "versatility": V, "errors": (of S, of V)}; zeros where S + V = 0."""
    S, V = point["speciality"], point["versatility"]
    if S + V == 0:
        return 0.0, 0.0
    by_S, by_V = 2 * V * V / (S + V) ** 2, 2 * S * S / (S + V) ** 2  # dH/dS, dH/dV
    return 2 * S * V / (S + V), math.hypot(by_S * point["errors"][0], by_V * point["errors"][1])


def plan(config, model_config, trial):
    """Chooses layers and modules where `--layers search` asks for it; returns the settled Config. The first node trains
    everything: SFT, and at a = 0 the base. A node counts by its a > 0 of the highest H.

    trial(name, config, steps=..., lr=...) fine-tunes a fresh copy, without a mask, in a folder of that name; its
    results have "seconds" and "points", one (as in scored) for each of config.shares.

    Prints how many nodes there may be; node by node, how long the rest may take; then draw_tree of all nodes,
    ("base", "") and ("SFT", "") first, which are never chosen; "other nodes within one standard error of the chosen
    one: N", of its H, where there are any; and "chosen: --layers ... --modules ...".
    """
    if config.layers != "search":
        return config
    most = len(RANGES) * len(KINDS) + 2 + max(map(len, PARTS.values())) + 1
    print(f"tree search: at most {most} nodes of {config.search_steps} steps; --search-steps and --eval-limit shorten "
          "it, --layers skips it", flush=True)
    seconds = []

    def score(layers, modules, shares=SHARES):
        """The points of a node, and the one with the highest H."""
        name = f"{layers.replace('%', '')}-{title(modules).replace(',', '+')}"
        node = replace(config, layers=layers, modules=modules, mask_on="none", shares=shares)
        results = trial(name, node, steps=config.search_steps, lr=config.search_lr)
        seconds.append(results["seconds"])
        best, left = max((p for p in results["points"] if p["share"]), key=harmonic), most - len(seconds)
        print(f"  {name:<32}H {harmonic(best)[0]:>5.1f}   at most {left} more, "
              f"{left * median(seconds) / 60:.1f} minutes", flush=True)
        return results["points"], best

    everything, sft = score("all", "all", "0," + SHARES)  # a = 0 is the base
    scores = {("base", ""): everything[0], ("SFT", ""): sft}  # {node: its best point}, a node being (layers, modules)
    tree = {None: list(scores)}  # {node: the nodes that it opens}, None being the root
    chosen, path = None, []
    levels = (lambda _: [(layers, modules) for layers in RANGES for modules in KINDS.values()],
              lambda node: [(quarter, node[1]) for quarter in QUARTERS[node[0]]],
              lambda node: [(node[0], part) for part in PARTS[node[1]]])
    for children in levels:
        nodes = [node for node in children(chosen) if inside(node[0], model_config.num_hidden_layers)]
        tree.setdefault(chosen, []).extend(nodes)
        scores.update({node: score(*node)[1] for node in nodes})
        chosen = max(path[-1:] + nodes, key=lambda node: harmonic(scores[node])[0])
        path.append(chosen)
    print(draw_tree(tree, scores, path))
    H, error = harmonic(scores[chosen])
    rivals = [harmonic(scores[node])[0] for node in scores if node not in (chosen, ("base", ""), ("SFT", ""))]
    if near := sum(rival > H - error for rival in rivals):
        print(f"other nodes within one standard error of the chosen one: {near}")
    print(f"chosen: --layers {chosen[0]} --modules {chosen[1]}", flush=True)
    return replace(config, layers=chosen[0], modules=chosen[1])


def inside(layers, count):
    """Whether a model of `count` layers has any in this range: a quarter of a very small one may be empty."""
    try:
        return bool(parse_layers(layers, count))
    except UserError:
        return False


def title(modules):
    """MHA or FFN for all of their modules."""
    return next((kind for kind, every in KINDS.items() if modules == every), modules)


def draw_tree(tree, scores, path, node=None, indent=""):
    """The scored nodes as text, each at its best share a; * marks the path to the chosen one."""
    lines = [] if node else ["tree search, validation data, ± standard error",
                             f"{'':<34}{'a':>5}{'speciality':>12}{'versatility':>12}{'Uni':>6}{'H':>10}"]
    children = tree.get(node, [])
    for child in children:
        last, point = child == children[-1], scores[child]
        label = f"{indent}{'└─' if last else '├─'} {child[0]} {title(child[1])}{' *' if child in path else ''}"
        cells = [(point["speciality"], point["errors"][0]), (point["versatility"], point["errors"][1]), harmonic(point)]
        S, V, H = ("{:.1f}±{:.1f}".format(*cell) for cell in cells)
        uni = point["speciality"] + point["versatility"]
        lines.append(f"{label:<34}{point['share']:>5g}{S:>12}{V:>12}{uni:>6.1f}{H:>10}")
        if child in tree:
            lines.append(draw_tree(tree, scores, path, child, indent + ("   " if last else "│  ")))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- fine: unit importance


def units(linear, name, config):
    """The number of a module's output units: heads for q, k and v, single outputs else. config: the LlamaConfig."""
    by_head = name.endswith(("q_proj", "k_proj", "v_proj"))
    return linear.out_features // config.head_dim if by_head else linear.out_features


def importance(model, linears, steps, dropout):
    """{module name: I (units,)} by the two-pass KL of the docstring. steps: an iterable of lists of micro-batches; the
    gradients of a list add up to those of one batch (its KL divided by its labelled tokens) before |.| is taken.

    Zscore is over the units of one module in one layer, with the standard deviation over n; where all units have the
    same score, I is zero. g is float32 or wider. Dropout is on every layer's two blocks; no hook stays.
    """
    masks, raw, handles, count = {}, {name: 0.0 for name in linears}, [], 0

    def masked(name):
        def hook(linear, args, output):
            g = masks[name]
            return output * g.repeat_interleave(linear.out_features // len(g)).to(output.dtype)
        return hook

    for name, linear in linears.items():
        masks[name] = torch.ones(units(linear, name, model.config), device=linear.weight.device, requires_grad=True,
                                 dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        handles.append(linear.register_forward_hook(masked(name)))
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            handles.append(block.register_forward_hook(lambda block, args, output: F.dropout(output, dropout)))
    try:
        for batches in steps:
            labelled = sum((batch.labels[:, 1:] != -100).sum() for batch in batches)
            gradients = [torch.autograd.grad(two_pass_kl(model, batch) / labelled, list(masks.values()))
                         for batch in batches]
            for name, *parts in zip(masks, *gradients):
                raw[name] = raw[name] + sum(parts).abs()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for name, total in raw.items():
        mean = total / count  # I_raw
        deviation = mean.std(unbiased=False)
        z = (mean - mean.mean()) / deviation if deviation > 0 else torch.zeros_like(mean)
        scores[name] = z.tanh().abs()  # I
    return scores


def two_pass_kl(model, batch):
    """KL(p_2 || p_1), summed over the labelled tokens, in float32 or wider, of two passes that differ only in their
    dropout (the hooks of importance)."""
    first, second = (model.labelled_logits(batch.ids, batch.labels, replace(batch.ctx))[0] for _ in range(2))
    wide = torch.promote_types(first.dtype, torch.float32)
    log_p1, log_p2 = first.to(wide).log_softmax(-1), second.to(wide).log_softmax(-1)
    return (log_p2.exp() * (log_p2 - log_p1)).sum()


# ---------------------------------------------------------------------------------------------- attach


class CoFiTuneAdapter(Adapter):
    def __init__(self, model, config, trained, linears):
        super().__init__(model)
        self.config, self.linears = config, linears
        self.prepare_steps = config.importance_batches if config.mask_on != "none" else 0
        self.trained = trained  # {name: parameter}
        self.dtypes = {name: p.dtype for name, p in trained.items()}
        self.masks = {}  # {module name: 1 - I (units,)}, made by prepare() where a mask is wanted
        self.base = {name: p.detach().clone() for name, p in trained.items()} if config.shares else {}  # θ_0

    def prepare(self, steps):
        """masks: 1 - I, before anything has moved; with a random mask I is shuffled among the units of each module."""
        if self.config.mask_on == "none":
            return
        scores = importance(self.model, self.linears, steps, self.config.importance_dropout)
        if self.config.mask_source == "random":
            scores = {name: score[torch.randperm(len(score)).to(score.device)] for name, score in scores.items()}
        self.masks = {name: 1 - score for name, score in scores.items()}

    def masked(self):
        """(parameter, 1 - I spread over its rows, shaped to broadcast) for every weight and bias that has a mask."""
        for name, mask in self.masks.items():
            for p in (self.linears[name].weight, self.linears[name].bias):
                if p is not None and p.requires_grad:
                    rows = mask.repeat_interleave(p.shape[0] // len(mask))  # unit u -> its rows: one, or a head's
                    yield p, rows.view(-1, *[1] * (p.dim() - 1)).to(p.dtype)

    @torch.no_grad()
    def before_step(self):
        """`grad`: the gradient becomes 1 - I of itself. `update`: remembers θ for after_step()."""
        if self.config.mask_on == "grad":
            for p, mask in self.masked():
                p.grad.mul_(mask)
        elif self.config.mask_on == "update":
            self.old = [p.detach().clone() for p, _ in self.masked()]

    @torch.no_grad()
    def after_step(self):
        """`update`: θ_old + (1 - I) (θ - θ_old)."""
        if self.config.mask_on == "update":
            for old, (p, mask) in zip(self.old, self.masked()):
                p.copy_(old + mask * (p - old))  # θ_u + (1 - I_u) Δθ_u, whatever made Δθ: gradient, momentum, decay

    def tensors(self):
        """The changed weights under their own names, and the importance, which depends on the unchanged model."""
        saved = {name: p.detach() for name, p in self.trained.items()}
        return saved | {f"importance.{name}": 1 - mask for name, mask in self.masks.items()}

    def load_tensors(self, tensors):
        scores = {name: t for name, t in tensors.items() if name.startswith("importance.")}
        self.masks = {}
        super().load_tensors({name: t for name, t in tensors.items() if name not in scores})
        self.masks = {name.removeprefix("importance."): 1 - score.to(self.model.device)
                      for name, score in scores.items()}

    def merge(self):
        """The weights are in their place already; they only go back to the base's dtype."""
        for name, p in self.trained.items():
            p.data = p.data.to(self.dtypes[name])

    @torch.no_grad()
    def scored(self, scores, score, suite):
        """{"points": [the means and their standard errors at θ_0 + a (θ - θ_0)]}, one for each share a."""
        end, points = {name: p.clone() for name, p in self.trained.items()}, []
        for share in parse_shares(self.config.shares):
            for name, p in self.trained.items():
                p.copy_(torch.lerp(self.base[name].to(p.dtype), end[name], share))
            found = scores if share == 1 else score()
            (S, V), errors = suite.means(found), suite.errors(found)
            points.append({"share": share, "speciality": S, "versatility": V, "errors": errors})
        for name, p in self.trained.items():
            p.copy_(end[name])
        return {"points": points} if points else {}

    def report(self):
        sizes = [(mask.mean().item(), p.numel()) for p, mask in self.masked()]
        mean = sum(m * n for m, n in sizes) / sum(n for _, n in sizes) if sizes else 1.0
        return {"layers": self.config.layers, "modules": self.config.modules, "mean_mask": mean}


def choose(model, config):
    """(layer numbers, {name: parameter} to train, {name: nn.Linear} among them) for a Config with settled layers."""
    if config.layers == "search":
        raise UserError("--layers search has to be settled by plan() first; name layers such as 25%-50%")
    layers = parse_layers(config.layers, model.config.num_hidden_layers)
    inside = tuple(f"model.layers.{i}." for i in layers)
    names = LINEARS if config.modules == "all" else [m.strip() for m in config.modules.split(",")]
    linears = find_linears(model, names)
    linears = {name: m for name, m in linears.items() if name.startswith(inside)}
    if config.modules != "all":
        trained = {f"{name}.{key}": p for name, m in linears.items() for key, p in m.named_parameters()}
    elif len(layers) == model.config.num_hidden_layers:
        trained = dict(model.named_parameters())  # embeddings, final norm and head as well
    else:
        trained = {name: p for name, p in model.named_parameters() if name.startswith(inside)}
    return layers, trained, linears


def attach(model, config):
    """Frees the chosen weights. Raises UserError for an empty layer range or a module that does not exist."""
    model.requires_grad_(False)
    _, trained, linears = choose(model, config)
    for p in trained.values():
        p.requires_grad_(True)
    return CoFiTuneAdapter(model, config, trained, linears)
