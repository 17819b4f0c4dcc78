"""Peak memory and time of loading a checkpoint, beside transformers.

    pip install -r bench/requirements.txt
    python -m bench.load

Makes a random Llama whose weights take 1 GB in float32 and writes it twice, as float32 and as bfloat16, in a temporary
folder (1.5 GB). Each measurement is a fresh process that loads one of the two files as float32:

    loaded   growth of the peak resident memory over that just after `import torch`, divided by the weights' bytes in
             float32. Pages of the mapped file count, but only once they are read:
    logits   the same after the logits of 16 tokens, which read all but the embedding; wanted: at most 1.15.
    seconds  from the call of from_pretrained to those logits, without imports; median of five runs, taken in turns with
             transformers'; wanted: at most 1.2 times its median.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from engine.flags import Parser, command_line
from engine.folder import peak_memory
from model import Llama, LlamaConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(folder):
    """Writes the model once for each dtype; returns the bytes of its weights in float32."""
    model = Llama(LlamaConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=5,
                              num_attention_heads=16, num_key_value_heads=16))
    model.init_weights(seed=0)
    for name, dtype in DTYPES.items():
        model.to(dtype).save_pretrained(folder / name)
    return 4 * sum(p.numel() for p in model.parameters())


def load(who, folder):
    """How far loading in this process makes its peak grow, in bytes, and the seconds until the first logits."""
    peak = lambda: peak_memory(torch.device("cpu"))
    before = peak()
    if who == "ours":
        source = Llama
    else:
        from transformers import LlamaForCausalLM as source
    start = time.perf_counter()
    model = source.from_pretrained(folder, dtype=torch.float32)
    loaded = peak() - before
    with torch.no_grad():
        model(torch.arange(16)[None])
    return {"seconds": time.perf_counter() - start, "loaded": loaded, "logits": peak() - before}


def fresh(function, *args):
    """A call in a process of its own, whose peak begins with the size of this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main():
    Parser(description=__doc__.split("\n\n")[0]).parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        weights = fresh(make, Path(folder))
        print(f"{weights / 1e9:.2f} GB of weights in float32, {torch.get_num_threads()} threads")
        print(f"{'file':<10}{'':<13}{'loaded':>8}{'logits':>8}{'seconds':>9}{'of transformers':>17}")
        for name in DTYPES:
            runs = {"ours": [], "transformers": []}
            for who in [*runs] * 5:
                runs[who].append(fresh(load, who, Path(folder) / name))
            seconds = {who: statistics.median(r["seconds"] for r in made) for who, made in runs.items()}
            for who, made in runs.items():
                loaded, logits = (max(r[key] for r in made) / weights for key in ("loaded", "logits"))
                print(f"{name:<10}{who:<13}{loaded:>8.2f}{logits:>8.2f}{seconds[who]:>9.2f}"
                      f"{seconds[who] / seconds['transformers']:>17.2f}", flush=True)


if __name__ == "__main__":
    command_line(main)
