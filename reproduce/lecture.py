"""Pictures for a lecture, as SVG and PNG: how each method changes a layer, and the curve of CoFiTune's importance.

    pip install -r reproduce/requirements.txt && python -m reproduce.lecture --out lecture

Shapes are those of the built-in base and of each method's defaults; singular values and gates are those of README.
"""

from pathlib import Path

import torch

import csreft
import multilora
from engine.flags import Parser, command_line
from model import LlamaConfig, read_json
from reproduce import figures
from reproduce.runner import HERE, STORED

FROZEN, TRAINED, PLAIN = "#d8dee4", "#9fd8c4", "#ffffff"


def box(ax, x, y, text, colour=PLAIN, width=1.5, height=0.72):
    """A box with its centre at (x, y)."""
    ax.bar(x, height, width, y - height / 2, color=colour, edgecolor="#57606a")
    ax.text(x, y, text, ha="center", va="center", fontsize=11)


def arrows(ax, *pairs):
    for start, end in pairs:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#24292f", "linewidth": 1.2})


def multilora_layer(ax, shape, config):
    """y = W x + (alpha / r) sum_i s_i * (B_i A_i x), for the widest linear layer."""
    wide, d, r, n = shape.intermediate_size, shape.hidden_size, config.rank, config.modules
    box(ax, 0.6, 2, f"x\n({d},)", width=0.9)
    box(ax, 3.6, 3.6, f"W  ({wide}, {d})", FROZEN, width=2.4)
    arrows(ax, ((1.05, 2.2), (2.4, 3.5)))
    ax.plot([4.8, 7.3], [3.6, 3.6], color="#24292f", linewidth=1.2)
    arrows(ax, ((7.3, 3.6), (7.3, 2.36)))
    for i in range(n):
        y = 2.4 - 1.1 * i
        box(ax, 2.6, y, f"A{i + 1}  ({r}, {d})", TRAINED)
        box(ax, 4.4, y, f"B{i + 1}  ({wide}, {r})", TRAINED, width=1.6)
        box(ax, 6.0, y, f"s{i + 1}  ({wide},)", TRAINED, width=1.2)
        arrows(ax, ((1.05, 2.0), (1.85, y)), ((3.35, y), (3.6, y)), ((5.2, y), (5.4, y)),
               ((6.6, y), (7.05, 1.9 - 0.05 * i)))
    box(ax, 7.3, 2, "+", width=0.5)
    arrows(ax, ((7.55, 2), (7.9, 2)))
    box(ax, 8.4, 2, f"y\n({wide},)", width=0.9)
    ax.set_title(f"MultiLoRA: W stays, {n} modules of rank {r} beside it; s starts at zero")


def csreft_layer(ax, shape, config):
    """h' = h + sum_i α_i R_i^T (W_i h + b_i - R_i h)"""
    d, r, k = shape.hidden_size, config.rank, config.subspaces
    box(ax, 0.7, 2, f"h\n({d},)", width=1.0)
    box(ax, 3.0, 3.0, f"$R_i h$\n$R_i$ ({r}, {d})", TRAINED, width=1.9)
    box(ax, 3.0, 1.2, f"$W_i h + b_i$\n$W_i$ ({r}, {d})", TRAINED, width=1.9)
    box(ax, 5.0, 2.1, f"difference\n({r},)", width=1.3)
    box(ax, 6.6, 2.1, "times $α_i$", width=1.1)
    box(ax, 8.2, 2.1, f"$R_i^T$\n({d}, {r})", TRAINED, width=1.1)
    box(ax, 9.6, 2.1, "+", width=0.5)
    box(ax, 10.7, 2.1, f"h'\n({d},)", width=1.0)
    box(ax, 6.6, 0.4, f"router: x ({d},) → {d // 2} → α ({k},)", TRAINED, width=4.4)
    arrows(ax, ((1.2, 2.2), (2.05, 2.9)), ((1.2, 1.9), (2.05, 1.3)), ((3.95, 2.9), (4.35, 2.4)),
           ((3.95, 1.3), (4.35, 1.8)), ((5.65, 2.1), (6.05, 2.1)), ((7.15, 2.1), (7.65, 2.1)),
           ((8.75, 2.1), (9.35, 2.1)), ((9.85, 2.1), (10.2, 2.1)), ((6.6, 0.76), (6.6, 1.74)))
    ax.plot([0.7, 0.7, 9.6], [2.36, 3.9, 3.9], color="#24292f", linewidth=1.2)
    arrows(ax, ((9.6, 3.9), (9.6, 2.46)))
    ax.set_title(f"CS-ReFT: {k} subspaces of rank {r} after each layer; x: the prompt's mean embedding")


def cofitune_layers(ax, shape, _):
    """The stack with the region that is trained, and the mask on the rows of one weight."""
    L, d, wide = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    for i in range(L):
        box(ax, 1.6, 0.5 * i, f"layer {i}: attention", FROZEN, width=2.4, height=0.42)
        box(ax, 4.1, 0.5 * i, "MLP", TRAINED if i >= L // 2 else FROZEN, width=2.2, height=0.42)
    ax.text(2.6, -0.7, "coarse: only the chosen region is trained", ha="center", fontsize=11)
    keep = (1 - torch.linspace(-2.2, 2.2, 9).tanh().abs()).tolist()
    for u, share in enumerate(keep):
        box(ax, 7.9, 0.42 * u, "", TRAINED, width=3.0 * share, height=0.34)
        ax.text(9.7, 0.42 * u, f"unit {u}: 1 - I = {share:.2f}", va="center", fontsize=10)
    ax.text(8.4, -0.7, f"fine: rows of up_proj ({wide}, {d}), by importance,\neach moves by 1 - I of its step",
            ha="center", va="center", fontsize=11)
    arrows(ax, ((5.2, 0.5 * L - 1.5), (6.3, 2.2)))
    ax.set_title("CoFiTune: where, then how far")


def importance(ax):
    """z -> I = |tanh z|"""
    z = torch.linspace(-3, 3, 301)
    ax.plot(z, z.tanh().abs(), color=figures.COLOURS["cofitune"], label="I = |tanh z|")
    ax.plot(z, 1 - z.tanh().abs(), "--", color=figures.COLOURS["csreft"], label="1 - I: the share of its step")
    ax.annotate("important: held back", (1.8, 0.95), (0.9, 0.62), fontsize=10)
    ax.annotate("least important:\nheld back, too", (-1.8, 0.95), (-2.9, 0.55), fontsize=10)
    ax.set(xlabel="z: a unit's importance, standardised within its module", title="CoFiTune's mask", ylim=(0, 1.05))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/lecture"), help="folder for the pictures (%(default)s)")
    out = parser.parse_args().out
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update(figures.STYLE | {"svg.fonttype": "none"})
    out.mkdir(parents=True, exist_ok=True)
    shape, everything = LlamaConfig.from_pretrained(HERE.parent / "base"), read_json(STORED)
    drawn = {"spectra": figures.spectra(plt, everything["multilora"]),
             "gates": figures.gates(plt, everything["csreft"])}
    for draw, config in ((multilora_layer, multilora.Config()), (csreft_layer, csreft.Config()),
                         (cofitune_layers, None)):
        drawn[draw.__name__], ax = plt.subplots(figsize=(9, 4))
        ax.use_sticky_edges = False  # or the lowest boxes lose their edge
        draw(ax, shape, config)
        ax.axis("off")
    drawn["importance"], ax = plt.subplots(figsize=(6.2, 3.8))
    importance(ax)
    for name, figure in drawn.items():
        for kind in ("svg", "png"):
            figure.savefig(out / f"{name}.{kind}", dpi=130, bbox_inches="tight")
    print(f"{out}: {', '.join(drawn)}, as .svg and .png")


if __name__ == "__main__":
    command_line(main)
