"""Runs of train.py over seeds, and whether a claim about them holds.

A run is the flags of a `train.py` command. Its folder below --out is named after them, so two programs that need the
same run share it, and an interrupted program continues when it is started again. `compare.json` in --out keeps the
figures, one section for each program; `results/compare.json` holds those that README shows.
"""

import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from engine.flags import Parser
from engine.progress import clock
from model import UserError, read_json, write_json

HERE = Path(__file__).resolve().parent
STORED = HERE / "results" / "compare.json"
NAMES = {"sft": "SFT", "lora": "LoRA", "multilora": "MultiLoRA", "loreft": "LoReFT", "csreft": "CS-ReFT",
         "cofitune": "CoFiTune", "coarse": "coarse step only", "random-mask": "random mask"}

CHOSEN_WITH = 0  # the seed that rates are chosen with
SEEDS = range(11, 31)  # nothing is chosen with these; `--seeds 5` takes the first five
ALL = "--steps 800 --batch-size 24"  # all six new tasks


def arguments(doc, **switches):
    """Command-line arguments of a comparison, `seeds` as a list. switches: {name of a further flag: help}."""
    parser = Parser(description=doc.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder of all runs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="runs at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (%(default)s)")
    parser.add_argument("--train-flags", default="", help="further flags of train.py, for all runs")
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    if not 1 <= args.seeds <= len(SEEDS) or min(args.jobs, args.threads) < 1:
        parser.error(f"--seeds must be from 1 to {len(SEEDS)}, --jobs and --threads at least 1")
    args.seeds = list(SEEDS[: args.seeds])
    return args


# ---------------------------------------------------------------------------------------------- runs


def all_flags(flags, args):
    return [*shlex.split(flags), *shlex.split(args.train_flags)]


def start(flags, folder, args):
    """The process of one run. A Ctrl-C at the terminal reaches this program alone, and finish() passes it on once."""
    command = [sys.executable, str(HERE.parent / "train.py"), *all_flags(flags, args), "--out", str(folder)]
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}, start_new_session=True)


def finish(runs, args):
    """{flags: results.json, and the run's "folder"}. Runs that are not finished are made, `args.jobs` at a time. Raises
    UserError at the end if one failed, and at once where a finished one had other --train-flags."""
    # "--method lora --seed 3" lies in method-lora_seed-3
    folders = {flags: args.out / flags.removeprefix("--").replace(" --", "_").replace(" ", "-") for flags in runs}
    waiting = [flags for flags, folder in folders.items() if not (folder / "results.json").exists()]
    for flags, folder in folders.items():
        if flags not in waiting:
            command = shlex.split(read_json(folder / "config.json")["command"])
            if command[2:-2] != all_flags(flags, args):  # without "python train.py" and --out
                raise UserError(f"{folder} holds a run with other --train-flags: choose another --out")
    working, took, failed = {}, [], []
    if waiting:
        print(f"{len(waiting)} of {len(folders)} runs to make, {args.jobs} at a time", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or working:
            while waiting and len(working) < args.jobs:
                working[waiting[0]] = start(waiting[0], folders[waiting[0]], args)
                waiting.pop(0)
            time.sleep(0.1)
            for flags in [flags for flags, process in working.items() if process.poll() is not None]:
                code, left = working.pop(flags).returncode, len(waiting) + len(working)
                if code:
                    failed.append(f"{folders[flags]}.log")
                    print(f"  failed, and {failed[-1]} says why: {flags}", flush=True)
                    continue
                results = read_json(folders[flags] / "results.json")
                took.append(results["seconds"])
                print("  {speciality:5.1f} /{versatility:5.1f}  {seconds:4.0f} s".format(**results),
                      f" {left} left, ETA {clock(statistics.median(took) * left / args.jobs)}  {flags}", flush=True)
    finally:  # on a signal the runs save a checkpoint and end
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()
    if failed:
        raise UserError(f"runs that failed: {len(failed)}; {failed[0]} says why")
    return {flags: {**read_json(folder / "results.json"), "folder": folder} for flags, folder in folders.items()}


def over_seeds(rows, args):
    """{row: [results at each seed]} of {row: flags}."""
    runs = {row: [f"{flags} --seed {seed}" for seed in args.seeds] for row, flags in rows.items()}
    results = finish([run for row in runs.values() for run in row], args)
    return {row: [results[run] for run in runs[row]] for row in rows}


def at_rates(grid, protocol, args, split="validation"):
    """{row: [{"lr", "speciality", "versatility"} for each rate]} of {row: (flags, rates)}, at the seed of choices."""
    run = lambda flags, lr: f"{flags} --lr {lr} {protocol} --seed {CHOSEN_WITH} --eval-split {split}"
    results = finish([run(flags, lr) for flags, lrs in grid.values() for lr in lrs], args)
    return {row: [{"lr": float(lr), **scores_of(results[run(flags, lr)])} for lr in lrs]
            for row, (flags, lrs) in grid.items()}


def scores_of(results):
    return {key: results[key] for key in ("speciality", "versatility")}


def store(args, section, value):
    """Puts a section into compare.json in --out."""
    file = args.out / "compare.json"
    write_json(file, {**(read_json(file) if file.exists() else {}), section: value})


def claim(doc, name, measure, judged, tables):
    """The program of one paper's claim: runs and measures what it needs, judges, stores and prints."""
    args = arguments(doc)
    measured = measure(args)
    section = {**measured, "claims": judged(measured, args.seeds)}
    store(args, name, section)
    print(f"\n{tables(section)}")


# ---------------------------------------------------------------------------------------------- statistics and tables


def sign_test(differences):
    """(p, p the other way): exact and one-sided, for the claim that differences are positive. Ties are left out."""
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = wins + losses
    at_least = lambda count: sum(math.comb(n, k) for k in range(count, n + 1)) / 2**n
    return at_least(wins), at_least(losses)


def judge(statement, seeds, ours, theirs, unit="points"):
    """A statement "ours is larger" with its verdict. ours, theirs: a value for each seed."""
    p, p_other = sign_test([a - b for a, b in zip(ours, theirs)])
    verdict = "holds" if p < 0.05 else "does not hold" if p_other < 0.05 else "undecided"
    return {"statement": statement, "unit": unit, "seeds": list(seeds), "ours": ours, "theirs": theirs, "p": p,
            "p_other_way": p_other, "verdict": verdict}


def best_rate(points, within, target=None):
    """The point with the highest versatility among those at most `within` points of speciality below the target, which
    is the row's own highest by default."""
    target = target or max(column(points, "speciality"))
    return max((p for p in points if p["speciality"] >= target - within), key=lambda p: p["versatility"])


def column(rows, key):
    return [row[key] for row in rows]


def mean_and_spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def about(values, digits=1):
    """The mean, and the standard deviation where there are several."""
    values = list(values)
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def verdicts(claims):
    rows = []
    for claim in claims:
        digits = 2 if claim["unit"] == "gate" else 1
        seeds = ", ".join(f"{a:.{digits}f} / {b:.{digits}f}" for a, b in zip(claim["ours"], claim["theirs"]))
        rows.append([claim["statement"], f"**{claim['verdict']}**", f"{claim['p']:.3f}", f"{claim['p_other_way']:.3f}",
                     seeds])
    return markdown(["claim", "verdict", "p", "p, other way", "each seed"], rows)


def rates(grid, best):
    """The table of {row: points}, best[row] in bold."""
    text = lambda point: f"{point['lr']:g}: {point['speciality']:.1f} / {point['versatility']:.1f}"
    return markdown(["row", "rate: speciality / versatility"], [
        [name, ", ".join(f"**{text(p)}**" if p == best[name] else text(p) for p in row)] for name, row in grid.items()])
