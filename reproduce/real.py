"""All six methods on a real base: two new fact tasks, and what the base keeps of what it knew.

    python -m reproduce.real --seeds 5 --train-flags "--base out/smollm2 --general-data PIQA.jsonl ALPACA.json"
    python -m reproduce.real --alone --train-flags "--base out/smollm2"  # interference: each task by itself as well
    python -m reproduce.real --grid --train-flags "--base out/smollm2"   # the default rates against their multiples

Short examples and 150 steps of 8, so that a run on two cores is a matter of minutes. Rates are the defaults, which fall
with the base's width. The statements are those of `reproduce/claims/`, judged where there are five seeds.
"""

import json
import shlex

import train
from cofitune import harmonic
from engine.flags import command_line
from reproduce.claims import csreft
from reproduce.compare import METHODS
from reproduce.runner import (CHOSEN_WITH, NAMES, about, arguments, column, finish, judge, markdown, over_seeds,
                              scores_of, store, verdicts)

PROTOCOL = "--tasks currency,tool --steps 150 --batch-size 8 --samples 0"
ALONE = "--steps 75 --batch-size 8 --samples 0"  # for one of two tasks: half of its steps
GRID_PROTOCOL = "--tasks currency,tool --steps 40 --batch-size 8 --samples 0 --eval-limit 1"
TIMES = (0.5, 1, 2, 4)
# What `--method cofitune --search-steps 150 --eval-limit 20` chooses on SmolLM2 with the rest of the protocol, seed 0.
REGION = "--layers 75%-100% --modules gate_proj,up_proj,down_proj"
RUNS = {**{name: f"--method {name}" for name in METHODS}, "cofitune": f"--method cofitune {REGION}",
        "coarse": f"--method cofitune {REGION} --mask-on none"}


def compare(args):
    """{row: a dictionary for each seed}, and CS-ReFT's "gates" and the "claims" where they can be judged"""
    rows = over_seeds({name: f"{flags} {PROTOCOL}" for name, flags in RUNS.items()}, args)
    section = {**{name: list(map(brief, row)) for name, row in rows.items()},
               "gates": list(map(csreft.gates, rows["csreft"]))}
    return {**section, "claims": judged(section, args.seeds) if len(args.seeds) >= 5 else []}


def brief(run):
    """What is kept of a run. loss: of the general tasks that are scored by it."""
    general = {task: s for task, s in run["tasks"].items() if s["group"] == "general"}
    known = [s["before"] for s in general.values() if s["unit"] == "%"]
    return {**scores_of(run), "versatility_before": sum(known) / len(known),
            "loss": {task: (s["before"], s["after"]) for task, s in general.items() if s["unit"] != "%"},
            "tasks": {task: s["after"] for task, s in run["tasks"].items()}, "seconds": run["seconds"],
            "gigabytes": run["peak_memory_bytes"] / 1e9, "effective_rank": run["report"].get("effective_rank")}


def judged(section, seeds):
    accuracy = {name: column(section[name], "speciality") for name in RUNS}
    rank = {name: column(section[name], "effective_rank") for name in ("multilora", "lora")}
    H = {name: [harmonic({**scores_of(run), "errors": (0.0, 0.0)})[0] for run in section[name]] for name in RUNS}
    return [judge("accuracy on the new tasks: MultiLoRA above LoRA", seeds, accuracy["multilora"], accuracy["lora"]),
            judge("ΔW's effective rank: MultiLoRA's above LoRA's", seeds,
                  rank["multilora"], rank["lora"], "directions"),
            *csreft.accurate(accuracy, seeds), csreft.separating(section["gates"], seeds, "prompt's mean"),
            judge("H of both scores: CoFiTune above SFT", seeds, H["cofitune"], H["sft"]),
            judge("H of both scores: CoFiTune above its coarse step alone", seeds, H["cofitune"], H["coarse"])]


def compared(section):
    """The tables of what compare() makes, and of the verdicts where there are any."""
    first, *_ = section["sft"]
    losses = list(first["loss"])
    rows = [["before training", "", f"{first['versatility_before']:.1f}",
             *(f"{first['loss'][task][0]:.2f}" for task in losses), "", ""]]
    for name, runs in ((name, section[name]) for name in RUNS):
        rows.append([NAMES[name], *(about(column(runs, key)) for key in ("speciality", "versatility")),
                     *(about((run["loss"][task][1] for run in runs), 2) for task in losses),
                     f"{sum(column(runs, 'seconds')) / len(runs) / 60:.0f}", f"{max(column(runs, 'gigabytes')):.1f}"])
    table = markdown(["", "speciality", "versatility", *(f"loss on {task}" for task in losses), "minutes", "GB"], rows)
    parts = [verdicts(section["claims"])] if section["claims"] else []
    return "\n\n".join((table, *parts))


def alone(args):
    """{"interference", "claims"} as in claims/csreft.py"""
    rows = {name: RUNS[name] for name in csreft.RUNS}
    together = over_seeds({name: f"{flags} {PROTOCOL}" for name, flags in rows.items()}, args)
    found = csreft.interference(together, rows, ("currency", "tool"), ALONE, args)
    return {"interference": found, "claims": csreft.interfering(found, args.seeds)}


def grid(args):
    """{method: {rate: mean loss of the last ten steps}}, at multiples of the default rate"""
    base, runs = train.parse(["--method", "sft", *shlex.split(args.train_flags)])[0].base, {}
    for name in METHODS:
        rate = train.with_rate(train.Config(name, base)).lr
        for lr in (float(f"{times * rate:.2g}") for times in TIMES):
            runs[name, lr] = f"{RUNS[name]} {GRID_PROTOCOL} --seed {CHOSEN_WITH} --lr {lr}"
    results = finish(runs.values(), args)
    last = lambda run: json.loads((run["folder"] / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    return {name: {lr: last(results[runs[name, lr]]) for of, lr in runs if of == name} for name in METHODS}


def tuned(section):
    """A row for each method: its rates, and the loss at the end."""
    return markdown(["", "rate: mean loss of the last ten steps"], [
        [NAMES[name], ", ".join(f"{lr}: {loss:.2f}" for lr, loss in row.items())] for name, row in section.items()])


def main():
    args = arguments(__doc__, alone="interference instead: each task by itself as well",
                     grid="the default rates against their multiples instead")
    make, section, table = compare, "real", compared
    if args.grid:
        make, section, table = grid, "rates", tuned
    elif args.alone:
        make, section, table = alone, "real_alone", csreft.tables
    value = make(args)
    store(args, section, value)
    print(f"\n{table(value)}")


if __name__ == "__main__":
    command_line(main)
