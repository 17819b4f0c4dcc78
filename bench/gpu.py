"""Trains a model of a published size, with random weights, for a few steps with each method: tokens/s and peak memory.

    python -m bench.gpu                                  # Llama-2-7B's shape, on the GPU; 14 GB of disk
    python -m bench.gpu --layers 1 --device cpu          # one layer of it, to see that the commands run

Makes the checkpoint in a temporary folder (bfloat16 weights, the built-in base's tokenizer), then runs train.py as a
user would, on the built-in suite.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from engine.flags import Parser, command_line
from model import Llama
from reproduce.count import SHAPES

HERE = Path(__file__).resolve().parent.parent
METHODS = {"multilora": ["--modules", "3", "--rank", "32"], "csreft": ["--layers", "3,9,18,24", "--positions", "f5+l5"],
           "cofitune": ["--layers", "25%-50%"]}


def make(folder, shape, device):
    """Writes a checkpoint of this shape with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Llama(shape)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.0, 0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / "base" / name, folder / name)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    shape, methods = SHAPES[args.shape], METHODS
    if args.layers:  # the papers' layers may not be there
        shape = replace(shape, num_hidden_layers=args.layers)
        methods = METHODS | {"csreft": ["--positions", "f5+l5"], "cofitune": ["--layers", "all"]}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make(base, shape, args.device)
        torch.cuda.empty_cache()  # the runs below are processes of their own
        card = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        print(f"{args.shape}, {shape.num_hidden_layers} layers, {card}, batches of 16")
        for method, flags in methods.items():
            out = Path(folder) / method
            done = subprocess.run(
                [sys.executable, "train.py", "--method", method, *flags, "--base", base, "--device", args.device,
                 "--dtype", "bfloat16", "--lr", "1e-5", "--steps", str(args.steps), "--batch-size", "16",
                 "--eval-limit", "2", "--out", out],
                cwd=HERE, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            results = json.loads((out / "results.json").read_text())
            print(f"{method:<10}{results['trainable_parameters']:>14,} trained"
                  f"{last['tokens_per_second']:>10,.0f} tokens/s"
                  f"{results['peak_memory_bytes'] / 2**30:>8.1f} GiB", flush=True)


if __name__ == "__main__":
    command_line(main)
