"""All six methods on the same data over seeds, each at its best learning rate.

    python -m reproduce.compare --seeds 5
    python -m reproduce.compare --tune         # how the rates were chosen: seed 0, validation data

The best rate has the highest speciality on validation data; of those within TIE points of it, it is the one with the
highest versatility. The papers' claims are judged by the programs in `reproduce/claims/`.
"""

from engine.flags import command_line
from reproduce.runner import (ALL, about, arguments, at_rates, best_rate, column, markdown, over_seeds, rates,
                              scores_of, store)

TIE = 0.5
# {row: (flags, the best rate, all rates tried)}
GRID = {"sft": ("--method sft", "2e-3", ("5e-4", "1e-3", "2e-3", "4e-3")),
        "lora": ("--method lora", "4e-3", ("2e-3", "4e-3", "8e-3")),
        "multilora": ("--method multilora", "8e-3", ("4e-3", "8e-3", "1.6e-2")),
        "loreft": ("--method loreft", "5e-3", ("2.5e-3", "5e-3", "1e-2", "2e-2")),
        "csreft": ("--method csreft", "1e-2", ("5e-3", "1e-2", "2e-2")),
        "csreft-first-token": ("--method csreft --route-on first_token", "1e-2", ("5e-3", "1e-2", "2e-2")),
        # what the search of `--method cofitune` chooses
        "cofitune": ("--method cofitune --layers 50%-100% --modules gate_proj,up_proj,down_proj", "4e-3",
                     ("2e-3", "4e-3", "8e-3"))}
METHODS = ("sft", "lora", "multilora", "loreft", "csreft", "cofitune")


def compare(args):
    """{method: {"flags", "seeds": {seed: what brief() keeps}}} on test data."""
    flags = {name: "{} --lr {}".format(*GRID[name]) for name in METHODS}
    rows = over_seeds({name: f"{text} {ALL}" for name, text in flags.items()}, args)
    return {name: {"flags": flags[name], "seeds": dict(zip(map(str, args.seeds), map(brief, runs)))}
            for name, runs in rows.items()}


def brief(results):
    return {**scores_of(results),
            "tasks": {task: s["after"] for task, s in results["tasks"].items() if s["group"] == "new"},
            "share": 100 * results["trainable_parameters"] / results["total_parameters"]}


def tune(args):
    """{row: a point for each rate}"""
    return at_rates({name: (flags, lrs) for name, (flags, _, lrs) in GRID.items()}, ALL, args)


def compared(section):
    """The tables of what compare() makes: the two means, then each task."""
    seeds = {name: list(row["seeds"].values()) for name, row in section.items()}
    tasks = list(seeds["sft"][0]["tasks"])
    scores = [[name, section[name]["flags"].split()[-1], f"{runs[0]['share']:.1f} %",
               *(about(column(runs, key)) for key in ("speciality", "versatility"))] for name, runs in seeds.items()]
    by_task = [[name, *(about(run["tasks"][task] for run in runs) for task in tasks)] for name, runs in seeds.items()]
    return (markdown(["method", "rate", "trained / base", "speciality", "versatility"], scores) + "\n\n"
            + markdown(["method", *tasks], by_task))


def tuned(section):
    """The table of what tune() makes."""
    return rates(section, {name: best_rate(row, TIE) for name, row in section.items()})


def main():
    args = arguments(__doc__, tune="choose the learning rates instead")
    make, section, table = (tune, "tune", tuned) if args.tune else (compare, "compare", compared)
    value = make(args)
    store(args, section, value)
    print(f"\n{table(value)}")


if __name__ == "__main__":
    command_line(main)
