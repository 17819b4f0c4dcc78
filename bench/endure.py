"""Kills a run at random moments, gives the same command after each, and holds the end against an undisturbed run.

    python -m bench.endure                     # multilora, csreft, cofitune with its search; 30 kills each
    python -m bench.endure --kills 5 multilora
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.flags import Parser, command_line
from model import UserError

COMMON = "--tasks currency --steps 60 --batch-size 8 --eval-limit 6 --log-every 3 --save-every 2"
COMMANDS = {"multilora": f"--method multilora --dropout 0.2 {COMMON}", "csreft": f"--method csreft {COMMON}",
            "cofitune": f"--method cofitune --importance-batches 2 --search-steps 6 {COMMON} --steps 20"}
TIMES = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_bytes")


def content(out):
    """What a finished run left: {"files": their names, and each file's bytes, or figures without times}"""
    without_times = lambda pairs: {key: value for key, value in pairs if key not in TIMES}
    figures = lambda text: json.loads(text, object_pairs_hook=without_times)
    return {"files": sorted(file.name for file in out.iterdir()),
            "adapter.safetensors": (out / "adapter.safetensors").read_bytes(),
            "metrics.jsonl": list(map(figures, (out / "metrics.jsonl").read_text().splitlines())),
            "results.json": figures((out / "results.json").read_text())}


def endure(flags, folder, kills, rng):
    """How many kills were made until the run was finished in spite of them; the last start is let through."""
    command = [sys.executable, "train.py", *flags.split(), "--out"]
    start = time.monotonic()
    subprocess.run([*command, folder / "whole"], check=True, stdout=subprocess.DEVNULL)
    whole, made, starts = time.monotonic() - start, 0, 0
    while made < kills and not (folder / "killed" / "results.json").exists():
        process = subprocess.Popen([*command, folder / "killed"], stdout=subprocess.DEVNULL)
        starts += 1
        try:
            process.wait(rng.uniform(0.3, 0.8) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            made += 1
        if process.wait() > 0:
            raise UserError(f"start {starts} ended with code {process.returncode}")
    subprocess.run([*command, folder / "killed"], check=True, stdout=subprocess.DEVNULL)
    ended, undisturbed = content(folder / "killed"), content(folder / "whole")
    if other := [name for name, value in undisturbed.items() if value != ended[name]]:
        raise UserError(f"after {made} kills the run ended otherwise than an undisturbed one: {', '.join(other)}")
    return made


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(COMMANDS)} (all)")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if wrong := set(args.methods) - COMMANDS.keys():
        raise UserError(f"unknown method {min(wrong)!r}; valid: {', '.join(COMMANDS)}")
    for name in args.methods or COMMANDS:
        rng, made = random.Random(args.seed), 0
        while made < args.kills:  # a run that is finished is begun again
            with tempfile.TemporaryDirectory() as folder:
                made += endure(COMMANDS[name], Path(folder), args.kills - made, rng)
        print(f"{name}: {made} kills, the same bytes every time", flush=True)


if __name__ == "__main__":
    command_line(main)
