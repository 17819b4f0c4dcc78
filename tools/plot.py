"""Pictures of finished runs: loss, scores before and after, and what each method learned.

    python -m tools.plot out/multilora                       # out/multilora/plot.png
    python -m tools.plot out/lora out/csreft out/cofitune --png runs.png

CS-ReFT shows the mean gates of each task, MultiLoRA and LoRA the singular values of their updates, CoFiTune the nodes
of its search, each at its best share of the step.
"""

import json
from pathlib import Path

import torch

import data
from cofitune import harmonic, title
from engine.flags import Parser, command_line
from engine.table import wilson
from model import LINEARS, read_json, written
from multilora import singular_values
from train import Config, load_data, load_run


@torch.no_grad()
def gates_by_task(model, adapter, tests, pad):
    """{task: mean gates (k,)} over encoded examples. Only embeddings are needed: the router reads nothing else."""
    means = {}
    for task, examples in tests.items():
        total = 0.0
        for start in range(0, len(examples), 64):
            batch = data.collate(examples[start : start + 64], pad).to(model.device)
            adapter.edits.route(model.model.embed_tokens(batch.ids), batch.ctx)
            total = total + batch.ctx.memory["gates"].sum(0)
        means[task] = (total / len(examples)).tolist()
    return means


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
            reach = [[abs(v - wilson(v, s["rows"])[side]) for v, (_, s) in zip(values, found)]
                     for side in (0, 1)]
            axes.barh(places, values, height * 0.9, color=f"C{i}", alpha=alpha, label=f"{run.name}, {when}", xerr=reach,
                      error_kw={"linewidth": 0.7, "alpha": 1.0})
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(title="scores in %, 95 % intervals", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)


def draw_gates(axes, name, gates):
    image = axes.imshow(list(gates.values()), vmin=0, vmax=1, aspect="auto", cmap="Blues")
    axes.set_yticks(range(len(gates)), gates)
    axes.set_xticks(range(len(next(iter(gates.values())))))
    axes.set(title=f"{name}: mean gates", xlabel="subspace")
    axes.figure.colorbar(image, ax=axes)


def draw_spectra(axes, name, adapter):
    rank = adapter.report()["total_rank"]
    for kind in LINEARS:
        values = [singular_values(delta, rank) for weight, delta in adapter.deltas().items()
                  if weight.endswith(f"{kind}.weight")]
        if values:
            axes.plot(range(1, len(values[0]) + 1), torch.stack(values).mean(0), "o-", markersize=3, label=kind)
    axes.set(title=f"{name}: singular values of ΔW, of sum 1", xlabel="number", ylim=(0, None))
    axes.legend()


def draw_tree(axes, run, chosen):
    """A search's nodes by what they learned and kept, each at its best share; a star for the chosen one."""
    for file in sorted(run.glob("search/*/results.json")):
        best = max((p for p in read_json(file)["points"] if p["share"]), key=harmonic)
        place, star = (best["speciality"], best["versatility"]), file.parent.name == chosen
        axes.errorbar(*place, *reversed(best["errors"]), fmt="*" if star else ".", markersize=13 if star else 6,
                      color="C3" if star else "C0", linewidth=0.7)
        axes.annotate(file.parent.name, place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(title=f"{run.name}: nodes of the search", xlabel="speciality (%)", ylabel="versatility (%)",
             xlim=(0, 100), ylim=(0, 100))


def panels_of(run, results):
    """[function of axes] for what a run's method learned."""
    report = results["report"]
    if (run / "search").exists():
        chosen = f"{report['layers'].replace('%', '')}-{title(report['modules']).replace(',', '+')}"
        return [lambda axes: draw_tree(axes, run, chosen)]
    if not {"total_rank", "edit_parameters"} & report.keys():
        return []
    model, adapter, saved = load_run(run)
    if hasattr(adapter, "deltas"):
        return [lambda axes: draw_spectra(axes, run.name, adapter)]
    if adapter.edits.router is None:
        return []
    config = Config(**saved["asked"]["settings"])
    suite, tokenizer, _ = load_data(config, limit=min(config.eval_limit or 50, 50), train=False)
    gates = gates_by_task(model, adapter, suite.tests, tokenizer.pad_id)
    return [lambda axes: draw_gates(axes, run.name, gates)]


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folder, such as out/multilora")
    parser.add_argument("--png", type=Path, help="where to; default: plot.png in the first run's folder")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = {run: read_json(run / "results.json") for run in args.runs}
    panels = [lambda axes: draw_loss(axes, runs), lambda axes: draw_scores(axes, runs)]
    panels += [panel for run, results in runs.items() for panel in panels_of(run, results)]
    plt.rcParams.update({"font.size": 9, "legend.fontsize": 7, "legend.frameon": False})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.6 * lines), squeeze=False,
                                layout="constrained")
    for i, place in enumerate(axes.flat):
        panels[i](place) if i < len(panels) else place.axis("off")
    png = args.png or args.runs[0] / "plot.png"
    with written(png) as part:
        figure.savefig(part, format="png", dpi=110)
    print(f"{png}: {len(panels)} panels")


if __name__ == "__main__":
    command_line(main)
