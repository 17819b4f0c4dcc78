"""CS-ReFT's claim: edits in several subspaces, gated by a router, keep tasks from interfering with each other.

    python -m reproduce.claims.csreft

Interference of a task is its accuracy when trained alone, on as many of its examples, minus that when trained together
with the others. The controls are LoReFT, the same total rank in one subspace, and LoRA. Accuracy is judged too, since a
method that is weak alone interferes little. The mechanism is the router: gates can only separate tasks if its input
differs between them. So a gate's largest difference between two tasks is compared with that of the untrained router,
reading the prompt's mean (our default) and reading the first token (the paper's choice).
"""

from statistics import mean

import torch

import csreft
import train
from base import suite as builtin
from engine.flags import command_line
from model import Llama
from reproduce.gates import gates_by_task
from reproduce.runner import ALL, NAMES, claim, column, finish, judge, markdown, over_seeds, verdicts

RUNS = {"csreft": "--method csreft --lr 1e-2", "loreft": "--method loreft --lr 5e-3", "lora": "--method lora --lr 4e-3"}
FIRST_TOKEN = {"csreft-first-token": "--method csreft --route-on first_token --lr 1e-2"}
ALONE = "--steps 133 --batch-size 24"  # for one task of six: a sixth of ALL's steps


def gates(run):
    """{"gates": {task: mean (k,)}, "spread": largest difference of two tasks in one subspace, "untrained_spread"}"""
    model, adapter, saved = train.load_run(run["folder"])
    config = train.Config(**saved["asked"]["settings"])
    suite, tokenizer, _ = train.load_data(config, train=False)
    new = {task: examples for task, examples in suite.tests.items() if suite.group[task] == "new"}
    torch.manual_seed(config.seed)
    start = csreft.attach(Llama.from_pretrained(config.base), adapter.config)
    trained, untrained = (gates_by_task(a.model, a, new, tokenizer.pad_id) for a in (adapter, start))
    widest = lambda means: max(max(subspace) - min(subspace) for subspace in zip(*means.values()))
    return {"gates": trained, "spread": widest(trained), "untrained_spread": widest(untrained)}


def interference(together, rows, tasks, alone, args):
    """{row: [{task: [accuracy alone, together]} at each seed]}. together: {row: [results at each seed]} of runs on all
    tasks. rows: {row: flags}, which are run on one task each, with the flags `alone`."""
    runs = {(name, seed, task): f"{flags} --tasks {task} {alone} --seed {seed}"
            for name, flags in rows.items() for seed in args.seeds for task in tasks}
    results = finish(runs.values(), args)
    after = lambda run, task: run["tasks"][task]["after"]
    return {name: [{task: [after(results[runs[name, seed, task]], task), after(run, task)] for task in tasks}
                   for seed, run in zip(args.seeds, together[name])] for name in rows}


def measure(args):
    together = over_seeds({name: f"{flags} {ALL}" for name, flags in {**RUNS, **FIRST_TOKEN}.items()}, args)
    return {"accuracy": {name: column(row, "speciality") for name, row in together.items()},
            "interference": interference(together, RUNS, builtin.NEW, ALONE, args),
            "gates": {name: [gates(run) for run in together[name]] for name in ("csreft", *FIRST_TOKEN)}}


def interfering(measured, seeds):
    """The judged claims about what interference() measures."""
    lost = {name: [mean(alone - together for alone, together in row.values()) for row in rows]
            for name, rows in measured.items()}
    return [judge("interference: LoReFT's, at equal total rank, above CS-ReFT's", seeds,
                  lost["loreft"], lost["csreft"]),
            judge("interference: LoRA's above CS-ReFT's", seeds, lost["lora"], lost["csreft"])]


def accurate(accuracy, seeds):
    return [judge("accuracy on the new tasks: CS-ReFT above LoReFT", seeds, accuracy["csreft"], accuracy["loreft"]),
            judge("accuracy on the new tasks: CS-ReFT above LoRA", seeds, accuracy["csreft"], accuracy["lora"])]


def separating(rows, seeds, what):
    """The judged claim about what gates() measures. Rounded, so that a gate that is constant but for the last digits of
    float32 counts as a tie."""
    trained, untrained = ([round(row[key], 4) for row in rows] for key in ("spread", "untrained_spread"))
    return judge(f"largest difference of a gate between two tasks: trained above untrained, routing on the {what}",
                 seeds, trained, untrained, "gate")


def judged(measured, seeds):
    return [*interfering(measured["interference"], seeds), *accurate(measured["accuracy"], seeds),
            separating(measured["gates"]["csreft"], seeds, "prompt's mean"),
            separating(measured["gates"]["csreft-first-token"], seeds, "first token")]


def tables(section):
    return f"{verdicts(section['claims'])}\n\n{compared(section['interference'])}"


def compared(interference):
    """The table of each task's accuracy alone and together."""
    def cell(name, tasks):
        alone, together = (mean(seed[task][i] for seed in interference[name] for task in tasks) for i in (0, 1))
        return f"{alone:.1f} − {together:.1f} = {alone - together:+.1f}"

    tasks = list(interference["csreft"][0])
    rows = {**{task: [task] for task in tasks}, "**mean**": tasks}
    return markdown(["alone − together", *(NAMES[name] for name in interference)],
                    [[title, *(cell(name, row) for name in interference)] for title, row in rows.items()])


if __name__ == "__main__":
    command_line(lambda: claim(__doc__, "csreft", measure, judged, tables))
