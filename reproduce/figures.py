"""Draws the pictures of `reproduce/README.md` from compare.json, each for a light and for a dark page.

    pip install -r reproduce/requirements.txt && python -m reproduce.figures [COMPARE_JSON]

The pictures lie beside this file in results/. Nothing is computed here that compare.json does not hold.
"""

from math import tanh
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from engine.flags import Parser, command_line  # noqa: E402
from model import read_json  # noqa: E402
from reproduce.table import STORED, column, mean_and_spread  # noqa: E402

RESULTS = STORED.parent
NAMES = {"sft": "SFT", "lora": "LoRA", "multilora": "MultiLoRA", "loreft": "LoReFT", "csreft": "CS-ReFT",
         "cofitune": "CoFiTune", "coarse": "coarse only", "sft-l2": "SFT + L2", "wise-ft": "Wise-FT",
         "random-mask": "random mask"}
# Okabe and Ito's colours, which colour-blind readers can tell apart; SFT has the page's own ink.
COLOURS = {"lora": "#E69F00", "multilora": "#009E73", "loreft": "#56B4E9", "csreft": "#0072B2", "cofitune": "#D55E00",
           "coarse": "#CC79A7", "sft-l2": "#8C8C8C", "wise-ft": "#009E73", "random-mask": "#F0E442"}
SUBSPACES = 4  # of csreft by default, and in these runs
PAGES = {"light": {"page": "#ffffff", "ink": "#1f2328", "faint": "#d0d7de", "map": "Blues"},
         "dark": {"page": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d", "map": "viridis"}}


def dress(page):
    """matplotlib's settings for a page."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    plt.rcParams.update({
        **dict.fromkeys(ink, page["ink"]), **dict.fromkeys(paper, page["page"]),
        "grid.color": page["faint"], "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10,
        "axes.titlesize": 9.5, "axes.titlelocation": "left", "xtick.labelsize": 9, "figure.dpi": 200,
        "figure.constrained_layout.use": True})


def seeds_text(seeds):
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def accuracy(section, page):
    """Bars: each new task and the two means, by method."""
    rows = section["rows"]
    first = next(iter(rows.values()))
    tasks = list(first["tasks"])
    places = [*range(len(tasks)), len(tasks) + 0.4, len(tasks) + 1.4]  # the means stand apart
    fig, ax = plt.subplots(figsize=(8.3, 3.9))
    width = 0.84 / len(rows)
    for i, (name, row) in enumerate(rows.items()):
        means, errors = zip(*row["tasks"].values(), row["speciality"], row["versatility"])
        ax.bar([place + (i - (len(rows) - 1) / 2) * width for place in places], means, width * 0.92,
               color=COLOURS.get(name, page["ink"]), label=f"{NAMES[name]} ({row['share']:.1f} %)", yerr=errors,
               error_kw={"ecolor": page["ink"] if name != "sft" else "#8C8C8C", "elinewidth": 0.9, "capsize": 1.6})
    ax.set_xticks(places, [*tasks, "speciality:\nmean, new", "versatility:\nmean, general"])
    ax.set_ylabel("exact match, test data (%)")
    ax.set_ylim(0, 105)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"Six new tasks learned together, each method at its best learning rate\n"
                 f"mean and standard deviation of {seeds_text(list(first['seeds']))}; in brackets: trained / base")
    fig.legend(loc="outside lower center", ncols=6, handlelength=1.0, columnspacing=1.1, fontsize=9)
    return fig


def spectra(section, page):
    """Singular values of the learned updates, and how alike they are to SFT's."""
    seeds, rows = section["claims"][0]["seeds"], section["spectra"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.3, 3.3), width_ratios=(1.7, 1))
    for name in ("lora", "multilora", "sft"):
        columns, colour = list(zip(*column(rows[name], "values"))), COLOURS.get(name, page["ink"])
        place = range(1, len(columns) + 1)
        left.plot(place, list(map(mean, columns)), marker="o", markersize=3.5, color=colour, label=NAMES[name])
        left.fill_between(place, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.25,
                          linewidth=0)
    left.set_xlabel("singular value of ΔW, by size")
    left.set_ylabel(f"share of the first {len(columns)}")
    left.set_xticks(place)
    left.set_ylim(0)
    left.legend()
    left.set_title(f"Spread of the update ΔW, mean of all linear layers\nmean and range of {seeds_text(seeds)}")
    for i, name in enumerate(("lora", "multilora")):
        points = column(rows[name], "similarity_to_sft")
        right.bar(i, mean(points), 0.6, color=COLOURS[name])
        right.plot([i] * len(points), points, "o", markersize=4, color=page["page"], markeredgecolor=page["ink"])
    right.set_xticks((0, 1), ("LoRA", "MultiLoRA"))
    right.set_ylabel("share of the subspace, 0 to 1")
    right.grid(axis="x", visible=False)
    right.set_title(f"Leading {len(columns)} directions shared\nwith SFT's update; dots: seeds")
    return fig


def heat(ax, table, rows, columns, page, low, high, form, signed=False):
    ax.imshow(table, vmin=low, vmax=high, cmap="RdBu_r" if signed else page["map"], aspect="auto")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            part = (value - low) / (high - low)
            strong = abs(part - 0.5) > 0.3 if signed else (part > 0.55) == (page["map"] == "Blues")
            text = form.format(value)
            ax.text(j, i, "0" if text in ("-0", "+0") else text, ha="center", va="center", fontsize=9,
                    color="#ffffff" if strong else "#111111")


def gates(section, page):
    """Mean gates of one seed, routed on the prompt's mean and on the first token; interference of three methods."""
    seeds, interference = section["claims"][0]["seeds"], section["interference"]
    fig, axes = plt.subplots(1, 3, figsize=(8.3, 3.3), width_ratios=(4, 4, 4.2))
    for ax, name, title in zip(axes, ("csreft", "csreft-first-token"), ("prompt's mean", "first token")):
        table = section["gates"][name][0]["gates"]
        tasks = list(table)
        heat(ax, list(table.values()), tasks if ax is axes[0] else [""] * len(tasks), range(len(table[tasks[0]])),
             page, 0, 1, "{:.2f}")
        ax.set_xlabel("subspace")
        ax.set_title(f"Mean gate (0 to 1), seed {seeds[0]},\nrouting on the {title}")
    means = [[mean(alone - together for alone, together in column(rows, task)) for rows in interference.values()]
             for task in tasks]
    largest = max(abs(value) for line in means for value in line)
    means.append(list(map(mean, zip(*means))))
    heat(axes[2], means, [*tasks, "mean"], [NAMES[name] for name in interference], page, -largest, largest, "{:+.0f}",
         signed=True)
    axes[2].set_title(f"Interference: alone − together\n(points), mean of {seeds_text(seeds)}", loc="right", ha="right")
    return fig


def front(section, page):
    """Speciality against versatility over learning rates, and the judged runs."""
    fig, (wide, close) = plt.subplots(1, 2, figsize=(8.3, 4.2), width_ratios=(1, 1.15))
    scores = dict(section["scores"])
    for ax in (wide, close):
        for name, points in section["front"].items():
            # of Wise-FT one curve for each SFT run that it starts from
            curves = [[p for p in points if p["lr"] == lr] for lr in dict.fromkeys(column(points, "lr"))
                      ] if name == "wise-ft" else [points]
            for curve in curves:
                ax.plot(column(curve, "speciality"), column(curve, "versatility"), marker="o", markersize=3,
                        linewidth=1.2, linestyle=":" if name == "wise-ft" else "-",
                        color=COLOURS.get(name, page["ink"]), label=NAMES[name] if curve is curves[0] else None)
        ax.set_xlabel("speciality: two new fact tasks (%)")

    def judged(ax, points, colour, **look):
        (x, dx), (y, dy) = (mean_and_spread(column(points, key)) for key in ("speciality", "versatility"))
        ax.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, color=colour, markeredgecolor=page["ink"], ecolor=page["ink"],
                    linestyle="", zorder=5, **look)

    judged(wide, scores.pop("sft-same-rate"), page["ink"], marker="s", markersize=6)
    for name, points in scores.items():
        judged(close, points, COLOURS.get(name, page["ink"]), markersize=11,
               marker="X" if name == "random-mask" else "*")
    wide.set_ylabel("versatility: ten general tasks (%)")
    wide.set_xlim(-2, 102)
    wide.set_ylim(-2, 102)
    x, y = ([score[key] for points in scores.values() for score in points] for key in ("speciality", "versatility"))
    close.set_xlim(min(94.0, min(x) - 1), 100.4)
    close.set_ylim(min(y) - 8, max(y) + 6)
    wide.set_title("Dots: one for each rate or weight, validation,\nseed 0; ■ SFT at CoFiTune's best rate, test")
    close.set_title(f"Close-up, and test data, mean ± std of {seeds_text(section['claims'][0]['seeds'])}:\n"
                    "★ at its best rate, ✖ CoFiTune with a random mask")
    fig.legend(*wide.get_legend_handles_labels(), loc="outside lower center", ncols=7, handlelength=1.5,
               columnspacing=1.0, fontsize=9)
    return fig


def teaching(section, page):
    """|R_i R_j^T| of CS-ReFT's subspaces, and where CoFiTune's units lie on the curve from z to 1 - I."""
    fig, axes = plt.subplots(1, 3, figsize=(8.3, 3.0), width_ratios=(1, 1, 1.9))
    size = len(next(iter(section["overlap"].values())))
    for ax, (name, values) in zip(axes, section["overlap"].items()):
        ax.imshow(values, vmin=0, vmax=1, cmap=page["map"])
        ax.grid(visible=False)
        ax.set_xticks([(i + 0.5) * size / SUBSPACES - 0.5 for i in range(SUBSPACES)], range(SUBSPACES))
        ax.set_yticks(ax.get_xticks(), range(SUBSPACES) if ax is axes[0] else [""] * SUBSPACES)
        ax.tick_params(length=0)
        ax.set_title(f"CS-ReFT: $|R_i R_j^T|$,\n{'joint' if 'joint' in name else 'separate'} (0 to 1)")
        ax.set_xlabel("subspace")
    low, share, _ = zip(*section["importance"]["histogram"])
    axes[2].bar([x + 0.25 for x in low], share, 0.46, color=COLOURS["csreft"])
    axes[2].set_xlabel("z of a unit, within its module")
    axes[2].set_ylabel("share of the units (%)")
    axes[2].set_title("CoFiTune: bars, how many units;\nline, what is left of their steps, 1 − |tanh z|")
    curve = axes[2].twinx()
    points = [low[0] + (low[-1] + 0.5 - low[0]) * i / 200 for i in range(201)]
    curve.plot(points, [1 - abs(tanh(z)) for z in points], color=COLOURS["cofitune"])
    curve.set_ylim(0, 1.02)
    curve.grid(visible=False)
    curve.spines["right"].set_visible(True)
    return fig


PICTURES = {"compare": accuracy, "multilora": spectra, "csreft": gates, "cofitune": front, "teach": teaching}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=STORED,
                        help="what reproduce.compare writes; default: the stored figures")
    file = parser.parse_args().file
    everything = read_json(file)
    for section, draw in PICTURES.items():
        name = draw.__name__
        if section not in everything:
            how = {"compare": "--seeds 5", "teach": "--teach"}.get(section, f"--claim {section}")
            print(f"{name}: skipped, {file} has no {section!r} (python -m reproduce.compare {how})")
            continue
        for kind, page in PAGES.items():
            dress(page)
            fig = draw(everything[section], page)
            fig.savefig(RESULTS / f"{name}-{kind}.png")
            plt.close(fig)
        print(RESULTS / f"{name}-light.png", "and dark")


if __name__ == "__main__":
    command_line(main)
