"""CoFiTune's claim: training only the modules that a search chooses (coarse), with smaller steps of their important
units (fine), keeps more versatility than full fine-tuning at about equal speciality.

    python -m reproduce.claims.cofitune

The papers compare at one learning rate, where full fine-tuning (SFT) forgets more because it moves more. The control is
SFT at its own best rate. On all six tasks, where the region cannot learn everything, both scores count: by H, their
harmonic mean, which the search chooses by too. On the two fact tasks, which every row learns, versatility alone is
compared: with the coarse step alone at its best rate, and with the same mask values on random units.
"""

import re

from cofitune import harmonic
from engine.flags import command_line
from reproduce.runner import (ALL, NAMES, about, at_rates, best_rate, claim, column, judge, markdown, over_seeds, rates,
                              scores_of, verdicts)

REGION = "--method cofitune --layers 50%-100% --modules gate_proj,up_proj,down_proj"  # what --layers search chooses
FACTS = "--tasks currency,tool --steps 600 --batch-size 24"

# SFT's best rate on all tasks has the highest H at seed 0 on test data.
SFT_RATES = ("1e-4", "2e-4", "3e-4", "5e-4", "2e-3")
# The best rate on the fact tasks has the most versatility on validation data, at seed 0, among those at most ENOUGH
# points of speciality below SFT's best one.
ENOUGH = 2.0
FRONT = {"sft": ("--method sft", ("1e-4", "1.4e-4", "1.7e-4", "2e-4", "4e-4", "1e-3", "2e-3")),
         "lora": ("--method lora", ("1e-3", "2e-3", "4e-3")),
         "coarse": (f"{REGION} --mask-on none", ("5e-4", "1e-3", "1.2e-3", "1.4e-3", "2e-3")),
         "cofitune": (REGION, ("1e-3", "2e-3", "2.4e-3", "2.8e-3", "4e-3"))}
# Judged, each at its best rate; the random mask at CoFiTune's.
RUNS = {"all": {"cofitune": f"{REGION} --lr 2e-3 {ALL}", "sft": f"--method sft --lr 2e-4 {ALL}"},
        "facts": {"cofitune": f"{REGION} --lr 2.4e-3 {FACTS}",
                  "coarse": f"{REGION} --mask-on none --lr 1.2e-3 {FACTS}",
                  "random-mask": f"{REGION} --mask-source random --lr 2.4e-3 {FACTS}",
                  "sft": f"--method sft --lr 1.7e-4 {FACTS}"}}
H = lambda point: harmonic({**point, "errors": (0.0, 0.0)})[0]


def measure(args):
    return {"sft_rates": at_rates({"sft": ("--method sft", SFT_RATES)}, ALL, args, "test")["sft"],
            "front": at_rates(FRONT, FACTS, args),
            **{tasks: {name: list(map(scores_of, row)) for name, row in over_seeds(runs, args).items()}
               for tasks, runs in RUNS.items()}}


def judged(measured, seeds):
    by_H = [list(map(H, measured["all"][name])) for name in ("cofitune", "sft")]
    kept = {name: column(row, "versatility") for name, row in measured["facts"].items()}
    return [judge("H of both scores, all tasks: CoFiTune's chosen region above SFT at its best rate", seeds, *by_H),
            judge("versatility, fact tasks, each at its best rate: CoFiTune above its coarse step alone", seeds,
                  kept["cofitune"], kept["coarse"]),
            judge("versatility, fact tasks, at one rate: CoFiTune above a random mask with the same values", seeds,
                  kept["cofitune"], kept["random-mask"])]


def best(section):
    """{row: the point with the best rate, on which RUNS stand}"""
    target = max(column(section["front"]["sft"], "speciality"))
    return {"SFT, all tasks": max(section["sft_rates"], key=H),
            **{name: best_rate(row, ENOUGH, target) for name, row in section["front"].items()}}


def tables(section):
    rows = [[tasks, NAMES[name], re.search(r"--lr (\S+)", flags)[1],
             *(about(column(section[tasks][name], key)) for key in ("speciality", "versatility")),
             about(map(H, section[tasks][name]))] for tasks, runs in RUNS.items() for name, flags in runs.items()]
    return "\n\n".join((
        verdicts(section["claims"]), markdown(["tasks", "", "rate", "speciality", "versatility", "H"], rows),
        rates({"SFT, all tasks": section["sft_rates"], **section["front"]}, best(section))))


if __name__ == "__main__":
    command_line(lambda: claim(__doc__, "cofitune", measure, judged, tables))
