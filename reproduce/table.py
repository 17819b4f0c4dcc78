"""Prints finished runs as a Markdown table, one row for each name: the mean over seeds, and every seed.

    python reproduce/table.py out/controls        # folders NAME-SEED with a results.json each
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def rows(folder):
    """{name: [(seed, speciality, versatility)]} of the runs below a folder, in the order they were made."""
    found = defaultdict(list)
    for file in sorted(Path(folder).glob("*/results.json"), key=lambda file: file.stat().st_mtime):
        results = json.loads(file.read_text())
        name = file.parent.name.rsplit("-", 1)[0]
        found[name].append((results["seed"], results["speciality"], results["versatility"]))
    return found


def main():
    if len(sys.argv) != 2 or not rows(sys.argv[1]):
        sys.exit("table.py: error: give a folder that holds finished runs NAME-SEED, such as out/controls")
    print("| run | speciality | versatility | Uni | seeds |\n|---|---|---|---|---|")
    for name, runs in rows(sys.argv[1]).items():
        mean = [sum(column) / len(runs) for column in list(zip(*runs))[1:]]
        seeds = ", ".join(f"{s:.1f} / {v:.1f}" for _, s, v in sorted(runs))
        print(f"| {name} | {mean[0]:.1f} | {mean[1]:.1f} | {sum(mean):.1f} | {seeds} |")


if __name__ == "__main__":
    main()
