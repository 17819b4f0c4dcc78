"""Draws the pictures of `reproduce/README.md` from compare.json, each for a light and for a dark page.

    pip install -r reproduce/requirements.txt && python -m reproduce.figures [COMPARE_JSON]

The pictures lie beside this file in results/. Nothing is computed here that compare.json does not hold.
"""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from engine.flags import Parser, command_line  # noqa: E402
from model import read_json  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"sft": "SFT", "lora": "LoRA", "multilora": "MultiLoRA", "loreft": "LoReFT", "csreft": "CS-ReFT",
         "cofitune": "CoFiTune", "coarse": "coarse only", "sft-l2": "SFT + L2", "wise-ft": "Wise-FT",
         "lora-equal-parameters": "LoRA, rank 14", "csreft-first-token": "CS-ReFT, first token",
         "random-mask": "random mask"}
# Okabe and Ito's colours, which colour-blind readers can tell apart; black or white is the page's own.
COLOURS = {"sft": None, "lora": "#E69F00", "multilora": "#009E73", "loreft": "#56B4E9", "csreft": "#0072B2",
           "cofitune": "#D55E00", "coarse": "#CC79A7", "sft-l2": "#8C8C8C", "wise-ft": "#009E73",
           "random-mask": "#F0E442"}
PAGES = {"light": {"page": "#ffffff", "ink": "#1f2328", "faint": "#d0d7de", "low": "#ffffff", "map": "Blues"},
         "dark": {"page": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d", "low": "#0d1117", "map": "viridis"}}


def dress(page):
    """matplotlib's settings for a page."""
    ink = page["ink"]
    plt.rcParams.update({
        "figure.facecolor": page["page"], "axes.facecolor": page["page"], "savefig.facecolor": page["page"],
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "grid.color": page["faint"], "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10,
        "axes.titlesize": 9.5, "xtick.labelsize": 9, "figure.dpi": 200, "figure.constrained_layout.use": True})


def colour(name, page):
    return COLOURS[name] or page["ink"]


def seeds_text(seeds):
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def accuracy(everything, page):
    """Bars: each new task and the two means, by method."""
    rows = everything["compare"]["rows"]
    seeds = list(next(iter(rows.values()))["seeds"])
    tasks = list(next(iter(rows.values()))["tasks"])
    groups = [*tasks, "speciality", "versatility"]
    fig, ax = plt.subplots(figsize=(8.3, 3.9))
    width = 0.84 / len(rows)
    for i, (name, row) in enumerate(rows.items()):
        values = [*row["tasks"].values(), row["speciality"], row["versatility"]]
        places = [g + (g >= len(tasks)) * 0.4 + (i - (len(rows) - 1) / 2) * width for g in range(len(groups))]
        means, errors = zip(*values)
        ax.bar(places, means, width * 0.92, color=colour(name, page), label=f"{NAMES[name]} ({row['share']:.1f} %)",
               yerr=errors, error_kw={"ecolor": page["ink"] if name != "sft" else "#8C8C8C", "elinewidth": 0.9,
                                      "capsize": 1.6})
    ax.set_xticks([g + (g >= len(tasks)) * 0.4 for g in range(len(groups))],
                  [*tasks, "speciality:\nmean, new", "versatility:\nmean, general"])
    ax.set_ylabel("exact match, test data (%)")
    ax.set_ylim(0, 105)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"Six new tasks learned together, each method at its best learning rate\n"
                 f"mean and standard deviation of {seeds_text(seeds)}; in brackets: trained / base",
                 loc="left")
    fig.legend(loc="outside lower center", ncols=6, handlelength=1.0, columnspacing=1.1, fontsize=9)
    return fig


def spectra(everything, page):
    """Singular values of the learned updates, and how alike they are to SFT's."""
    section = everything["multilora"]
    seeds = section["claims"][0]["seeds"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.3, 3.3), width_ratios=(1.7, 1))
    for name in ("lora", "multilora", "sft"):
        values = [row["values"] for row in section["spectra"][name]]
        columns, place = list(zip(*values)), range(1, len(values[0]) + 1)
        left.plot(place, [statistics.mean(c) for c in columns], marker="o", markersize=3.5, color=colour(name, page),
                  label=NAMES[name])
        left.fill_between(place, [min(c) for c in columns], [max(c) for c in columns], color=colour(name, page),
                          alpha=0.25, linewidth=0)
    left.set_xlabel("singular value of ΔW, by size")
    left.set_ylabel(f"share of the first {len(values[0])}")
    left.set_xticks(place)
    left.set_ylim(0)
    left.legend()
    left.set_title(f"Spread of the update ΔW, mean of all linear layers\nmean and range of {seeds_text(seeds)}",
                   loc="left")
    for i, name in enumerate(("lora", "multilora")):
        points = [row["similarity_to_sft"] for row in section["spectra"][name]]
        right.bar(i, statistics.mean(points), 0.6, color=colour(name, page))
        right.plot([i] * len(points), points, "o", markersize=4, color=page["page"], markeredgecolor=page["ink"])
    right.set_xticks((0, 1), [NAMES[name] for name in ("lora", "multilora")])
    right.set_ylabel("share of the subspace, 0 to 1")
    right.grid(axis="x", visible=False)
    right.set_title(f"Leading {len(values[0])} directions shared\nwith SFT's update; dots: seeds", loc="left")
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


def gates(everything, page):
    """Mean gates of one seed, routed on the prompt's mean and on the first token; interference of three methods."""
    section = everything["csreft"]
    seeds = section["claims"][0]["seeds"]
    fig, axes = plt.subplots(1, 3, figsize=(8.3, 3.3), width_ratios=(4, 4, 4.2))
    for ax, name, title in zip(axes, ("csreft", "csreft-first-token"), ("prompt's mean", "first token")):
        table = section["gates"][name][0]["gates"]
        tasks = list(table)
        heat(ax, list(table.values()), tasks if ax is axes[0] else [""] * len(tasks), range(len(table[tasks[0]])),
             page, 0, 1, "{:.2f}")
        ax.set_xlabel("subspace")
        ax.set_title(f"Mean gate (0 to 1), seed {seeds[0]},\nrouting on the {title}", loc="left")
    methods = list(section["interference"])
    means = [[statistics.mean(alone - together for alone, together in (row[task] for row in section["interference"][m]))
              for m in methods] for task in tasks]
    methods_mean = [statistics.mean(column) for column in zip(*means)]
    largest = max(abs(value) for line in means for value in line)
    heat(axes[2], [*means, methods_mean], [*tasks, "mean"], [NAMES[m] for m in methods], page, -largest, largest,
         "{:+.0f}", signed=True)
    axes[2].set_title(f"Interference: alone − together\n(points), mean of {seeds_text(seeds)}", loc="right", ha="right")
    return fig


def front(everything, page):
    """Speciality against versatility over learning rates, and the judged runs."""
    section = everything["cofitune"]
    seeds = section["claims"][0]["seeds"]
    fig, (wide, close) = plt.subplots(1, 2, figsize=(8.3, 4.2), width_ratios=(1, 1.15))
    for ax in (wide, close):
        for name, points in section["front"].items():
            if name == "wise-ft":  # one curve for each SFT run it starts from
                curves = [[p for p in points if p["lr"] == lr] for lr in dict.fromkeys(p["lr"] for p in points)]
            else:
                curves = [points]
            for i, curve in enumerate(curves):
                ax.plot([p["speciality"] for p in curve], [p["versatility"] for p in curve], marker="o", markersize=3,
                        linewidth=1.2, linestyle=":" if name == "wise-ft" else "-", color=colour(name, page),
                        label=NAMES[name] if not i else None)
        for name, scores in section["scores"].items():
            if (name == "sft-same-rate") != (ax is wide):
                continue
            base = "sft" if name == "sft-same-rate" else name
            x, y = ([score[key] for score in scores] for key in ("speciality", "versatility"))
            deviation = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (x, y)]
            ax.errorbar(statistics.mean(x), statistics.mean(y), xerr=deviation[0], yerr=deviation[1], capsize=2,
                        marker="X" if name == "random-mask" else "*" if name == base else "s",
                        markersize=11 if name == base else 6,
                        color=colour(base, page), markeredgecolor=page["ink"], ecolor=page["ink"], linestyle="",
                        label=NAMES[name] if name == "random-mask" else None, zorder=5)
        ax.set_xlabel("speciality: two new fact tasks (%)")
    wide.set_ylabel("versatility: ten general tasks (%)")
    wide.set_xlim(-2, 102)
    wide.set_ylim(-2, 102)
    judged = [score for name, scores in section["scores"].items() if name != "sft-same-rate" for score in scores]
    close.set_xlim(min(94.0, min(score["speciality"] for score in judged) - 1), 100.4)
    highest = max(score["versatility"] for score in judged)
    close.set_ylim(min(score["versatility"] for score in judged) - 8, highest + 6)
    wide.set_title("Dots: one for each rate or weight, validation,\nseed 0; ■ SFT at CoFiTune's best rate, test",
                   loc="left")
    close.set_title(f"Close-up, and test data, mean ± std of {seeds_text(seeds)}:\n★ at its best rate, "
                    "✖ CoFiTune with a random mask", loc="left")
    fig.legend(*wide.get_legend_handles_labels(), loc="outside lower center", ncols=7, handlelength=1.5,
               columnspacing=1.0, fontsize=9)
    return fig


PICTURES = {"accuracy": ("compare", accuracy), "spectra": ("multilora", spectra), "gates": ("csreft", gates),
            "front": ("cofitune", front)}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "compare.json", help="what reproduce.compare "
                        "writes (%(default)s)")
    file = parser.parse_args().file
    everything = read_json(file)
    for name, (section, draw) in PICTURES.items():
        if section not in everything:
            print(f"{name}: skipped, {file} has no {section!r} (python -m reproduce.compare "
                  f"{'--seeds 5' if section == 'compare' else '--claim ' + section})")
            continue
        for kind, page in PAGES.items():
            dress(page)
            fig = draw(everything, page)
            fig.savefig(RESULTS / f"{name}-{kind}.png")
            plt.close(fig)
        print(RESULTS / f"{name}-light.png", "and dark")


if __name__ == "__main__":
    command_line(main)
