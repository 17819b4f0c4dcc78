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

Read in this order: the protocol, runs, what is measured, the statistics, tuning, the comparison, the claims, what is
not judged. Each command makes one section of compare.json, which `reproduce.table` shows.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import multilora
import train
from base import suite as builtin
from engine.flags import Parser, command_line
from engine.folder import difference, provenance
from engine.progress import clock
from model import LINEARS, Llama, UserError, open_tensors, read_json, write_json, written
from reproduce import importance, wise
from reproduce.gates import gates_by_task
from reproduce.spectra import changes, figures
from reproduce.table import STORED, column, harmonic_mean, mean_and_spread, shown, spread

# ---------------------------------------------------------------------------------------------- the protocol

CHOSEN_WITH = 0  # the seed of every choice
SEEDS = range(11, 31)  # `--seeds 5` takes the first five

# All six new tasks, the same examples in the same order for every method.
ALL = "--steps 800 --batch-size 24"
HARD = " --tasks hard"  # twelve tasks, as many steps
QUICK = "--steps 150 --batch-size 24 --eval-limit 50"
# CoFiTune's claim: the two fact tasks, which every method learns whole, so that only forgetting differs.
FACTS = "--tasks currency,tool --steps 600 --batch-size 24"
PART = "--method cofitune --layers 50%-100% --modules gate_proj,up_proj,down_proj"  # the first winner of its search

METHODS = ("sft", "lora", "multilora", "loreft", "csreft", "cofitune")
# {row: (flags, rates)}; the first six are the METHODS as they are compared. The best rate is the one with the highest
# speciality; of those within TIE points of it, the one with the highest versatility.
TIE = 0.5
GRID = {"sft": ("--method sft", (5e-4, 1e-3, 2e-3, 4e-3)),
        "lora": ("--method lora", (2e-3, 4e-3, 8e-3)),
        "multilora": ("--method multilora", (4e-3, 8e-3, 1.6e-2)),
        "loreft": ("--method loreft", (2.5e-3, 5e-3, 1e-2, 2e-2)),
        "csreft": ("--method csreft", (5e-3, 1e-2, 2e-2)),
        "csreft-first-token": ("--method csreft --route-on first_token", (5e-3, 1e-2, 2e-2)),
        "cofitune": (PART, (2e-3, 4e-3, 8e-3)),
        # where MultiLoRA might be ahead: a quarter of the rank
        "multilora-rank-3": ("--method multilora --rank 1 --alpha 2", (4e-3, 8e-3, 1.6e-2)),
        "lora-rank-3": ("--method lora --rank 3 --alpha 6", (4e-3, 8e-3, 1.6e-2)),
        # or twice as many tasks
        "multilora-hard": ("--method multilora" + HARD, (4e-3, 8e-3, 1.6e-2)),
        "lora-hard": ("--method lora" + HARD, (2e-3, 4e-3, 8e-3))}
# MultiLoRA's count needs a rank of 13.6 in LoRA; 14 has 2.7 % more parameters than MultiLoRA, and takes LoRA's rate.
EQUAL_PARAMETERS = "--method lora --rank 14 --alpha 28"
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

# Is a flat spectrum learned, or is it the start's? MultiLoRA against these, all at its own rate: {row: (what, flags)}.
STARTS = {"scales-alone": ("trained scales on A and B as they start", "--method multilora --train s"),
          "one-module": ("one module of rank 12 with scales", "--method multilora --modules 1 --rank 12 --alpha 24"),
          "lora-uniform-b": ("LoRA with B in MultiLoRA's range", "--method lora --zero s")}  # starts away from the base
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
OVERLAPS = ("prompt's mean, joint", "separate subspaces")  # rows whose |R_i R_j^T| is drawn

# Protocols tried for a claim, the judged one last. The earlier ones were looked at on validation data, or on the test
# data of seeds 0 to 2 (README's tables of single runs, --controls).
TRIED = {
    "multilora": ["all six tasks, total rank 12, 600 steps of 48, seed 0", "total rank 3, seed 0, validation data",
                  "twelve tasks, seed 0, validation data", "all six tasks, total rank 12, 800 steps of 24"],
    "csreft": ["all six tasks, total rank 20, 2,000 steps of 24, seed 0", "all six tasks, 800 steps of 24"],
    "cofitune": ["all six tasks, 600 steps of 48, seed 0", "fact tasks, 300 steps of 48, seed 0",
                 "fact tasks, 600 steps of 48, seed 0", "fact tasks, 1,200 steps of 24, seeds 0 to 2",
                 "fact tasks, 600 steps of 24"]}
TRIED["search"] = ["all six tasks, 800 steps of 24, seeds 0 to 2", "all six tasks, 800 steps of 24"]
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

    @property
    def method(self):
        return self.identity["settings"]["method"]

    @cached_property
    def identity(self):
        config, method_config, _ = train.parse(self.argv)
        return train.identity(config, method_config, *train.place(config))

    def results(self, out):
        """What it left, its folder, and whether other code made it; None where it is not finished. UserError for
        another run."""
        folder = out / self.folder
        file = folder / ("wise.json" if self.wise else "results.json")
        if not file.exists():
            return None
        saved = read_json(folder / "config.json").get("asked", {})
        # settings that its code did not have yet count as their defaults
        for key, defaults in zip(("settings", "method_settings"), train.parse(["--method", self.method])):
            saved[key] = {name: value for name, value in asdict(defaults).items() if name in self.identity[key]} | \
                saved.get(key, {})
        if other := difference({**saved, "code": {}}, {**self.identity, "code": {}}):
            raise UserError(f"{folder} holds another run: {other}; remove it, or give another --out")
        return {**read_json(file), "folder": folder, "other_code": saved["code"] != self.identity["code"]}


def at(flags, lr):
    return f"{flags} --lr {lr:g}"


def seeded(rows, seeds, prefix=""):
    """{name: [its Run at each seed]} of {name: flags}."""
    return {name: [Run(prefix + name, flags, seed) for seed in seeds] for name, flags in rows.items()}


def execute(command, log, threads):
    """A program's command in this process, which ends with its parent; what it prints goes to a file."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.argv = command
        command_line({"train.py": train.main, "reproduce.wise": wise.main}[command[0]])


def work(plan, args, title, may_fail=False):
    """The plan, nested dicts and lists of Runs, with the results of each Run in its place: makes finished what is not,
    `--jobs` runs at a time, and prints a line for each.

    A run that ends with an error does not stop the others. Then: UserError, or with may_fail (a learning rate that
    may turn out too high) a note, and None in its place."""
    results = {run: run.results(args.out) for *_, run in leaves(plan)}
    left = [run for run, found in results.items() if not found]
    if other := sum(found["other_code"] for found in results.values() if found):
        print(f"{title}: {other} finished runs were made by other code than today's, and are taken as they are")
    if left:
        print(f"{title}: {len(left)} of {len(results)} runs to make, {args.jobs} at a time with {args.threads} threads "
              "each", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    spawn, pool, took, failed = multiprocessing.get_context("spawn"), ThreadPoolExecutor(args.jobs), [], []
    log = lambda run: args.out / f"{run.folder}{'-wise' * run.wise}.log"

    def one(run):
        folder = str(args.out / run.folder)
        command = ["reproduce.wise", folder] if run.wise else ["train.py", *run.argv, "--out", folder]
        process = spawn.Process(target=execute, args=(command, log(run), args.threads), daemon=True)
        process.start()
        process.join()
        return process.exitcode

    try:
        futures = {pool.submit(one, run): run for run in left}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            if code := future.result():
                failed.append(f"{args.out / run.folder} ended with code {code}; {log(run)} says why")
                print(f"  {failed[-1]}", flush=True)
                continue
            results[run] = run.results(args.out)
            took.append(results[run]["seconds"])
            scores = "" if run.wise else "{speciality:>6.1f} /{versatility:>5.1f}".format(**results[run])
            print(f"  {run.folder:<42}{scores:<13}  {took[-1]:>4.0f} s   {len(left) - count} left, ETA "
                  f"{clock(statistics.median(took) * (len(left) - count) / args.jobs)}", flush=True)
    finally:  # a signal: the runs keep a checkpoint after the step in hand
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    if failed and not may_fail:
        raise UserError(failed[0])
    return filled(plan, results)


def filled(plan, results):
    """The plan with results[run] in the place of each Run."""
    if isinstance(plan, dict):
        return {key: filled(part, results) for key, part in plan.items()}
    return [filled(part, results) for part in plan] if isinstance(plan, list) else results[plan]


def leaves(value, *path):
    """A row (names on the way..., value) of everything in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, *path, key)
    else:
        yield *path, value


# ---------------------------------------------------------------------------------------------- what is measured


def as_point(results, **where):
    return {**where, "speciality": results["speciality"], "versatility": results["versatility"]}


def brief(results):
    """What compare.json keeps of a run."""
    return {**as_point(results), "tasks": {task: s["after"] for task, s in results["tasks"].items()
                                           if s["group"] == "new"},
            "trainable_parameters": results["trainable_parameters"],
            "share": 100 * results["trainable_parameters"] / results["total_parameters"],
            "seconds": results["seconds"], "peak_memory_bytes": results["peak_memory_bytes"]}


def points_of(results):
    """{name: [scores at each seed]} of {name: [results at each seed]}."""
    return {name: [as_point(r) for r in row] for name, row in results.items()}


def accuracy_of(results):
    return {name: column(row, "speciality") for name, row in results.items()}


def spectrum(folder, sft=None):
    """Of a run's update of the linear layers: singular values, their spread, and the similarity to SFT's."""
    linear = lambda run: {name: delta for name, delta in changes(run)[0].items()
                          if name.removesuffix(".weight").endswith(LINEARS)}
    return figures(linear(folder), SPECTRUM, linear(sft) if sft else {})


def noise(seed):
    """The spectrum of MultiLoRA's update where nothing is trained: A and B as they start, every scale one."""
    torch.manual_seed(seed)
    _, config, _ = train.parse(["--method", "multilora"])
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


def band(values):
    """[low, high]: the seeds' minimum to maximum, widened by one standard deviation."""
    return [min(values) - spread(values), max(values) + spread(values)]


# ---------------------------------------------------------------------------------------------- tuning


def load(file):
    return read_json(file) if file.exists() else {}


def best_rate(points):
    return about_equal(points, max(column(points, "speciality")), TIE)["lr"]


def about_equal(points, target, points_below):
    """The point with the highest versatility among those that learned enough, or None."""
    enough = [point for point in points if point["speciality"] >= target - points_below]
    return max(enough, key=lambda point: point["versatility"], default=None)


def tune(args):
    """Every rate of the grid at one seed, scored on validation data."""
    plan = {name: {lr: Run(f"tune-{name}@{lr:g}", f"{at(flags, lr)} {ALL}", CHOSEN_WITH, "validation") for lr in lrs}
            for name, (flags, lrs) in GRID.items()}
    grid = {name: [as_point(results, lr=lr) for lr, results in row.items() if results]
            for name, row in work(plan, args, "tuning", may_fail=True).items()}
    best = {name: best_rate(row) for name, row in grid.items()}
    for name, row in grid.items():
        if best[name] in (row[0]["lr"], row[-1]["lr"]):
            print(f"note: the best rate of {name} is at the edge of its grid")
    return {"protocol": ALL, "seed": CHOSEN_WITH, "split": "validation", "grid": grid, "best": best}


def rate_of(args, row):
    """The best learning rate of a row of GRID: as --tune chose it in --out, else the stored one."""
    for found in (load(args.out / "compare.json"), load(STORED)):
        if row in found.get("tune", {}).get("best", {}):
            return found["tune"]["best"][row]
    raise UserError(f"no learning rate for {row} in {args.out / 'compare.json'} nor in {STORED}: run with --tune first")


def at_best(args, row, flags=None):
    """Flags of a run of a row of GRID, or of other flags, at the row's best rate."""
    return f"{at(flags or GRID[row][0], rate_of(args, row))} {ALL}"


# ---------------------------------------------------------------------------------------------- the comparison


def compare(args):
    """Every method at its best rate, on test data."""
    protocol, prefix = (QUICK, "quick-") if args.quick else (ALL, "")
    rate = {name: rate_of(args, name) for name in args.methods or METHODS}
    plan = seeded({name: f"{at(GRID[name][0], lr)} {protocol}" for name, lr in rate.items()}, args.seeds, prefix)
    rows = {}
    for name, results in work(plan, args, "comparison").items():
        seeds = [brief(r) for r in results]
        means = {key: column(seeds, key) for key in ("speciality", "versatility")}
        rows[name] = {"lr": rate[name], "flags": GRID[name][0], "seeds": dict(zip(map(str, args.seeds), seeds)),
                      **{key: mean_and_spread(values) for key, values in means.items()},
                      "band": {key: band(values) for key, values in means.items()},
                      "tasks": {task: mean_and_spread(column(column(seeds, "tasks"), task))
                                for task in seeds[0]["tasks"]},
                      "trainable_parameters": seeds[0]["trainable_parameters"], "share": seeds[0]["share"],
                      "seconds": statistics.median(column(seeds, "seconds")),
                      "peak_memory_bytes": max(column(seeds, "peak_memory_bytes"))}
    known = load(args.out / "compare.json").get("quick" if args.quick else "compare", {})
    if known.get("protocol") == protocol:  # rows of methods not named now stay, and equal ones with more seeds
        for name, row in known["rows"].items():
            if name not in rows or row["lr"] == rows[name]["lr"] and len(row["seeds"]) > len(rows[name]["seeds"]):
                rows[name] = row
    return {"protocol": protocol, "rows": {name: rows[name] for name in METHODS if name in rows}}


# ---------------------------------------------------------------------------------------------- the claims


def claim_multilora(args):
    """Accuracy against LoRA at equal total rank and at equal parameter count; the spectra of the learned updates."""
    if args.suite == "hard":  # accuracy at equal total rank alone: no rates were chosen there for the other rows
        plan = seeded({name: at_best(args, f"{name}-hard") for name in ("multilora", "lora")}, args.seeds, "hard-")
    else:
        plan = seeded({**{name: at_best(args, name) for name in ("sft", "multilora", "lora")},
                       "lora-equal-parameters": at_best(args, "lora", EQUAL_PARAMETERS)}, args.seeds)
    results, spectra = work(plan, args, "MultiLoRA's claim"), {}
    accuracy = accuracy_of(results)
    claims = [judge("accuracy on the new tasks: MultiLoRA above LoRA at equal total rank", args.seeds,
                    accuracy["multilora"], accuracy["lora"])]
    if args.suite == "default":
        spectra = {name: [spectrum(run["folder"], sft["folder"]) for run, sft in zip(runs, results["sft"])]
                   for name, runs in results.items()} | {"untrained": [noise(seed) for seed in args.seeds]}
        of = lambda name, key: column(spectra[name], key)
        rank = {name: column(rows, "effective_rank") for name, rows in spectra.items()}
        far = lambda name: [abs(a - b) for a, b in zip(rank[name], rank["sft"])]
        curves = lambda name: [sum(abs(x - y) for x, y in zip(a, b)) / 2
                               for a, b in zip(of(name, "values"), of("sft", "values"))]
        claims += [judge(statement, args.seeds, *rest) for statement, *rest in (
            ("accuracy on the new tasks: MultiLoRA above LoRA at equal parameter count",
             accuracy["multilora"], accuracy["lora-equal-parameters"]),
            ("ΔW's first singular value, as a share: LoRA's above MultiLoRA's",
             of("lora", "first_value_share"), of("multilora", "first_value_share"), "share"),
            ("ΔW's effective rank: MultiLoRA's above LoRA's", rank["multilora"], rank["lora"], "directions"),
            ("ΔW's spectrum, distance from SFT's: LoRA's above MultiLoRA's",
             curves("lora"), curves("multilora"), "share"),
            ("ΔW's effective rank, distance from SFT's: LoRA's above MultiLoRA's",
             far("lora"), far("multilora"), "directions"),
            ("ΔW's leading subspace, share that lies in SFT's: MultiLoRA's above LoRA's",
             of("multilora", "similarity_to_sft"), of("lora", "similarity_to_sft"), "share"),
            # a learned update should win against one of noise, if its spectrum were learned
            ("ΔW's effective rank: MultiLoRA's above that of its untrained start, s = 1",
             rank["multilora"], rank["untrained"], "directions"),
            ("ΔW's effective rank, distance from SFT's: the untrained start's above MultiLoRA's",
             far("untrained"), far("multilora"), "directions"))]
    return {"protocol": ALL + HARD * (args.suite == "hard"), "claims": claims, "accuracy": accuracy, "spectra": spectra,
            "trainable_parameters": {name: runs[0]["trainable_parameters"] for name, runs in results.items()}}


def alone(run, task):
    """The Run on one task alone, with as many examples of it as the run on all tasks sees."""
    steps = round(train.parse(run.argv)[0].steps / len(builtin.NEW))
    return replace(run, name=f"{run.name}-alone-{task}", flags=f"{run.flags} --tasks {task} --steps {steps}")


def claim_csreft(args):
    """Interference of each task: trained alone, on as many of its examples, minus trained together. And the gates."""
    together = seeded({name: at_best(args, name) for name in ("csreft", "loreft", "lora", "csreft-first-token")},
                      args.seeds)
    apart = {name: [{task: alone(run, task) for task in builtin.NEW} for run in together[name]]
             for name in ("csreft", "loreft", "lora")}
    together, apart = work([together, apart], args, "CS-ReFT's claim")
    after = lambda results, task: results["tasks"][task]["after"]
    interference = {name: [{task: [after(results, task), after(whole, task)] for task, results in tasks.items()}
                           for tasks, whole in zip(seeds, together[name])] for name, seeds in apart.items()}
    lost = {name: [statistics.mean(a - b for a, b in row.values()) for row in seeds]
            for name, seeds in interference.items()}
    accuracy = accuracy_of(together)
    opened = {name: [gates(results["folder"]) for results in together[name]]
              for name in ("csreft", "csreft-first-token")}
    # rounded, so that a gate that is constant but for the last digits of float32 counts as a tie
    widths = lambda name: [[round(width, 4) for width in column(opened[name], key)]
                           for key in ("spread", "untrained_spread")]
    claims = [judge(statement, args.seeds, *rest) for statement, *rest in (
        ("interference: LoReFT's, at equal total rank, above CS-ReFT's", lost["loreft"], lost["csreft"]),
        ("interference: LoRA's above CS-ReFT's", lost["lora"], lost["csreft"]),
        ("accuracy on the new tasks: CS-ReFT above LoReFT", accuracy["csreft"], accuracy["loreft"]),
        ("accuracy on the new tasks: CS-ReFT above LoRA", accuracy["csreft"], accuracy["lora"]),
        ("largest difference of a gate between two tasks: trained above untrained, routing on the prompt's mean",
         *widths("csreft"), "gate"),
        ("largest difference of a gate between two tasks: trained above untrained, routing on the first token",
         *widths("csreft-first-token"), "gate"),
        ("accuracy on the new tasks: routing on the prompt's mean above the first token",
         accuracy["csreft"], accuracy["csreft-first-token"]))]
    return {"protocol": ALL, "claims": claims, "accuracy": accuracy, "interference": interference, "gates": opened}


def front(args):
    """{row: [{"lr", "weight" for Wise-FT, "speciality", "versatility"}]} on validation data, one seed, by rate."""
    run_at = lambda name, lr: Run(f"facts-{name}@{lr:g}", f"{at(FRONT[name][0], lr)} {FACTS}", CHOSEN_WITH,
                                  "validation")
    plan, points = {name: {lr: run_at(name, lr) for lr in lrs} for name, (_, lrs) in FRONT.items()}, {}
    for title in ("the front", "the front, refined", "the front, refined"):
        for name in REFINED if points else ():
            enough = [p["lr"] for p in points[name] if p["speciality"] >= best_speciality(points["sft"]) - ENOUGH]
            below = [p["lr"] for p in points[name] if enough and p["lr"] < enough[0]]
            if enough:
                lr = float(f"{math.sqrt(enough[0] * below[-1]) if below else enough[0] / 2:.1e}")
                plan[name][lr] = run_at(name, lr)
        points = {name: [as_point(results, lr=lr) for lr, results in sorted(row.items()) if results]
                  for name, row in work(plan, args, title, may_fail=True).items()}
    mixed = work({lr: replace(plan["sft"][lr], wise=True) for lr in WISE_FROM}, args, "Wise-FT")
    return points | {"wise-ft": [{"lr": lr, **p} for lr, results in mixed.items() for p in results["points"]]}


def best_speciality(points):
    return max(column(points, "speciality"))


def claim_cofitune(args):
    """Versatility at about equal speciality, at one rate for both and each at its best; what the mask itself does."""
    points = front(args)
    # Best: most versatility among the rates within two points of SFT's best speciality.
    best = {name: about_equal(row, best_speciality(points["sft"]), ENOUGH) for name, row in points.items()}
    print("\nbest of each row on validation data:")
    for name, p in best.items():
        print(f"  {name:<10}" + (", ".join(f"{key} {value:g}" for key, value in p.items()) if p else
                                 "never within two points of SFT's best speciality"))
    if not best["cofitune"]:
        raise UserError("CoFiTune never learns about as much as SFT: give it higher rates in FRONT")
    rate, mixed = best["cofitune"]["lr"], best["wise-ft"]
    flags = {**{name: at(FRONT[name][0], best[name]["lr"]) for name in REFINED if best[name]},
             "sft-same-rate": at(FRONT["sft"][0], rate), "random-mask": at(PART + " --mask-source random", rate),
             **({"wise-source": at(FRONT["sft"][0], mixed["lr"])} if mixed else {})}
    named = {}  # rows that ask for the same run share it
    plan = {name: [Run("facts-" + named.setdefault(text, name), f"{text} {FACTS}", seed) for seed in args.seeds]
            for name, text in flags.items()}
    scores = points_of(work(plan, args, "CoFiTune's claim"))
    if mixed:
        del scores["wise-source"]
        made = work([replace(run, wise=True) for run in plan["wise-source"]], args, "Wise-FT")
        scores["wise-ft"] = [as_point(p) for results in made for p in results["points"]
                             if p["weight"] == mixed["weight"]]
    versus = lambda statement, *names: judge(
        statement, args.seeds, *(column(scores[name], "versatility") for name in names),
        speciality=[column(scores[name], "speciality") for name in names])
    claims = [versus("versatility, both at CoFiTune's best rate: CoFiTune above SFT", "cofitune", "sft-same-rate"),
              *(versus(f"versatility, each at its best rate: CoFiTune above {title}", "cofitune", other)
                for other, title in (("sft", "SFT"), ("wise-ft", "Wise-FT"), ("coarse", "its coarse step alone"))
                if other in scores),
              versus("versatility at one rate: CoFiTune above a random mask with the same values", "cofitune",
                     "random-mask")]
    return {"protocol": FACTS, "claims": claims, "front": points, "best": best, "scores": scores, "flags": flags}


def claim_spectrum(args):
    """Whether MultiLoRA's flat spectrum is learned: the same figures of updates that only start like its."""
    starts = {name: at_best(args, "multilora", flags) for name, (_, flags) in STARTS.items()}
    plan = seeded({"multilora": at_best(args, "multilora")}, args.seeds) | seeded(starts, args.seeds, "start-")
    results = work(plan, args, "the spectrum's controls")
    spectra = {name: [spectrum(run["folder"]) for run in runs] for name, runs in results.items()}
    rank = {name: column(rows, "effective_rank") for name, rows in spectra.items()}
    claims = [judge(f"ΔW's effective rank: MultiLoRA's above that of {title}", args.seeds, rank["multilora"],
                    rank[name], "directions") for name, (title, _) in STARTS.items()]
    return {"protocol": ALL, "claims": claims, "accuracy": accuracy_of(results), "spectra": spectra}


def claim_search(args):
    """CoFiTune by default, its search included, beside SFT over a grid of rates, at seeds 0 to 2; then the region and
    the rate that were best at the first of them, judged."""
    rows = {"cofitune": "--method cofitune", **{f"sft@{lr:g}": at("--method sft", lr) + f" {SEARCHED}"
                                                for lr in SFT_RATES}}
    results = work(seeded(rows, range(3), "search-"), args, "CoFiTune by default")
    scores = points_of(results)
    settled = [read_json(run["folder"] / "config.json")["settled"] for run in results["cofitune"]]
    best = max((name for name in rows if name != "cofitune"), key=lambda name: harmonic_mean(scores[name][0]))
    region = f"--method cofitune --layers {settled[0]['layers']} --modules {settled[0]['modules']}"
    judged = points_of(work(seeded({"region": region, best: rows[best]}, args.seeds, "search-"), args,
                            "CoFiTune's claim by H"))
    ours, theirs = ([harmonic_mean(point) for point in points] for points in judged.values())
    claims = [judge(f"H of both scores: CoFiTune's chosen region above SFT at its best rate, {best[4:]}", args.seeds,
                    ours, theirs)]
    return {"protocol": SEARCHED, "scores": scores, "chosen": settled, "claims": claims, "judged": judged}


# ---------------------------------------------------------------------------------------------- what is not judged


def controls(args):
    """CoFiTune's controls, every setting at seeds 0, 1 and 2."""
    rows = {name: f"{flags} {CONTROLLED}" for name, flags in CONTROLS.items()}
    return {"protocol": CONTROLLED, "flags": CONTROLS,
            "scores": points_of(work(seeded(rows, range(3), "controls-"), args, "controls"))}


def teach(args):
    """Teaching numbers of each method, one change at a time; |R_i R_j^T| of CS-ReFT's subspaces; z of CoFiTune's units.
    """
    tables, overlaps = {}, {}
    for method, (protocol, rows) in TEACH.items():
        plan = {name: Run(f"teach-{method}-{i}", f"{flags} {protocol}", CHOSEN_WITH)
                for i, (name, flags) in enumerate(rows.items())}
        tables[method] = {}
        for name, results in work(plan, args, f"teaching numbers of {method}, {protocol}").items():
            tables[method][name] = {**as_point(results), **results["report"]}
            if method == "csreft":
                opened = gates(results["folder"])["gates"].values()
                tables[method][name]["mean_gate"] = statistics.mean(gate for means in opened for gate in means)
                with open_tensors(results["folder"] / "adapter.safetensors") as file:
                    R = file.get_tensor("csreft.R").flatten(1, 2)  # (L, k r, d)
                overlaps[name] = (R @ R.mT).abs().mean(0).tolist()
    print("importance of CoFiTune's units", flush=True)
    return {"tables": tables, "overlap": {name: overlaps[name] for name in OVERLAPS},
            "importance": importance.measure()}


CLAIMS = {"multilora": claim_multilora, "csreft": claim_csreft, "cofitune": claim_cofitune,
          "spectrum": claim_spectrum, "search": claim_search}


def store(args, section, value):
    """Puts a section into compare.json in --out."""
    everything = {**load(args.out / "compare.json"), section: value,
                  "machine": {"cpu_cores": os.cpu_count(), "jobs": args.jobs, "threads": args.threads,
                              **provenance([])["versions"]}}
    write_json(args.out / "compare.json", everything)
    with written(args.out / "compare.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(leaves(everything))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="150 steps, 50 examples of each task: a look")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates instead")
    parser.add_argument("--claim", choices=CLAIMS, help="judge a paper's claim instead")
    parser.add_argument("--controls", action="store_true", help="CoFiTune's controls instead")
    parser.add_argument("--teach", action="store_true", help="one change at a time instead, one seed")
    parser.add_argument("--suite", choices=("default", "hard"), default="default",
                        help="hard: twelve new tasks instead of six")
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
    args.seeds = list(SEEDS[: args.seeds])
    make, section = ((tune, "tune") if args.tune else (controls, "controls") if args.controls else
                     (teach, "teach") if args.teach else (CLAIMS[args.claim], args.claim) if args.claim else
                     (compare, "quick" if args.quick else "compare"))
    section += "-hard" * (args.suite == "hard")
    value = make(args)
    if section in TRIED:
        value["tried"] = TRIED[section]
    store(args, section, value)
    print(f"\n{shown(section, value)}\n\n{args.out / 'compare.json'}")


if __name__ == "__main__":
    command_line(main)
