"""Scores as results.json keeps them, and as a table with intervals."""

import math


def main_figure(figures):
    """The first of {figure: value}."""
    return next(iter(figures.values()))


def wilson(percent, rows, z=1.96):
    """(lowest, highest) percentage of the 95 % interval of a percentage of so many rows: Wilson's, which has width at 0
    and at 100 too (Wilson 1927)."""
    p, share = percent / 100, z * z / rows
    middle, half = p + share / 2, z * math.sqrt(p * (1 - p) / rows + share / rows / 4)
    return tuple(100 * min(1, max(0, (middle + side * half) / (1 + share))) for side in (-1, 1))


def mean_interval(scores):
    """The same of the mean of several (percentage, rows): the distances to each one's ends add up as independent errors
    do (MOVER, Zou and Donner 2008)."""
    mean = sum(p for p, _ in scores) / len(scores)
    ends = [wilson(*score) for score in scores]
    low, high = (math.sqrt(sum((p - end[side]) ** 2 for (p, _), end in zip(scores, ends))) / len(scores)
                 for side in (0, 1))
    return mean - low, mean + high


def summary(suite, before, after):
    """The part of results.json that is about scores. A task's before and after are its main figure's; `figures` holds
    all of them, `rows` the number of examples."""
    speciality, versatility = suite.means(after)
    main = lambda scores, task: main_figure(scores[task]) if scores else None
    return {"tasks": {task: {"group": suite.group[task], "aspect": suite.aspect[task],
                             "score": suite.score[task].name, "unit": suite.score[task].unit,
                             "rows": len(suite.tests[task]), "before": main(before, task), "after": main(after, task),
                             "figures": {name: [before[task][name] if before else None, value]
                                         for name, value in figures.items()}}
                      for task, figures in after.items()},
            "speciality": speciality, "versatility": versatility,
            "uni": None if None in (speciality, versatility) else speciality + versatility}


def print_table(results):
    """Each task's figures and the group means with 95 % intervals: before and after, or one column of scores."""
    columns = ("before", "after") if "trainable_parameters" in results else ("score",)
    wide = max(18, *(len(task) + 3 for task in results["tasks"]))

    def line(name, kind, rows, *cells):
        shown = "".join(f" {value:>8} {interval:<10}" for value, interval in cells[-len(columns) :])
        print(f"{name:<{wide}}{kind:<15}{rows:>5}{shown}".rstrip())

    percent = lambda value, interval: (f"{value:.1f}", "{:.1f}-{:.1f}".format(*interval))
    print()
    line("accuracy in %", results["eval_split"], "rows", *((when, "") for when in columns))
    for group, title in (("new", "speciality"), ("general", "versatility")):
        tasks = {task: s for task, s in results["tasks"].items() if s["group"] == group}
        for task, s in tasks.items():
            for i, (name, values) in enumerate(s["figures"].items()):
                kind = s["aspect"] if name == "exact match" else name
                cells = [percent(v, wilson(v, s["rows"])) if s["unit"] == "%" else (f"{v:.4g}", "") for v in values]
                line("" if i else "  " + task, kind, "" if i else s["rows"], *cells)
        if scored := [s for s in tasks.values() if s["unit"] == "%"]:
            means = [[(s[when], s["rows"]) for s in scored] for when in ("before", "after")]
            kind = f"mean, {group}" if len(scored) == len(tasks) else f"mean of {len(scored)} in %"
            line(title, kind, sum(s["rows"] for s in scored),
                 *(percent(sum(p for p, _ in m) / len(m), mean_interval(m)) for m in means))
    if results["uni"] is not None:
        line("Uni", "their sum", "", ("", ""), (f"{results['uni']:.1f}", ""))
    print(f"{results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**20:,.0f} MiB")
