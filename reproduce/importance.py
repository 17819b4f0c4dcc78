"""How CoFiTune's importance is spread over the units, and how stable it is.

    python -m reproduce.importance

z of each unit of the region (over the units of its module, before training), its mask 1 - I = 1 - |tanh z|, and how
alike two estimates are: of the same examples with other dropout, of two halves of the training data, of training data
and the general tasks'. Every flag of `train.py --method cofitune` is taken, `--importance-batches` among them.
"""

import statistics
import sys
from itertools import islice

import torch

import cofitune
import data
import train
from engine.flags import command_line
from model import Llama, UserError

REGION = ["--layers", "50%-100%", "--modules", "gate_proj,up_proj,down_proj"]  # what the default run's search chooses


def measure(argv=()):
    """{"units", "batches": numbers, "histogram": rows of (z from, share of the units in percent, their mean mask), each
    half wide and the outer ones open, "alike": {pair: figures}}. Raises UserError as train.py does for its flags."""
    config, method_config, _ = train.parse(["--method", "cofitune", *REGION, "--eval-split", "validation", *argv])
    if method_config.mask_on == "none":
        raise UserError("--mask-on none has no importance")
    suite, tokenizer = train.load_data(config)
    model = Llama.from_pretrained(config.base, *train.place(config)).requires_grad_(False)
    linears = cofitune.choose(model, method_config)[2]
    general = [example for task, examples in suite.tests.items() if suite.group[task] == "general"
               for example in examples]
    if not general:
        raise UserError("importance is compared with general tasks, and there are none: name some in --general-data")

    def scores(examples, seed=0):
        torch.manual_seed(seed)
        groups = data.draw(examples, config.batch_size * config.grad_accum, config.seed)
        steps = ([data.collate(part, tokenizer.pad_id).to(model.device)
                  for part in data.micro_batches(group, config.batch_size, model.device)] for group in groups)
        with model.autocast():
            return cofitune.unit_scores(model, linears, islice(steps, method_config.importance_batches),
                                        method_config.importance_dropout)

    whole, halves = scores(suite.train), [scores(suite.train[i::2]) for i in range(2)]
    z = torch.cat(list(whole.values()))
    mask, bins = 1 - z.tanh().abs(), (2 * z).floor().clamp(-6, 6) / 2
    histogram = [[low, 100 * (bins == low).float().mean().item(), mask[bins == low].mean().item()]
                 for low in bins.unique().tolist()]
    pairs = {"the same examples, other dropout": (whole, scores(suite.train, seed=1)),
             "two halves of the training data": halves,
             "training data, general tasks": (whole, scores(general))}
    return {"units": len(z), "batches": method_config.importance_batches, "histogram": histogram,
            "alike": {name: alike(*pair) for name, pair in pairs.items()}}


def alike(first, second):
    """Mean over modules: correlation of z and of I, and the share of the quarter with the largest I that is the same
    (0.25 for two random quarters)."""
    figures = []
    for a, b in zip(first.values(), second.values()):
        I, J = a.tanh().abs(), b.tanh().abs()
        size = max(1, len(a) // 4)
        same = set(I.topk(size).indices.tolist()) & set(J.topk(size).indices.tolist())
        figures.append([torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in ((a, b), (I, J))]
                       + [len(same) / size])
    return dict(zip(("z", "importance", "quarter"), map(statistics.mean, zip(*figures))))


def shown(found):
    lines = [f"{found['units']:,} units, {found['batches']} batches", f"{'z from':<8}{'units':>8}{'mask 1 - I':>12}"]
    for low, share, mask in found["histogram"]:
        lines.append(f"{low:<8g}{share:>6.1f} %{mask:>12.2f}  {'#' * round(share)}")
    lines.append(f"\n{'how alike':<34}{'r of z':>8}{'r of I':>8}{'same quarter':>14}")
    for name, figures in found["alike"].items():
        lines.append(f"{name:<34}{figures['z']:>8.2f}{figures['importance']:>8.2f}{figures['quarter']:>14.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line(lambda: print(shown(measure(sys.argv[1:]))))
