"""Gates of a CS-ReFT run, task by task, and what each subspace is good for.

    python -m reproduce.gates out/csreft
"""

from dataclasses import replace
from pathlib import Path

import torch

import data
from engine.flags import Parser, command_line
from model import UserError
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


def table(title, columns, rows):
    print(f"\n{title}\n{'':<14}" + "".join(f"{c:>12}" for c in columns))
    for name, values in rows.items():
        print(f"{name:<14}" + "".join(f"{v:>12.2f}" for v in values))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/csreft")
    parser.add_argument("--eval-limit", type=int, default=0, help="examples of each task, 0 for all")
    args = parser.parse_args()
    model, adapter, saved = load_run(args.run)
    if not hasattr(adapter, "edits"):
        raise UserError(f"{args.run} is a run of {saved['method']!r}, expected csreft or loreft")
    config = Config(**saved["asked"]["settings"])
    suite, tokenizer, _ = load_data(config, limit=args.eval_limit or config.eval_limit, train=False)
    new = replace(suite, tests={task: e for task, e in suite.tests.items() if suite.group[task] == "new"})
    edits, k = adapter.edits, adapter.edits.config.subspaces
    score = lambda: {task: data.main_figure(figures) for task, figures in data.evaluate(
        model, new, tokenizer, config.batch_size, config.max_new_tokens).items()}

    table("mean gate of each subspace", [f"subspace {i}" for i in range(k)],
          gates_by_task(model, adapter, suite.tests, tokenizer.pad_id))
    scores = []
    for edits.off in (None, *range(k)):
        scores.append(score())
    soft, edits.off = scores[0], None
    table("score in % (or loss), and with one subspace switched off", ["all on", *(f"no {i}" for i in range(k))],
          {task: [s[task] for s in scores] for task in new.tests})
    if edits.router is not None:
        edits.config.gate = "hard"
        hard, opened = score(), gates_by_task(model, adapter, new.tests, tokenizer.pad_id)
        table("soft gates, hard gates (α > 0.5) and share of them open", ["soft", "hard", "open"],
              {task: [soft[task], hard[task], sum(opened[task]) / k] for task in new.tests})
    print(f"\nlargest |R R^T - I|: {adapter.orthonormality_error():.1e}")


if __name__ == "__main__":
    command_line(main)
