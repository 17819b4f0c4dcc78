"""Pictures of finished runs: loss, scores before and after, and CoFiTune's search.

    python -m tools.plot out/multilora                       # out/multilora/plot.png
    python -m tools.plot out/lora out/csreft out/cofitune --png runs.png
"""

import json
from pathlib import Path

from cofitune import harmonic, title
from engine.flags import Parser, command_line
from engine.table import wilson
from model import read_json, written


def draw_loss(axes, runs):
    """Loss in training, and on validation rows where they were scored."""
    for i, (run, _) in enumerate(runs.items()):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for key, style, label in (("loss", "-", run.name), ("validation_loss", "o--", f"{run.name}, validation")):
            if points := [(line["step"], line[key]) for line in lines if key in line]:
                axes.plot(*zip(*points), style if len(points) > 1 else "o", color=f"C{i}", markersize=3, linewidth=1,
                          label=label)
    axes.set(title="loss", xlabel="step")
    axes.legend()


def draw_scores(axes, runs):
    """Percentages before, as a light bar, and after, with 95 % intervals."""
    tasks = list(dict.fromkeys(t for r in runs.values() for t, s in r["tasks"].items() if s["unit"] == "%"))
    height = 0.8 / len(runs)
    for i, (run, results) in enumerate(runs.items()):
        found = [(tasks.index(t), s) for t, s in results["tasks"].items() if t in tasks]
        places = [place + (i - (len(runs) - 1) / 2) * height for place, _ in found]
        for when, alpha in (("before", 0.25), ("after", 1.0)):
            values = [s[when] for _, s in found]
            reach = [[abs(v - wilson(v, s["rows"])[side]) for v, (_, s) in zip(values, found)] for side in (0, 1)]
            axes.barh(places, values, height * 0.9, color=f"C{i}", alpha=alpha, label=f"{run.name}, {when}", xerr=reach,
                      error_kw={"linewidth": 0.7, "alpha": 1.0})
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(title="scores in %, 95 % intervals", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)


def draw_tree(axes, run, report):
    """A search's nodes by what they learned and kept, each at its best share; a star for the chosen one."""
    chosen = f"{report['layers'].replace('%', '')}-{title(report['modules']).replace(',', '+')}"
    for file in sorted(run.glob("search/*/results.json")):
        best = max((p for p in read_json(file)["points"] if p["share"]), key=harmonic)
        place, star = (best["speciality"], best["versatility"]), file.parent.name == chosen
        axes.errorbar(*place, *reversed(best["errors"]), fmt="*" if star else ".", markersize=13 if star else 6,
                      color="C3" if star else "C0", linewidth=0.7)
        axes.annotate(file.parent.name, place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(title=f"{run.name}: nodes of the search", xlabel="speciality (%)", ylabel="versatility (%)",
             xlim=(0, 100), ylim=(0, 100))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folder, such as out/multilora")
    parser.add_argument("--png", type=Path, help="where to; default: plot.png in the first run's folder")
    args = parser.parse_args()
    import matplotlib
    from matplotlib.figure import Figure
    runs = {run: read_json(run / "results.json") for run in args.runs}
    panels = [(draw_loss, runs), (draw_scores, runs)]
    panels += [(draw_tree, run, results["report"]) for run, results in runs.items() if (run / "search").exists()]
    matplotlib.rcParams.update({"font.size": 9, "legend.fontsize": 7, "legend.frameon": False})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((5.2 * columns, 4.6 * lines), layout="constrained")
    for i, (draw, *what) in enumerate(panels, 1):
        draw(figure.add_subplot(lines, columns, i), *what)
    png = args.png or args.runs[0] / "plot.png"
    with written(png) as part:
        figure.savefig(part, format="png", dpi=110)
    print(f"{png}: {len(panels)} panels")


if __name__ == "__main__":
    command_line(main)
