"""Wise-FT (Wortsman et al., arXiv 2109.01903): θ_base + w (θ_sft - θ_base), every w scored from one SFT run.

    python -m reproduce.wise out/sft

The scores are printed, and kept as wise.json in the run's folder.
"""

import time
from pathlib import Path

import torch

import data
from engine.flags import Parser, command_line
from model import Llama, UserError, write_json
from train import Config, load_data, load_run

WEIGHTS = tuple(w / 10 for w in range(1, 10))  # share of the fine-tuned weights; 0 is the base, 1 is SFT


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder of sft or cofitune")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    args = parser.parse_args()
    start, (model, adapter, _, saved) = time.perf_counter(), load_run(args.run)
    if not hasattr(adapter, "trained"):
        raise UserError(f"{args.run} is a run of {saved['method']!r}, expected sft or cofitune")
    config = Config(**saved["settings"])
    tuned = {name: p.detach().clone() for name, p in adapter.trained.items()}
    base = Llama.from_pretrained(config.base).state_dict()
    (suite, tokenizer), points = load_data(config, train=False), []
    for weight in args.weights:
        with torch.no_grad():
            for name, p in adapter.trained.items():
                p.copy_(torch.lerp(base[name], tuned[name], weight))
        speciality, versatility = suite.means(data.evaluate(model, suite, tokenizer, config.batch_size))
        points.append({"weight": weight, "speciality": speciality, "versatility": versatility})
        print("weight {weight:g}: speciality {speciality:.1f}, versatility {versatility:.1f}".format(**points[-1]),
              flush=True)
    write_json(args.run / "wise.json", {"points": points, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    command_line(main)
