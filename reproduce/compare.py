"""All methods on the same data over seeds, and a verdict on the claim of each paper.

    python -m reproduce.compare --seeds 5                    # every method at its best learning rate
    python -m reproduce.compare --claim multilora            # or csreft, cofitune, spectrum, search
    python -m reproduce.compare --tune                       # how the rates were chosen
    python -m reproduce.compare --controls                   # CoFiTune's controls at one rate, seeds 0 to 2
    python -m reproduce.compare --teach                      # one change at a time, one seed

Each run is a `train.py` command in a folder of its own below --out, so whatever is interrupted goes on with the same
command. Runs that were finished by other code are taken as they are, and that is said. compare.json and compare.csv in
--out hold all figures. Learning rates come from there once --tune has run, else from `reproduce/results/compare.json`,
which is what `reproduce/README.md` shows.

Everything is chosen here on seed 0 and validation data. Claims are judged on test data and on seeds that nothing was
chosen with, by a one-sided exact sign test over the seeds: a claim *holds* where p < 0.05, *does not hold* where
p < 0.05 the other way, and is *undecided* else. Five seeds out of five are p = 0.031.

Read in this order: the protocol, runs, what is measured, the statistics, tuning, the comparison, the claims.
"""

import contextlib
import csv
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import multilora
import train
from base import suite as builtin
from engine.flags import Parser, command_line
from engine.folder import difference, provenance
from model import LINEARS, Llama, UserError, read_json, write_json, written
from reproduce import wise
from reproduce.gates import gates_by_task
from reproduce.spectra import changes, similarity

HERE = Path(__file__).resolve().parent
STORED = HERE / "results" / "compare.json"

# ---------------------------------------------------------------------------------------------- the protocol

CHOSEN_WITH = 0  # the seed of every choice
SEEDS = range(11, 31)  # `--seeds 5` takes the first five

# All six new tasks, the same examples in the same order for every method.
ALL = "--steps 800 --batch-size 24"
SUITES = {"default": "", "hard": " --tasks hard"}  # hard: twelve tasks, as many steps
QUICK = "--steps 150 --batch-size 24 --eval-limit 50"
# CoFiTune's claim: the two fact tasks, which every method learns whole, so that only forgetting differs.
FACTS = "--tasks currency,tool --steps 600 --batch-size 24"
PART = "--method cofitune --layers 50%-100% --modules gate_proj,up_proj,down_proj"  # the first winner of its search

METHODS = {"sft": "--method sft", "lora": "--method lora", "multilora": "--method multilora",
           "loreft": "--method loreft", "csreft": "--method csreft", "cofitune": PART}
FIRST_TOKEN = METHODS["csreft"] + " --route-on first_token"
# {row: (flags, rates)}. The best rate is the one with the highest speciality; of those within TIE points of it, the
# one with the highest versatility.
TIE = 0.5
GRID = {"sft": (METHODS["sft"], (5e-4, 1e-3, 2e-3, 4e-3)),
        "lora": (METHODS["lora"], (2e-3, 4e-3, 8e-3)),
        "multilora": (METHODS["multilora"], (4e-3, 8e-3, 1.6e-2)),
        "loreft": (METHODS["loreft"], (2.5e-3, 5e-3, 1e-2, 2e-2)),
        "csreft": (METHODS["csreft"], (5e-3, 1e-2, 2e-2)),
        "csreft-first-token": (FIRST_TOKEN, (5e-3, 1e-2, 2e-2)),
        "cofitune": (METHODS["cofitune"], (2e-3, 4e-3, 8e-3)),
        # where MultiLoRA might be ahead: a quarter of the rank
        "multilora-rank-3": (METHODS["multilora"] + " --rank 1 --alpha 2", (4e-3, 8e-3, 1.6e-2)),
        "lora-rank-3": (METHODS["lora"] + " --rank 3 --alpha 6", (4e-3, 8e-3, 1.6e-2)),
        # or twice as many tasks
        "multilora-hard": (METHODS["multilora"] + SUITES["hard"], (4e-3, 8e-3, 1.6e-2)),
        "lora-hard": (METHODS["lora"] + SUITES["hard"], (2e-3, 4e-3, 8e-3))}
# MultiLoRA's count needs a rank of 13.6 in LoRA; 14 has 2.7 % more parameters than MultiLoRA, and takes LoRA's rate.
EQUAL_PARAMETERS = METHODS["lora"] + " --rank 14 --alpha 28"
# Speciality against versatility, one line for each row and one point for each rate, on the fact tasks. The rows of
# REFINED then try the geometric mean of their smallest sufficient rate and the next one below, twice.
FRONT = {"sft": ("--method sft", (1e-4, 2e-4, 4e-4, 1e-3, 2e-3)),
         "sft-l2": ("--method sft --l2-to-base 1e-2", (5e-4, 1e-3, 2e-3)),
         "lora": ("--method lora", (1e-3, 2e-3, 4e-3)),
         "coarse": (PART + " --mask-on none", (5e-4, 1e-3, 2e-3)),
         "cofitune": (PART, (1e-3, 2e-3, 4e-3))}
REFINED = ("sft", "coarse", "cofitune")
WISE_FROM = (4e-4, 1e-3, 2e-3)  # rates of the SFT runs that Wise-FT starts from
ENOUGH = 2.0  # points of speciality below SFT's that still count as "about equal"
SPECTRUM = 12  # the singular values looked at in each update: the total rank of MultiLoRA and LoRA

# CoFiTune's controls, at the smallest rate tried at which it is within two points of SFT on validation data.
RATE = "--lr 2e-3"
CONTROLS = {"sft": f"--method sft {RATE}", "cofitune": f"{PART} {RATE}", "no-mask": f"{PART} {RATE} --mask-on none",
            "mask-on-gradient": f"{PART} {RATE} --mask-on grad", "random-mask": f"{PART} {RATE} --mask-source random",
            "smaller-rate": f"{PART} --lr 9.9e-4 --mask-on none",  # times mean(1 - I)
            "sft-at-4e-4": "--method sft --lr 4e-4", "sft-at-2e-4": "--method sft --lr 2e-4",
            "sft-at-1e-4": "--method sft --lr 1e-4", "cofitune-at-4e-4": f"{PART} --lr 4e-4",
            "sft-l2": f"--method sft {RATE} --l2-to-base 1e-2", "sft-replay": f"--method sft {RATE} --replay 0.1"}
CONTROLLED = "--tasks currency,tool --steps 1200 --batch-size 24"

# Is a flat spectrum learned, or is it the start's? MultiLoRA against these, all at its own rate.
STARTS = {"multilora": METHODS["multilora"],
          "scales-alone": METHODS["multilora"] + " --train s",  # A and B stay as they start
          "one-module": METHODS["multilora"] + " --modules 1 --rank 12 --alpha 24",  # with its scales
          "lora-uniform-b": METHODS["lora"] + " --zero s"}  # no scales: starts away from the base
# CoFiTune as it is by default, beside SFT at these rates with as many examples.
SFT_RATES = (1e-4, 2e-4, 3e-4, 5e-4, 2e-3)
SEARCHED = "--steps 800 --batch-size 24"

# One change at a time, at one seed, to see what a part does: {row: flags}.
TEACH = {
    "multilora": ("--steps 400 --batch-size 24 --lr 8e-3", {
        **{f"start: {title}, scale: {scaling}": f"--method multilora --zero {zero} --scaling {scaling}"
           for zero, title in (("s", "s = 0, B uniform"), ("B", "B = 0, s = 1")) for scaling in ("vector", "scalar")},
        "start: B = 0, scale: none": "--method multilora --scaling none",
        "start: B uniform, scale: none": "--method multilora --scaling none --zero s",
        **{f"n = {n}, r = {12 // n}": f"--method multilora --modules {n} --rank {12 // n} --alpha {24 // n}"
           for n in (1, 2, 3, 4, 6, 12)}}),
    "csreft": ("--steps 800 --batch-size 24 --lr 1e-2", {
        "prompt's mean, joint": "--method csreft", "separate subspaces": "--method csreft --ortho separate",
        "oracle: gates by task": "--method csreft --route-on task",
        "oracle, 6 subspaces of rank 3": "--method csreft --route-on task --subspaces 6 --rank 3",
        **{f"λ = {weight}": f"--method csreft --sparsity {weight}" for weight in ("0.01", "0.1", "1")}})}

# Protocols tried for a claim, the judged one last. The earlier ones were looked at on validation data, or on the test
# data of seeds 0 to 2 (README's tables of single runs, --controls).
TRIED = {
    "multilora": ["all six tasks, total rank 12, 600 steps of 48, seed 0", "total rank 3, seed 0, validation data",
                  "twelve tasks, seed 0, validation data", "all six tasks, total rank 12, 800 steps of 24"],
    "csreft": ["all six tasks, total rank 20, 2,000 steps of 24, seed 0", "all six tasks, 800 steps of 24"],
    "cofitune": ["all six tasks, 600 steps of 48, seed 0", "fact tasks, 300 steps of 48, seed 0",
                 "fact tasks, 600 steps of 48, seed 0", "fact tasks, 1,200 steps of 24, seeds 0 to 2",
                 "fact tasks, 600 steps of 24"]}
TRIED["spectrum"] = ["all six tasks, total rank 12, 800 steps of 24"]
TRIED["multilora-hard"] = [*TRIED["multilora"], "twelve tasks, total rank 12, 800 steps of 24"]

# ---------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One row of a table at one seed: a command of train.py, or Wise-FT's scores of such a run."""

    name: str
    flags: str
    seed: int
    split: str = "test"
    wise: bool = False

    @property
    def folder(self):
        return f"{self.name}-{self.split}-{self.seed}"

    @property
    def argv(self):
        return [*shlex.split(self.flags), "--seed", str(self.seed), "--eval-split", self.split]

    def command(self, out):
        return (["reproduce.wise", str(out / self.folder)] if self.wise else
                ["train.py", *self.argv, "--out", str(out / self.folder)])

    def file(self, out):
        return out / self.folder / ("wise.json" if self.wise else "results.json")

    @cached_property
    def identity(self):
        config, method_config, _ = train.parse(self.argv)
        return train.identity(config, method_config, *train.place(config))

    def results(self, out):
        """(what it left, None where it is not finished; whether other code made it). UserError for another run."""
        if not self.file(out).exists():
            return None, False
        saved = read_json(out / self.folder / "config.json").get("asked", {})
        if other := difference({**saved, "code": {}}, {**self.identity, "code": {}}):
            raise UserError(f"{out / self.folder} holds another run: {other}; remove it, or give another --out")
        return read_json(self.file(out)), saved["code"] != self.identity["code"]


def at(flags, lr):
    return f"{flags} --lr {lr:g}"


def execute(command, log, threads):
    """A program's command in this process, which ends with its parent; what it prints goes to a file."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.argv = command
        command_line({"train.py": train.main, "reproduce.wise": wise.main}[command[0]])


def work(runs, args, title, may_fail=False):
    """{run: results}: makes finished what is not, `--jobs` runs at a time, and prints a line for each.

    A run that ends with an error does not stop the others. Then: UserError, or with may_fail (a learning rate that
    may turn out too high) a note, and no results for it."""
    found = {run: run.results(args.out) for run in runs}
    results, left = {run: r for run, (r, _) in found.items()}, [run for run, (r, _) in found.items() if r is None]
    if other := sum(code for _, code in found.values()):
        print(f"{title}: {other} finished runs were made by other code than today's, and are taken as they are")
    if left:
        print(f"{title}: {len(left)} of {len(runs)} runs to make, {args.jobs} at a time with {args.threads} threads "
              "each", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    spawn, lock, workers, took, failed = multiprocessing.get_context("spawn"), threading.Lock(), [], [], {}

    def one(run):
        log = args.out / f"{run.folder}{'-wise' * run.wise}.log"
        process = spawn.Process(target=execute, args=(run.command(args.out), log, args.threads), daemon=True)
        workers.append(process)
        process.start()
        process.join()
        if process.exitcode:
            failed[run] = f"{args.out / run.folder} ended with code {process.exitcode}; {log} says why"
            print(f"  {failed[run]}", flush=True)
            return
        with lock:
            results[run], _ = run.results(args.out)
            took.append(results[run]["seconds"])
            rest = len(left) - len(took) - len(failed)
            print(f"  {run.folder:<42}{figures_of(results[run])}  {took[-1]:>4.0f} s   {rest} left, ETA "
                  f"{train.clock(statistics.median(took) * rest / args.jobs)}", flush=True)

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        list(pool.map(one, left))
    finally:  # a signal: the runs keep a checkpoint after the step in hand
        pool.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            if process.is_alive():
                process.terminate()
    if failed and not may_fail:
        raise UserError(next(iter(failed.values())))
    return {run: kept for run, kept in results.items() if kept is not None}


def figures_of(results):
    if "speciality" in results:
        return f"{results['speciality']:>6.1f} /{results['versatility']:>5.1f}"
    return " " * 13


# ---------------------------------------------------------------------------------------------- what is measured


def brief(results):
    """What compare.json keeps of a run."""
    return {"speciality": results["speciality"], "versatility": results["versatility"],
            "tasks": {task: s["after"] for task, s in results["tasks"].items() if s["group"] == "new"},
            "trainable_parameters": results["trainable_parameters"],
            "share": 100 * results["trainable_parameters"] / results["total_parameters"],
            "seconds": results["seconds"], "peak_memory_bytes": results["peak_memory_bytes"]}


def spectrum(folder, sft=None):
    """Means over the adapted weights of a run: the first singular values, their spread, and the similarity to SFT's."""
    deltas, theirs = changes(folder)[0], changes(sft)[0] if sft else {}
    names = [name for name in deltas if name.removesuffix(".weight").endswith(LINEARS)]
    values = torch.stack([multilora.singular_values(deltas[name], SPECTRUM) for name in names])
    shares, ranks = zip(*(multilora.spread(v) for v in values))
    alike = [similarity(deltas[name], theirs[name], SPECTRUM) for name in names if sft]
    return {"values": values.mean(0).tolist(), "first_value_share": statistics.mean(shares),
            "effective_rank": statistics.mean(ranks), "similarity_to_sft": statistics.mean(alike) if sft else None}


def noise(seed):
    """The spectrum of MultiLoRA's update where nothing is trained: A and B as they start, every scale one."""
    torch.manual_seed(seed)
    _, config, _ = train.parse(shlex.split(METHODS["multilora"]))
    adapter = multilora.attach(Llama.from_pretrained("base"), replace(config, zero="s"))
    for linear in adapter.linears.values():
        linear.multilora.s.data.fill_(1.0)
    return adapter.report()


def gates(folder):
    """{"gates": {task: (k,)}, "spread", "untrained_spread"}; a spread is the largest difference between two tasks' mean
    gates in one subspace. Untrained gates differ a little too, because the prompts they read do."""
    model, adapter, method, saved = train.load_run(folder)
    config = train.Config(**saved["settings"])
    suite, tokenizer = train.load_data(config, train=False)
    encoded = {task: examples for task, examples in suite.tests.items() if suite.group[task] == "new"}
    torch.manual_seed(config.seed)
    start = method.attach(Llama.from_pretrained(config.base), adapter.config)
    trained, untrained = (gates_by_task(a.model, a, encoded, tokenizer.pad_id) for a in (adapter, start))
    widest = lambda means: max(max(column) - min(column) for column in zip(*means.values()))
    return {"gates": trained, "spread": widest(trained), "untrained_spread": widest(untrained)}


# ---------------------------------------------------------------------------------------------- the statistics


def sign_test(differences):
    """(p, p the other way): exact and one-sided, for the claim that differences are positive. Ties are left out."""
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = wins + losses
    at_least = lambda count: sum(math.comb(n, k) for k in range(count, n + 1)) / 2**n
    return at_least(wins), at_least(losses)


def judge(statement, seeds, ours, theirs, unit="points", speciality=None):
    """A statement "ours is larger", with its verdict. ours, theirs: a value for each seed. speciality: (ours, theirs)
    of the same runs, for a claim about versatility at about equal speciality: where the winner's is lower by more than
    ENOUGH the claim is undecided, whatever the versatility."""
    differences = [a - b for a, b in zip(ours, theirs)]
    p, p_other = sign_test(differences)
    verdict = "holds" if p < 0.05 else "does not hold" if p_other < 0.05 else "undecided"
    if speciality and verdict != "undecided":
        winner, loser = map(statistics.mean, speciality if verdict == "holds" else speciality[::-1])
        verdict = verdict if winner >= loser - ENOUGH else "undecided"
    return {"statement": statement, "unit": unit, "seeds": list(seeds), "ours": ours, "theirs": theirs,
            "speciality": speciality, "mean_difference": statistics.mean(differences), "p": p, "p_other_way": p_other,
            "verdict": verdict}


def rounded(value):
    """Without the last digits of float32, so that a gate that is constant counts as a tie with another one."""
    return round(value, 4)


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def band(values):
    """[low, high]: the seeds' minimum to maximum, widened by one standard deviation."""
    return [min(values) - spread(values), max(values) + spread(values)]


# ---------------------------------------------------------------------------------------------- storing and showing


def load(args):
    file = args.out / "compare.json"
    return read_json(file) if file.exists() else {}


def store(args, section, value):
    """Puts a section into compare.json in --out."""
    everything = load(args)
    everything[section] = value
    everything["machine"] = {"cpu_cores": os.cpu_count(), "jobs": args.jobs, "threads": args.threads,
                             **provenance([])["versions"]}
    write_json(args.out / "compare.json", everything)
    with written(args.out / "compare.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(leaves(everything))


def leaves(value, *path):
    """A row (names on the way..., value) of every figure in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, *path, key)
    else:
        yield *path, value


def rates(args):
    """{method: learning rate}: chosen by --tune here, else the stored ones."""
    for found in (load(args), read_json(STORED) if STORED.exists() else {}):
        if "tune" in found:
            return found["tune"]["best"]
    raise UserError(f"no learning rates in {args.out / 'compare.json'} nor in {STORED}: run with --tune first")


def show(rows):
    """The comparison: mean ± standard deviation over seeds."""
    print(f"\n{'':<12}{'rate':>8}{'trained / base':>16}{'speciality':>16}{'versatility':>16}{'s':>7}{'MiB':>7}")
    for name, row in rows.items():
        cell = lambda figure: "{:.1f} ± {:.1f}".format(*row[figure])
        print(f"{name:<12}{row['lr']:>8g}{row['share']:>14.2f} %{cell('speciality'):>16}{cell('versatility'):>16}"
              f"{row['seconds']:>7.0f}{row['peak_memory_bytes'] / 2**20:>7.0f}")


def show_claims(name, claims):
    print(f"\n{name}: {len(TRIED[name])} protocols tried, the last one judged here")
    pairs = lambda ours, theirs: ", ".join(f"{a:.3g} : {b:.3g}" for a, b in zip(ours, theirs))
    for claim in claims:
        print(f"- {claim['statement']}: {claim['verdict'].upper()}, p = {claim['p']:.3f} "
              f"(the other way {claim['p_other_way']:.3f})\n"
              f"  by seed ({claim['unit']}): {pairs(claim['ours'], claim['theirs'])}")
        if claim["speciality"]:
            print(f"  speciality: {pairs(*claim['speciality'])}")


# ---------------------------------------------------------------------------------------------- tuning


def best_rate(points):
    return about_equal(points, max(point["speciality"] for point in points), TIE)["lr"]


def about_equal(points, target, points_below):
    """The point with the highest versatility among those that learned enough, or None."""
    enough = [point for point in points if point["speciality"] >= target - points_below]
    return max(enough, key=lambda point: point["versatility"], default=None)


def as_point(results, **where):
    return {**where, "speciality": results["speciality"], "versatility": results["versatility"]}


def tune(args):
    """Every rate of the grid at one seed, scored on validation data."""
    grid = {(name, lr): Run(f"tune-{name}@{lr:g}", f"{at(flags, lr)} {ALL}", CHOSEN_WITH, "validation")
            for name, (flags, lrs) in GRID.items() for lr in lrs}
    results = work(list(grid.values()), args, "tuning", may_fail=True)
    table = {name: [as_point(results[grid[name, lr]], lr=lr) for lr in lrs if grid[name, lr] in results]
             for name, (_, lrs) in GRID.items()}
    best = {name: best_rate(row) for name, row in table.items()}
    print(f"\nspeciality / versatility on validation data, seed {CHOSEN_WITH}; * is the best rate")
    for name, row in table.items():
        print(f"{name:<18}" + "".join(f"{p['lr']:>8g}{'*' if p['lr'] == best[name] else ' '}{p['speciality']:>6.1f} /"
                                      f"{p['versatility']:>5.1f}" for p in row))
        if best[name] in (row[0]["lr"], row[-1]["lr"]):
            print(f"note: the best rate of {name} is at the edge of its grid")
    store(args, "tune", {"protocol": ALL, "seed": CHOSEN_WITH, "split": "validation", "grid": table, "best": best})


# ---------------------------------------------------------------------------------------------- the comparison


def whole_runs(args, names, protocol, prefix=""):
    """{(name, seed): Run} of methods at their best rates, on test data. names: {name: flags}."""
    prefix = prefix if args.suite == "default" else f"{args.suite}-{prefix}"
    return {(name, seed): Run(prefix + name, f"{at(flags, rate_of(args, name))} {protocol}{SUITES[args.suite]}", seed)
            for seed in seeds_of(args) for name, flags in names.items()}


def rate_of(args, name):
    """A row's own rate in the suite, else its method's."""
    best, method = rates(args), name.split("-")[0]
    keys = (name, method) if args.suite == "default" else (f"{name}-{args.suite}", f"{method}-{args.suite}")
    if not any(key in best for key in keys):
        raise UserError(f"no learning rate for {keys[-1]}: run with --tune first")
    return next(best[key] for key in keys if key in best)


def section_of(args, name):
    return name if args.suite == "default" else f"{name}-{args.suite}"


def seeds_of(args):
    return list(SEEDS[: args.seeds])


def compare(args):
    names = {name: METHODS[name] for name in args.methods or METHODS}
    protocol = QUICK if args.quick else ALL
    runs = whole_runs(args, names, protocol, "quick-" if args.quick else "")
    results = work(list(runs.values()), args, "comparison")
    rows = {}
    for name in names:
        seeds = {seed: brief(results[runs[name, seed]]) for seed in seeds_of(args)}
        column = lambda figure: [s[figure] for s in seeds.values()]
        tasks = next(iter(seeds.values()))["tasks"]
        rows[name] = {"lr": rate_of(args, name), "flags": names[name], "seeds": {str(s): r for s, r in seeds.items()},
                      **{key: [statistics.mean(column(key)), spread(column(key))]
                         for key in ("speciality", "versatility")},
                      "band": {key: band(column(key)) for key in ("speciality", "versatility")},
                      "tasks": {task: [statistics.mean(s["tasks"][task] for s in seeds.values()),
                                       spread([s["tasks"][task] for s in seeds.values()])] for task in tasks},
                      "trainable_parameters": column("trainable_parameters")[0], "share": column("share")[0],
                      "seconds": statistics.median(column("seconds")),
                      "peak_memory_bytes": max(column("peak_memory_bytes"))}
    section = section_of(args, "quick" if args.quick else "compare")
    known = load(args).get(section, {})
    if known.get("protocol") == protocol:  # rows of methods not named now stay, and equal ones with more seeds
        for name, row in known["rows"].items():
            if name not in rows or row["lr"] == rows[name]["lr"] and len(row["seeds"]) > len(rows[name]["seeds"]):
                rows[name] = row
    rows = {name: rows[name] for name in METHODS if name in rows}
    show(rows)
    store(args, section, {"protocol": protocol, "rows": rows})


# ---------------------------------------------------------------------------------------------- the claims


def against_noise(seeds, spectra):
    """Claims that a learned update should win against one of noise, if its spectrum were learned."""
    rank = lambda name: [row["effective_rank"] for row in spectra[name]]
    far = lambda name: [abs(a - b) for a, b in zip(rank(name), rank("sft"))]
    return [judge("ΔW's effective rank: MultiLoRA's above that of its untrained start, s = 1", seeds,
                  rank("multilora"), rank("untrained"), "directions"),
            judge("ΔW's effective rank, distance from SFT's: the untrained start's above MultiLoRA's", seeds,
                  far("untrained"), far("multilora"), "directions")]


def claim_multilora(args):
    """Accuracy against LoRA at equal total rank and at equal parameter count; the spectra of the learned updates."""
    names = {"sft": METHODS["sft"], "multilora": METHODS["multilora"], "lora": METHODS["lora"],
             "lora-equal-parameters": EQUAL_PARAMETERS}
    if args.suite != "default":  # accuracy at equal total rank alone: no rates were chosen there for the other rows
        names = {name: names[name] for name in ("multilora", "lora")}
    seeds = seeds_of(args)
    runs = whole_runs(args, names, ALL)
    results = work(list(runs.values()), args, "MultiLoRA's claim")
    accuracy = {name: [results[runs[name, seed]]["speciality"] for seed in seeds] for name in names}
    claims = [judge("accuracy on the new tasks: MultiLoRA above LoRA at equal total rank", seeds,
                    accuracy["multilora"], accuracy["lora"])]
    spectra = {}
    if "sft" in names:
        spectra = {name: [spectrum(args.out / runs[name, seed].folder, args.out / runs["sft", seed].folder)
                          for seed in seeds] for name in names}
        column = lambda name, key: [row[key] for row in spectra[name]]
        far = lambda name, distance: [distance(a, b) for a, b in zip(spectra[name], spectra["sft"])]
        ranks = lambda a, b: abs(a["effective_rank"] - b["effective_rank"])
        curves = lambda a, b: sum(abs(x - y) for x, y in zip(a["values"], b["values"])) / 2
        claims += [
            judge("accuracy on the new tasks: MultiLoRA above LoRA at equal parameter count", seeds,
                  accuracy["multilora"], accuracy["lora-equal-parameters"]),
            judge("ΔW's first singular value, as a share: LoRA's above MultiLoRA's", seeds,
                  column("lora", "first_value_share"), column("multilora", "first_value_share"), "share"),
            judge("ΔW's effective rank: MultiLoRA's above LoRA's", seeds,
                  column("multilora", "effective_rank"), column("lora", "effective_rank"), "directions"),
            judge("ΔW's spectrum, distance from SFT's: LoRA's above MultiLoRA's", seeds,
                  far("lora", curves), far("multilora", curves), "share"),
            judge("ΔW's effective rank, distance from SFT's: LoRA's above MultiLoRA's", seeds,
                  far("lora", ranks), far("multilora", ranks), "directions"),
            judge("ΔW's leading subspace, share that lies in SFT's: MultiLoRA's above LoRA's", seeds,
                  column("multilora", "similarity_to_sft"), column("lora", "similarity_to_sft"), "share")]
        spectra["untrained"] = [noise(seed) for seed in seeds]
        claims += against_noise(seeds, spectra)
    section = section_of(args, "multilora")
    sizes = {name: results[runs[name, seeds[0]]]["trainable_parameters"] for name in names}
    show_claims(section, claims)
    store(args, section, {"protocol": ALL + SUITES[args.suite], "tried": TRIED[section], "claims": claims,
                          "accuracy": accuracy, "spectra": spectra, "trainable_parameters": sizes})


def alone(run, task):
    """The Run on one task alone, with as many examples of it as the run on all tasks sees."""
    steps = round(train.parse(run.argv)[0].steps / len(builtin.NEW))
    return replace(run, name=f"{run.name}-alone-{task}", flags=f"{run.flags} --tasks {task} --steps {steps}")


def claim_csreft(args):
    """Interference of each task: trained alone, on as many of its examples, minus trained together. And the gates."""
    names = {"csreft": METHODS["csreft"], "loreft": METHODS["loreft"], "lora": METHODS["lora"]}
    seeds = seeds_of(args)
    runs = whole_runs(args, {**names, "csreft-first-token": FIRST_TOKEN}, ALL)
    by_itself = {(name, seed, task): alone(runs[name, seed], task)
                 for name in names for seed in seeds for task in builtin.NEW}
    results = work([*runs.values(), *by_itself.values()], args, "CS-ReFT's claim")
    after = lambda run, task: results[run]["tasks"][task]["after"]
    interference = {name: [{
        task: [after(by_itself[name, seed, task], task), after(runs[name, seed], task)]
        for task in builtin.NEW} for seed in seeds] for name in names}
    lost = {name: [statistics.mean(a - b for a, b in row.values()) for row in rows]
            for name, rows in interference.items()}
    accuracy = {name: [results[runs[name, seed]]["speciality"] for seed in seeds]
                for name in (*names, "csreft-first-token")}
    opened = {name: [gates(args.out / runs[name, seed].folder) for seed in seeds]
              for name in ("csreft", "csreft-first-token")}
    widths = {name: [[rounded(row[key]) for row in rows] for key in ("spread", "untrained_spread")]
              for name, rows in opened.items()}
    claims = [
        judge("interference: LoReFT's, at equal total rank, above CS-ReFT's", seeds, lost["loreft"], lost["csreft"]),
        judge("interference: LoRA's above CS-ReFT's", seeds, lost["lora"], lost["csreft"]),
        judge("accuracy on the new tasks: CS-ReFT above LoReFT", seeds, accuracy["csreft"], accuracy["loreft"]),
        judge("accuracy on the new tasks: CS-ReFT above LoRA", seeds, accuracy["csreft"], accuracy["lora"]),
        judge("largest difference of a gate between two tasks: trained above untrained, routing on the prompt's mean",
              seeds, *widths["csreft"], "gate"),
        judge("largest difference of a gate between two tasks: trained above untrained, routing on the first token",
              seeds, *widths["csreft-first-token"], "gate"),
        judge("accuracy on the new tasks: routing on the prompt's mean above the first token", seeds,
              accuracy["csreft"], accuracy["csreft-first-token"])]
    show_claims("csreft", claims)
    store(args, "csreft", {"protocol": ALL, "tried": TRIED["csreft"], "claims": claims, "accuracy": accuracy,
                           "interference": interference, "gates": opened})


def front(args):
    """{row: [{"lr", "weight" for Wise-FT, "speciality", "versatility"}]} on validation data, one seed, by rate."""
    run_at = lambda name, lr: Run(f"facts-{name}@{lr:g}", f"{at(FRONT[name][0], lr)} {FACTS}", CHOSEN_WITH,
                                  "validation")
    asked = {(name, lr): run_at(name, lr) for name, (_, lrs) in FRONT.items() for lr in lrs}
    for again in range(3):
        made = work(list(asked.values()), args, "the front" if not again else "the front, refined", may_fail=True)
        points = {name: sorted((as_point(made[run], lr=lr) for (row, lr), run in asked.items()
                                if row == name and run in made), key=lambda p: p["lr"]) for name in FRONT}
        for name in REFINED:
            enough = [p["lr"] for p in points[name] if p["speciality"] >= best_speciality(points["sft"]) - ENOUGH]
            below = [p["lr"] for p in points[name] if enough and p["lr"] < enough[0]]
            if again < 2 and enough:
                lr = float(f"{math.sqrt(enough[0] * below[-1]) if below else enough[0] / 2:.1e}")
                asked[name, lr] = run_at(name, lr)
    mixed = {lr: replace(asked["sft", lr], wise=True) for lr in WISE_FROM}
    made = work(list(mixed.values()), args, "Wise-FT")
    points["wise-ft"] = [{"lr": lr, **p} for lr, run in mixed.items() for p in made[run]["points"]]
    return points


def best_speciality(points):
    return max(p["speciality"] for p in points)


def claim_cofitune(args):
    """Versatility at about equal speciality, at one rate for both and each at its best; what the mask itself does."""
    points = front(args)
    # Best: most versatility among the rates within two points of SFT's best speciality.
    best = {name: about_equal(points[name], best_speciality(points["sft"]), ENOUGH) for name in points}
    print("\nbest of each row on validation data:")
    for name, p in best.items():
        print(f"  {name:<10}" + (", ".join(f"{key} {value:g}" for key, value in p.items()) if p else
                                 "never within two points of SFT's best speciality"))
    if not best["cofitune"]:
        raise UserError("CoFiTune never learns about as much as SFT: give it higher rates in FRONT")
    rate = best["cofitune"]["lr"]
    flags = {**{name: at(FRONT[name][0], best[name]["lr"]) for name in REFINED if best[name]},
             "sft-same-rate": at(FRONT["sft"][0], rate), "random-mask": at(PART + " --mask-source random", rate)}
    if best["wise-ft"]:
        flags["wise-source"] = at(FRONT["sft"][0], best["wise-ft"]["lr"])
    seeds, named = seeds_of(args), {}  # rows that ask for the same run share it
    runs = {(name, seed): Run("facts-" + named.setdefault(text, name), f"{text} {FACTS}", seed)
            for name, text in flags.items() for seed in seeds}
    results = work(list(dict.fromkeys(runs.values())), args, "CoFiTune's claim")
    scores = {name: [as_point(results[runs[name, seed]]) for seed in seeds] for name in flags if name != "wise-source"}
    if best["wise-ft"]:
        mixed = {seed: replace(runs["wise-source", seed], wise=True) for seed in seeds}
        results |= work(list(mixed.values()), args, "Wise-FT")
        scores["wise-ft"] = [as_point(next(p for p in results[mixed[seed]]["points"]
                                           if p["weight"] == best["wise-ft"]["weight"])) for seed in seeds]
    column = lambda name, key: [score[key] for score in scores[name]]
    versus = lambda text, ours, theirs: judge(
        text, seeds, column(ours, "versatility"), column(theirs, "versatility"),
        speciality=[column(ours, "speciality"), column(theirs, "speciality")])
    claims = [versus("versatility, both at CoFiTune's best rate: CoFiTune above SFT", "cofitune", "sft-same-rate"),
              *(versus(f"versatility, each at its best rate: CoFiTune above {title}", "cofitune", other)
                for other, title in (("sft", "SFT"), ("wise-ft", "Wise-FT"), ("coarse", "its coarse step alone"))
                if other in scores),
              versus("versatility at one rate: CoFiTune above a random mask with the same values", "cofitune",
                     "random-mask")]
    show_claims("cofitune", claims)
    store(args, "cofitune", {"protocol": FACTS, "tried": TRIED["cofitune"], "claims": claims, "front": points,
                             "best": best, "scores": scores, "flags": flags})


def claim_spectrum(args):
    """Whether MultiLoRA's flat spectrum is learned: the same figures of updates that only start like its."""
    seeds, rate = seeds_of(args), rate_of(args, "multilora")
    runs = {(name, seed): Run(name if name == "multilora" else f"start-{name}", f"{at(flags, rate)} {ALL}", seed)
            for seed in seeds for name, flags in STARTS.items()}
    results = work(list(runs.values()), args, "the spectrum's controls")
    figures = {name: [spectrum(args.out / runs[name, seed].folder) for seed in seeds] for name in STARTS}
    column = lambda name: [row["effective_rank"] for row in figures[name]]
    accuracy = {name: [results[runs[name, seed]]["speciality"] for seed in seeds] for name in STARTS}
    titles = {"scales-alone": "trained scales on A and B as they start", "one-module": "one module of rank 12 with "
              "scales", "lora-uniform-b": "LoRA with B in MultiLoRA's range"}
    claims = [judge(f"ΔW's effective rank: MultiLoRA's above that of {title}", seeds, column("multilora"),
                    column(name), "directions") for name, title in titles.items()]
    show_claims("spectrum", claims)
    store(args, "spectrum", {"protocol": ALL, "tried": TRIED["spectrum"], "claims": claims, "accuracy": accuracy,
                             "spectra": figures})


def claim_search(args):
    """CoFiTune by default, its search included, beside SFT over a grid of rates: H of both, on test data."""
    seeds = range(3)
    rows = {"cofitune": "--method cofitune", **{f"sft@{lr:g}": at("--method sft", lr) + f" {SEARCHED}"
                                                for lr in SFT_RATES}}
    runs = {(name, seed): Run(f"search-{name}", flags, seed) for name, flags in rows.items() for seed in seeds}
    results = work(list(runs.values()), args, "CoFiTune by default")
    scores = {name: [as_point(results[runs[name, seed]]) for seed in seeds] for name in rows}
    print(f"\n{'':<14}{'speciality':>16}{'versatility':>16}{'H':>16}   each seed")
    for name, points in scores.items():
        harmonic = [2 * p["speciality"] * p["versatility"] / max(1e-9, p["speciality"] + p["versatility"])
                    for p in points]
        columns = [p["speciality"] for p in points], [p["versatility"] for p in points], harmonic
        print(f"{name:<14}" + "".join(f"{statistics.mean(c):>9.1f} ± {spread(c):>4.1f}" for c in columns) + "   "
              + ", ".join("{speciality:.1f} / {versatility:.1f}".format(**p) for p in points))
    store(args, "search", {"protocol": SEARCHED, "scores": scores, "chosen": [
        read_json(args.out / runs["cofitune", seed].folder / "config.json")["settled"] for seed in seeds]})


def teach(args):
    """One table of teaching numbers for each method, as Markdown."""
    tables = {}
    for method, (protocol, rows) in TEACH.items():
        runs = {name: Run(f"teach-{method}-{i}", f"{flags} {protocol}", CHOSEN_WITH)
                for i, (name, flags) in enumerate(rows.items())}
        results = work(list(runs.values()), args, f"teaching numbers of {method}")
        print(f"\n| {method}, {protocol} | speciality | versatility | and |\n|---|---|---|---|")
        tables[method] = {name: {**as_point(results[run]), **results[run]["report"]} for name, run in runs.items()}
        for name, row in tables[method].items():
            if method == "csreft":
                opened = gates(args.out / runs[name].folder)["gates"].values()
                row["mean_gate"] = statistics.mean(gate for means in opened for gate in means)
            more = (f"effective rank {row['effective_rank']:.1f}" if method == "multilora" else
                    "largest overlap {largest_overlap:.2f}, mean gate {mean_gate:.2f}".format(**row))
            print(f"| {name} | {row['speciality']:.1f} | {row['versatility']:.1f} | {more} |")
    store(args, "teach", tables)


def controls(args):
    """CoFiTune's controls: every setting at seeds 0, 1 and 2, as a table of Markdown."""
    runs = {(name, seed): Run(f"controls-{name}", f"{flags} {CONTROLLED}", seed)
            for seed in range(3) for name, flags in CONTROLS.items()}
    results = work(list(runs.values()), args, "controls")
    print("\n| run | speciality | versatility | Uni | seeds |\n|---|---|---|---|---|")
    scores = {name: [as_point(results[runs[name, seed]]) for seed in range(3)] for name in CONTROLS}
    for name, seeds in scores.items():
        mean = [statistics.mean(s[key] for s in seeds) for key in ("speciality", "versatility")]
        every = ", ".join("{speciality:.1f} / {versatility:.1f}".format(**s) for s in seeds)
        print(f"| {name} | {mean[0]:.1f} | {mean[1]:.1f} | {sum(mean):.1f} | {every} |")
    store(args, "controls", {"protocol": CONTROLLED, "flags": CONTROLS, "scores": scores})


CLAIMS = {"multilora": claim_multilora, "csreft": claim_csreft, "cofitune": claim_cofitune,
          "spectrum": claim_spectrum, "search": claim_search}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="150 steps, 50 examples of each task: a look")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates instead")
    parser.add_argument("--claim", choices=CLAIMS, help="judge a paper's claim instead")
    parser.add_argument("--controls", action="store_true", help="CoFiTune's controls instead")
    parser.add_argument("--teach", action="store_true", help="one change at a time instead, one seed")
    parser.add_argument("--suite", choices=SUITES, default="default", help="hard: twelve new tasks instead of six")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder of all runs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="runs at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (%(default)s)")
    args = parser.parse_args()
    if wrong := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown method {wrong[0]!r}; valid: {', '.join(METHODS)}")
    if args.tune + args.controls + args.teach + bool(args.claim) + bool(args.methods or args.quick) > 1:
        parser.error("give one of --tune, --controls, --teach, --claim NAME, and methods or --quick")
    if args.suite != "default" and args.claim != "multilora":
        parser.error(f"--suite {args.suite} goes with --claim multilora")
    if not (5 if args.claim else 1) <= args.seeds <= len(SEEDS):
        parser.error(f"--seeds is {args.seeds}, expected from {5 if args.claim else 1} to {len(SEEDS)}")
    if min(args.jobs, args.threads) < 1:
        parser.error("--jobs and --threads must be at least 1")
    (tune if args.tune else controls if args.controls else teach if args.teach else
     CLAIMS[args.claim] if args.claim else compare)(args)
    print(f"\n{args.out / 'compare.json'}")


if __name__ == "__main__":
    command_line(main)
