"""Peak memory of training on a 1B shape, beside transformers and peft.

    pip install -r bench/requirements.txt
    python -m bench.memory

A random Llama of Llama 3.2 1B's shape (a vocabulary of 128,256, tied), float32, written to a temporary folder (5 GB).
Each measurement is a fresh process on the CPU: loading, then one step of loss, backward and AdamW on 2 examples of 256
tokens, labels on the last quarter; MultiLoRA (n = 3, r = 4) against peft's LoRA of rank 12 on the same layers. Peaks
are the processes' largest resident sizes, without what importing takes.
"""

import os
import tempfile
from pathlib import Path

import torch

from bench.load import fresh
from bench.speed import ours, theirs
from engine.flags import Parser, command_line
from engine.folder import peak_memory
from model import Llama, LlamaConfig

SHAPE = LlamaConfig(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True)
ROWS, LENGTH = 2, 256


def make(folder):
    """Writes the model; returns the bytes of its weights."""
    model = Llama(SHAPE)
    model.init_weights(seed=0)
    model.save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.parameters())


def train(who, method, folder):
    """How far loading and a step make this process's peak grow, in bytes."""
    peak = lambda: peak_memory(torch.device("cpu"))
    if who == "theirs":
        import peft  # noqa: F401
        import transformers  # noqa: F401
    before = peak()
    ids = torch.randint(3, SHAPE.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - LENGTH // 4, -100)
    step, _ = {"ours": ours, "theirs": theirs}[who](method, folder, ids, labels)
    step()
    return peak() - before


def main():
    Parser(description=__doc__.split("\n\n")[0]).parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        weights = fresh(make, Path(folder))
        print(f"{weights / 1e9:.2f} GB of weights; peak above importing, GB")
        other, mine = (fresh(train, *who, Path(folder)) for who in (("theirs", "lora"), ("ours", "multilora")))
        for title, peak in (("transformers and peft", other), ("multilora", mine)):
            print(f"{title:<24}{peak / 1e9:>8.2f}{peak / other:>8.2f}")


if __name__ == "__main__":
    command_line(main)
