"""How far a program has come, for a person and for a file."""

import json
import shutil
import sys
import time

from model import written


def progress(items, what, total):
    """The items, one by one. After a second a line on a terminal says how many are done, and when all will be."""
    start = shown = time.perf_counter()
    try:
        for done, item in enumerate(items):
            now = time.perf_counter()
            if sys.stdout.isatty() and now - shown > 1:
                left = f"/{total}  ETA {clock((now - start) / done * (total - done))}" if done else ""
                print(f"\r\033[K{what} {done}{left}", end="", flush=True)
                shown = now
            yield item
    finally:  # also where the caller stops early
        if shown != start:
            print("\r\033[K", end="", flush=True)


class Log:
    """Writes metrics.jsonl and shows progress: in place on a terminal, one line in ten records elsewhere (none where it
    is quiet). Records after `step` are cut off: they will be made again."""

    def __init__(self, path, step=0, quiet=False):
        old = path.read_text(encoding="utf-8").splitlines(keepends=True) if step else []
        old = [line for line in old if line.endswith("\n") and json.loads(line)["step"] <= step]
        with written(path) as part:
            part.write_text("".join(old), encoding="utf-8")
        self.losses = [record["loss"] for record in map(json.loads, old) if "loss" in record]
        self.path, self.live, self.quiet, self.count, self.validation = path, sys.stdout.isatty(), quiet, 0, ""

    def __call__(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
        if "validation_loss" in record:  # shown with the next line
            self.validation = "  validation {validation_loss:.4f}".format(**record)
            return
        self.losses.append(record["loss"])
        last = record["step"] == record["steps"]
        self.count += 1
        line = "step {step:>5}/{steps}  ETA {}  loss {loss:.4f}{}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s"
        line = line.format(clock(record["eta_seconds"]), self.validation, **record)
        if self.live:
            room = None if last else shutil.get_terminal_size().columns - 1  # a line that wraps cannot be cleared
            print("\r\033[K" + ("" if last and self.quiet else line[:room]), end="\n" * (last and not self.quiet),
                  flush=True)
        elif not self.quiet and (last or self.count % 10 == 1):
            print(line, flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
