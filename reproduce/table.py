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
PAIR = "{:.1f} / {:.1f}"


def column(rows, key):
    return [row[key] for row in rows]


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values):
    return [statistics.mean(values), spread(values)]


def harmonic_mean(point):
    """H of a row's two scores."""
    s, v = point["speciality"], point["versatility"]
    return 2 * s * v / max(1e-9, s + v)


def about(values, digits=1):
    return "{:.{digits}f} ± {:.{digits}f}".format(*mean_and_spread(list(values)), digits=digits)


def plain(value):
    """A rate as people write it: 0.002 -> 2e-3."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


# ---------------------------------------------------------------------------- tables of a section of compare.json


def comparison(section):
    return markdown(["method", "rate", "trained / base", "speciality", "its band", "versatility", "its band", "s",
                     "MiB"], [
        [f"`{name}`", plain(row["lr"]), f"{row['share']:.1f} %",
         "**{:.1f}** ± {:.1f}".format(*row["speciality"]), "{:.1f} to {:.1f}".format(*row["band"]["speciality"]),
         "{:.1f} ± {:.1f}".format(*row["versatility"]), "{:.1f} to {:.1f}".format(*row["band"]["versatility"]),
         f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**20:.0f}"] for name, row in section["rows"].items()])


def tasks(section):
    rows = {name: row["tasks"] for name, row in section["rows"].items()}
    names = list(next(iter(rows.values())))
    return markdown(["method", *names], [
        [f"`{name}`", *("{:.1f} ± {:.1f}".format(*row[task]) for task in names)] for name, row in rows.items()])


def tuning(section):
    def cell(point, best):
        text = f"{plain(point['lr'])}: " + PAIR.format(point["speciality"], point["versatility"])
        return f"**{text}**" if point["lr"] == best else text

    return markdown(["method", "rate: speciality / versatility"], [
        [f"`{name}`", ", ".join(cell(point, section["best"][name]) for point in row)]
        for name, row in section["grid"].items()])


def claims(section):
    rows = []
    for claim in section["claims"]:
        digits = 2 if claim["unit"] in ("share", "gate") else 1
        seeds = ", ".join(f"{a:.{digits}f} / {b:.{digits}f}" for a, b in zip(claim["ours"], claim["theirs"]))
        fair = [PAIR.format(*map(statistics.mean, claim["speciality"]))] if claim["speciality"] else []
        rows.append([claim["statement"], f"**{claim['verdict']}**", f"{claim['p']:.3f}", f"{claim['p_other_way']:.3f}",
                     seeds, *fair])
    head, tried = ["claim", "verdict", "p", "p, other way", "each seed", "mean speciality"], section["tried"]
    return (markdown(head[: len(rows[0])], rows)
            + f"\n\nProtocols tried for this claim: {len(tried)}; judged: {tried[-1]}.")


def spectra(section):
    titles = {"sft": "SFT", "multilora": "MultiLoRA, n 3, r 4", "lora": "LoRA, r 12",
              "lora-equal-parameters": "LoRA, r 14"}
    cell = lambda name, key, digits: about(column(section["spectra"][name], key), digits)
    return markdown(["first 12 singular values", "trained", "new tasks", "first value's share", "effective rank",
                     "leading subspace in SFT's"], [
        [title, f"{section['trainable_parameters'][name]:,}", about(section["accuracy"][name]),
         cell(name, "first_value_share", 3), cell(name, "effective_rank", 1),
         "" if name == "sft" else cell(name, "similarity_to_sft", 3)] for name, title in titles.items()])


def starts(section):
    titles = {"multilora": "MultiLoRA", "scales-alone": "trained scales, `A` and `B` as they start",
              "one-module": "one module of rank 12, with scales", "lora-uniform-b": "LoRA with `B` uniform"}
    return markdown(["update", "new tasks", "first value's share", "effective rank"], [
        [title, about(section["accuracy"][name]), about(column(section["spectra"][name], "first_value_share"), 3),
         about(column(section["spectra"][name], "effective_rank"))] for name, title in titles.items()])


def interference(section):
    titles = {"csreft": "CS-ReFT", "loreft": "LoReFT", "lora": "LoRA"}
    of = {name: section["interference"][name] for name in titles}  # {name: [{task: [alone, together]} by seed]}

    def row(title, names):
        means = [[statistics.mean(side) for side in zip(*(seed[name] for seed in of[method] for name in names))]
                 for method in titles]
        return [title, *(f"{alone:.1f} − {together:.1f} = {alone - together:+.1f}" for alone, together in means)]

    names = list(of["csreft"][0])
    return markdown(["alone − together", *titles.values()],
                    [*(row(name, [name]) for name in names), row("**mean**", names)])


def front(section):
    titles = {"sft": "SFT", "coarse": "CoFiTune, coarse only", "cofitune": "CoFiTune", "wise-ft": "Wise-FT",
              "sft-l2": "SFT with L2 to the base", "lora": "LoRA", "random-mask": "CoFiTune, random mask",
              "sft-same-rate": "SFT at CoFiTune's rate"}
    rows = []
    for name, scores in ((name, section["scores"][name]) for name in titles if name in section["scores"]):
        point = section["best"].get(name)
        rate = plain(point["lr"] if point else float(section["flags"][name].split("--lr ")[1].split()[0]))
        weight = f", weight {point['weight']:g}" if point and "weight" in point else ""
        rows.append([titles[name], rate + weight,
                     PAIR.format(point["speciality"], point["versatility"]) if point else "",
                     about(column(scores, "speciality")), about(column(scores, "versatility"))])
    return markdown(["", "rate", "validation, seed 0", "speciality, test", "versatility, test"], rows)


def scores(section):
    """With the sum of both scores (Uni), and H."""
    rows = []
    for name, points in section["scores"].items():
        pairs = [(p["speciality"], p["versatility"]) for p in points]
        rows.append([name, *map(about, (*zip(*pairs), [s + v for s, v in pairs], map(harmonic_mean, points))),
                     ", ".join(PAIR.format(*pair) for pair in pairs)])
    return markdown(["row", "speciality", "versatility", "Uni", "H", "each seed"], rows)


def teaching(method):
    def table(section):
        digits = {"speciality": 1, "versatility": 1, "effective_rank": 1, "largest_overlap": 2, "mean_gate": 2}
        rows = section["tables"][method]
        keys = [key for key in digits if key in next(iter(rows.values()))]
        return markdown([method, *(key.replace("_", " ") for key in keys)],
                        [[name, *(f"{row[key]:.{digits[key]}f}" for key in keys)] for name, row in rows.items()])
    return table


def importance(section):
    return markdown(["two estimates of the importance", "r of z", "r of I", "same units in the upper quarter"],
                    [[name, *(f"{figures[key]:.2f}" for key in ("z", "importance", "quarter"))]
                     for name, figures in section["importance"]["alike"].items()])


# {name in README: (section of compare.json, its table)}
TABLES = {"comparison": ("compare", comparison), "tasks": ("compare", tasks), "tuning": ("tune", tuning),
          **{f"claims-{name}": (name, claims) for name in ("multilora", "multilora-hard", "csreft", "cofitune",
                                                         "spectrum", "search")},
          "spectra": ("multilora", spectra), "interference": ("csreft", interference), "front": ("cofitune", front),
          "starts": ("spectrum", starts), "search": ("search", scores), "importance": ("teach", importance),
          **{f"teaching-{method}": ("teach", teaching(method)) for method in ("multilora", "csreft")}}
UNPUBLISHED = {"quick": comparison, "controls": scores}


def shown(name, section):
    """Every table of a section of compare.json."""
    tables = [table for of, table in TABLES.values() if of == name] or [UNPUBLISHED[name]]
    return "\n\n".join(table(section) for table in tables)


def rewritten(text, everything):
    """The README with the tables between its marks made anew. KeyError for a section that is not in compare.json."""
    def fresh(mark):
        section, table = TABLES[mark[2]]
        return f"{mark[1]}\n{table(everything[section])}\n\n{mark[3]}"

    return MARK.sub(fresh, text)


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
