"""Draws the pictures of `reproduce/README.md`, in results/, from compare.json.

    pip install -r reproduce/requirements.txt && python -m reproduce.figures [COMPARE_JSON]
"""

from pathlib import Path
from statistics import mean

from engine.flags import Parser, command_line
from model import read_json
from reproduce.runner import NAMES, STORED, column, mean_and_spread

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"sft": "#6E7781", "lora": "#E69F00", "multilora": "#009E73", "loreft": "#56B4E9", "csreft": "#0072B2",
           "cofitune": "#D55E00", "coarse": "#CC79A7", "random-mask": "#F0E442"}
STYLE = {"grid.color": "#d0d7de", "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left",
         "xtick.labelsize": 9, "legend.frameon": False, "figure.dpi": 200, "figure.constrained_layout.use": True}


def accuracy(plt, section):
    """Bars: each new task and the two means, by method."""
    seeds = {name: list(row["seeds"].values()) for name, row in section.items()}
    tasks = list(seeds["sft"][0]["tasks"])
    places = [*range(len(tasks)), len(tasks) + 0.4, len(tasks) + 1.4]  # the two means are set apart
    fig, ax = plt.subplots(figsize=(8.3, 3.9))
    width = 0.84 / len(seeds)
    for i, (name, runs) in enumerate(seeds.items()):
        values = [[run["tasks"][task] for run in runs] for task in tasks]
        values += [column(runs, key) for key in ("speciality", "versatility")]
        means, errors = zip(*map(mean_and_spread, values))
        ax.bar([place + (i - (len(seeds) - 1) / 2) * width for place in places], means, width * 0.92, yerr=errors,
               color=COLOURS[name], label=f"{NAMES[name]} ({runs[0]['share']:.1f} %)",
               error_kw={"elinewidth": 0.9, "capsize": 1.6})
    ax.set_xticks(places, [*tasks, "speciality:\nmean, new", "versatility:\nmean, general"])
    ax.set(ylabel="exact match, test data (%)", ylim=(0, 105),
           title="Six new tasks learned together, each method at its best learning rate\n"
                 f"mean and standard deviation of {len(runs)} seeds; in brackets: trained / base")
    fig.legend(loc="outside lower center", ncols=6, handlelength=1.0, columnspacing=1.1, fontsize=9)
    return fig


def spectra(plt, section):
    """Singular values of the learned updates."""
    fig, ax = plt.subplots(figsize=(6.2, 3.5))
    for name in ("lora", "multilora", "sft"):
        seeds = column(section["spectra"][name], "values")
        place, columns = range(1, len(seeds[0]) + 1), list(zip(*seeds))
        ax.plot(place, list(map(mean, columns)), "o-", markersize=3.5, color=COLOURS[name], label=NAMES[name])
        ax.fill_between(place, list(map(min, columns)), list(map(max, columns)), color=COLOURS[name], alpha=0.25)
    ax.set(xlabel="singular value of ΔW, by size", ylabel=f"share of the first {len(columns)}", xticks=place,
           title=f"Spread of the update ΔW, mean of all linear layers\nmean and range of {len(seeds)} seeds")
    ax.legend()
    return fig


def heat(ax, rows, columns, low, high, form, cmap, title):
    """A table {row: values} as colours and numbers."""
    ax.imshow(list(rows.values()), vmin=low, vmax=high, cmap=cmap, aspect="auto")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(visible=False)
    ax.set_title(title)
    for i, values in enumerate(rows.values()):
        for j, value in enumerate(values):
            ax.text(j, i, form.format(value), ha="center", va="center", fontsize=9)


def gates(plt, section):
    """Mean gates of one seed, routed on the prompt's mean and on the first token; interference of three methods."""
    fig, axes = plt.subplots(1, 3, figsize=(8.9, 3.3))
    for ax, name, read in zip(axes, ("csreft", "csreft-first-token"), ("prompt's mean", "first token")):
        means = section["gates"][name][0]["gates"]
        heat(ax, means, range(len(means["story"])), 0, 1.6, "{:.2f}", "Blues",
             f"Mean gate of each subspace,\nfirst seed, routing on the {read}")
    rows = section["interference"]
    lost = {task: [mean(alone - together for alone, together in column(seeds, task)) for seeds in rows.values()]
            for task in means}
    lost["mean"] = list(map(mean, zip(*lost.values())))
    heat(axes[2], lost, [NAMES[name] for name in rows], -60, 60, "{:+.1f}", "RdBu_r",
         f"Interference: alone − together\n(points), mean of {len(rows['lora'])} seeds")
    return fig


def front(plt, section):
    """Speciality against versatility over learning rates, and the judged runs."""
    fig, ax = plt.subplots(figsize=(6.2, 4.4))
    for name, points in section["front"].items():
        ax.plot(column(points, "speciality"), column(points, "versatility"), "o-", markersize=3, linewidth=1.2,
                color=COLOURS[name], label=NAMES[name])
    for name, points in section["facts"].items():
        (x, dx), (y, dy) = (mean_and_spread(column(points, key)) for key in ("speciality", "versatility"))
        ax.errorbar(x, y, dy, dx, "X" if name == "random-mask" else "*", markersize=11, capsize=2, color=COLOURS[name],
                    markeredgecolor="black", ecolor="black", zorder=5)
    ax.set(xlabel="speciality: two new fact tasks (%)", ylabel="versatility: ten general tasks (%)", xlim=(92, 100.4),
           ylim=(30, 85), title="Lines: one dot for each rate, validation data, seed 0; ★ its best rate, test data,\n"
                                f"{len(points)} seeds; ✖ CoFiTune with a random mask")
    ax.legend(loc="lower left")
    return fig


def bases(plt, compared, real):
    """Speciality against versatility of each method, on the built-in base and on a real one."""
    fig, axes = plt.subplots(1, 2, figsize=(8.3, 3.6), sharex=True, sharey=True)
    small = {name: list(row["seeds"].values()) for name, row in compared.items()}
    real = {name: row for name, row in real.items() if name in NAMES}
    kept = real["sft"][0]["versatility_before"]
    for ax, rows, before, title in ((axes[0], small, 98.4, "built-in base, 1.7 M, six new tasks"),
                                    (axes[1], real, kept, "SmolLM2, 135 M, two new tasks")):
        for name, runs in rows.items():
            (x, dx), (y, dy) = (mean_and_spread(column(runs, key)) for key in ("speciality", "versatility"))
            ax.errorbar(x, y, dy, dx, "o", markersize=7, capsize=2, color=COLOURS[name], label=NAMES[name])
        ax.axhline(before, color="#6E7781", linestyle=":", linewidth=1)
        ax.set(xlabel="speciality: new tasks (%)", title=f"{title}\nseeds: {len(runs)}; dotted: before training")
    axes[0].set(ylabel="versatility: general tasks (%)", xlim=(-3, 104), ylim=(-3, 104))
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=7, handlelength=1.0, fontsize=9)
    return fig


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=STORED, help="compare.json; default: the stored one")
    everything = read_json(parser.parse_args().file)
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    for draw, *sections in ((accuracy, "compare"), (spectra, "multilora"), (gates, "csreft"), (front, "cofitune"),
                            (bases, "compare", "real")):
        if everything.keys() >= set(sections):
            png = STORED.parent / f"{draw.__name__}.png"
            draw(plt, *map(everything.get, sections)).savefig(png)
            print(png)


if __name__ == "__main__":
    command_line(main)
