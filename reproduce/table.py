"""Rewrites the tables between the marks of `reproduce/README.md` from `results/compare.json`.

    python -m reproduce.table
"""

import re
import statistics
from pathlib import Path

from engine.flags import Parser, command_line
from model import UserError, read_json, written

HERE = Path(__file__).resolve().parent
STORED, README = HERE / "results" / "compare.json", HERE / "README.md"
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:(?!<!-- table).)*?(<!-- end of table -->)", re.S)


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def deviation(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def plain(value):
    """A rate as people write it: 0.002 -> 2e-3."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


# ---------------------------------------------------------------------------------------------- tables of compare.json


def comparison(everything):
    rows = []
    for name, row in everything["compare"]["rows"].items():
        low, high = zip(row["band"]["speciality"], row["band"]["versatility"])
        rows.append([f"`{name}`", plain(row["lr"]), f"{row['share']:.1f} %",
                     "**{:.1f}** ± {:.1f}".format(*row["speciality"]), f"{low[0]:.1f} to {high[0]:.1f}",
                     "{:.1f} ± {:.1f}".format(*row["versatility"]), f"{low[1]:.1f} to {high[1]:.1f}",
                     f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**20:.0f}"])
    return markdown(["method", "rate", "trained / base", "speciality", "its band", "versatility", "its band", "s",
                     "MiB"], rows)


def tasks(everything):
    rows = everything["compare"]["rows"]
    names = list(next(iter(rows.values()))["tasks"])
    return markdown(["method", *names],
                    [[f"`{name}`", *("{:.1f} ± {:.1f}".format(*row["tasks"][task]) for task in names)]
                     for name, row in rows.items()])


def tuning(everything):
    table = everything["tune"]

    def cell(point, best):
        text = f"{plain(point['lr'])}: {point['speciality']:.1f} / {point['versatility']:.1f}"
        return f"**{text}**" if point["lr"] == best else text

    return markdown(["method", "rate: speciality / versatility"], [
        [f"`{name}`", ", ".join(cell(point, table["best"][name]) for point in row)]
        for name, row in table["grid"].items()])


def claims(name):
    def table(everything):
        def values(claim):
            digits = 2 if claim["unit"] in ("share", "gate") else 1
            return ", ".join(f"{a:.{digits}f} / {b:.{digits}f}" for a, b in zip(claim["ours"], claim["theirs"]))

        rows = [[claim["statement"], f"**{claim['verdict']}**", f"{claim['p']:.3f}", f"{claim['p_other_way']:.3f}",
                 values(claim)] for claim in everything[name]["claims"]]
        specialities = [claim["speciality"] for claim in everything[name]["claims"]]
        if any(specialities):
            for row, pair in zip(rows, specialities):
                row.append("{:.1f} / {:.1f}".format(*map(statistics.mean, pair)))
        head = ["claim", "verdict", "p", "p, other way", "each seed"]
        tried = everything[name]["tried"]
        return (markdown(head + ["mean speciality"] * any(specialities), rows)
                + f"\n\nProtocols tried for this claim: {len(tried)}; judged: {tried[-1]}.")

    return table


def spectra(everything):
    section = everything["multilora"]
    titles = {"sft": "SFT", "multilora": "MultiLoRA, n 3, r 4", "lora": "LoRA, r 12",
              "lora-equal-parameters": "LoRA, r 14"}
    column = lambda name, key, digits: (f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
                                        if len(values := [row[key] for row in section["spectra"][name]]) > 1
                                        else f"{values[0]:.{digits}f}")
    return markdown(["first 12 singular values", "trained", "new tasks", "first value's share", "effective rank",
                     "leading subspace in SFT's"], [
        [title, f"{section['trainable_parameters'][name]:,}", deviation(section["accuracy"][name]),
         column(name, "first_value_share", 3), column(name, "effective_rank", 1),
         "" if name == "sft" else column(name, "similarity_to_sft", 3)] for name, title in titles.items()])


def interference(everything):
    section = everything["csreft"]["interference"]
    names = list(next(iter(section.values()))[0])
    cell = lambda pairs: "{:.1f} − {:.1f} = {:+.1f}".format(
        *(statistics.mean(column) for column in zip(*[(a, b, a - b) for a, b in pairs])))
    titles = {"csreft": "CS-ReFT", "loreft": "LoReFT", "lora": "LoRA"}
    rows = [[task, *(cell([row[task] for row in section[name]]) for name in titles)] for task in names]
    rows.append(["**mean**", *(cell([pair for row in section[name] for pair in row.values()]) for name in titles)])
    return markdown(["alone − together", *titles.values()], rows)


def front(everything):
    section = everything["cofitune"]
    titles = {"sft": "SFT", "coarse": "CoFiTune, coarse only", "cofitune": "CoFiTune", "wise-ft": "Wise-FT",
              "sft-l2": "SFT with L2 to the base", "lora": "LoRA", "random-mask": "CoFiTune, random mask",
              "sft-same-rate": "SFT at CoFiTune's rate"}
    rows = []
    for name, title in titles.items():
        if name not in section["scores"]:
            continue
        point = section["best"].get(name)
        where = section["flags"].get(name, "").split()
        rate = plain(float(where[where.index("--lr") + 1]) if where else point["lr"])
        chosen = f"{point['speciality']:.1f} / {point['versatility']:.1f}" if point else ""
        scores = section["scores"][name]
        weight = f", weight {point['weight']:g}" if point and "weight" in point else ""
        rows.append([title, rate + weight, chosen, deviation([s["speciality"] for s in scores]),
                     deviation([s["versatility"] for s in scores])])
    return markdown(["", "rate", "validation, seed 0", "speciality, test", "versatility, test"], rows)


TABLES = {"comparison": comparison, "tasks": tasks, "tuning": tuning, "spectra": spectra,
          "interference": interference, "front": front,
          **{f"claims-{name}": claims(name) for name in ("multilora", "multilora-hard", "csreft", "cofitune")}}


def rewritten(text, everything):
    """The README with the tables between its marks made anew. KeyError for a section that is not in compare.json."""
    return MARK.sub(lambda m: m[1] + "\n" + TABLES[m[2]](everything) + "\n\n" + m[3], text)


def main():
    Parser(description=__doc__.split("\n\n")[0]).parse_args()
    everything = read_json(STORED)
    try:
        text = rewritten(README.read_text(encoding="utf-8"), everything)
    except KeyError as error:
        raise UserError(f"{STORED} has no {error}; {README.name} is as it was") from None
    with written(README) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
