"""MultiLoRA's claim: several parallel modules, started at random, learn many tasks better than one LoRA of the same
total rank, because their update is spread over more directions.

    python -m reproduce.claims.multilora

The control: a flat spectrum is a sign of learning only if it is flatter than that of the random start. So the effective
rank is compared with LoRA's, and with that of MultiLoRA's own A and B before any step, every scale at one.
"""

import torch

import multilora
from engine.flags import command_line
from model import Llama
from reproduce.runner import ALL, NAMES, about, claim, column, judge, markdown, over_seeds, verdicts
from reproduce.spectra import changes, figures

# Total rank 12: MultiLoRA has three modules of rank 4, LoRA one of rank 12.
RUNS = {"sft": f"--method sft --lr 2e-3 {ALL}", "lora": f"--method lora --lr 4e-3 {ALL}",
        "multilora": f"--method multilora --lr 8e-3 {ALL}"}
RANK = 12  # as many singular values are looked at in each update


def untrained(seed):
    """The report of MultiLoRA's update where nothing is trained."""
    torch.manual_seed(seed)
    adapter = multilora.attach(Llama.from_pretrained("base"), multilora.Config())
    for linear in adapter.linears.values():
        linear.multilora.s.data.fill_(1.0)
    return adapter.report()


def measure(args):
    runs = over_seeds(RUNS, args)
    deltas = lambda run: changes(run["folder"])[0]
    spectra = {name: [figures(deltas(run), RANK, deltas(sft)) for run, sft in zip(row, runs["sft"])]
               for name, row in runs.items()}
    spectra["untrained"] = [untrained(seed) for seed in args.seeds]
    return {"accuracy": {name: column(row, "speciality") for name, row in runs.items()}, "spectra": spectra}


def judged(measured, seeds):
    accuracy = measured["accuracy"]
    rank = {name: column(row, "effective_rank") for name, row in measured["spectra"].items()}
    return [judge("accuracy on the new tasks: MultiLoRA above LoRA at equal total rank", seeds,
                  accuracy["multilora"], accuracy["lora"]),
            judge("ΔW's effective rank: MultiLoRA's above LoRA's", seeds,
                  rank["multilora"], rank["lora"], "directions"),
            judge("ΔW's effective rank: MultiLoRA's above that of its untrained start, s = 1", seeds,
                  rank["multilora"], rank["untrained"], "directions")]


def tables(section):
    rows = []
    for name, spectra in section["spectra"].items():
        accuracy, shared = section["accuracy"].get(name), [row.get("similarity_to_sft") for row in spectra]
        rows.append([NAMES.get(name, "MultiLoRA's untrained start"), about(accuracy) if accuracy else "",
                     about(column(spectra, "first_value_share"), 3), about(column(spectra, "effective_rank")),
                     about(shared, 3) if name in ("lora", "multilora") else ""])
    return verdicts(section["claims"]) + "\n\n" + markdown(
        ["first 12 singular values", "new tasks", "first value's share", "effective rank", "leading subspace in SFT's"],
        rows)


if __name__ == "__main__":
    command_line(lambda: claim(__doc__, "multilora", measure, judged, tables))
