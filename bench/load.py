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

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.flags import Parser, command_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak():
    """Largest resident memory of this process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(folder):
    """Writes the model once for each dtype; returns the bytes of its weights in float32."""
    from model import Llama, LlamaConfig

    model = Llama(LlamaConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=5,
                              num_attention_heads=16, num_key_value_heads=16))
    model.init_weights(seed=0)
    for name, dtype in DTYPES.items():
        model.to(dtype).save_pretrained(folder / name)
    return 4 * sum(p.numel() for p in model.parameters())


def load(who, folder):
    """Loads in this process, and prints how far the peak grew, in bytes, and the seconds until the first logits."""
    before = peak()
    if who == "ours":
        from model import Llama as source
    else:
        from transformers import LlamaForCausalLM as source
    start = time.perf_counter()
    model = source.from_pretrained(folder, dtype=torch.float32)
    loaded = peak() - before
    with torch.no_grad():
        model(torch.arange(16)[None])
    print(json.dumps({"seconds": time.perf_counter() - start, "loaded": loaded, "logits": peak() - before}))


def run(*args):
    """What a fresh process of this file prints last."""
    done = subprocess.run([sys.executable, "-m", "bench.load", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    with tempfile.TemporaryDirectory() as folder:
        weights = run("make", folder)
        print(f"{weights / 1e9:.2f} GB of weights in float32, {torch.get_num_threads()} threads")
        print(f"{'file':<10}{'':<13}{'loaded':>8}{'logits':>8}{'seconds':>9}{'of transformers':>17}")
        for name in DTYPES:
            runs = [(who, run(who, Path(folder) / name)) for _ in range(5) for who in ("ours", "transformers")]
            seconds = {who: statistics.median(r["seconds"] for w, r in runs if w == who) for who, _ in runs}
            for who in seconds:
                loaded, logits = (max(r[key] for w, r in runs if w == who) / weights for key in ("loaded", "logits"))
                print(f"{name:<10}{who:<13}{loaded:>8.2f}{logits:>8.2f}{seconds[who]:>9.2f}"
                      f"{seconds[who] / seconds['transformers']:>17.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        print(make(Path(sys.argv[2])))
    elif len(sys.argv) == 3:
        load(*sys.argv[1:])
    else:
        Parser(description=__doc__.split("\n\n")[0]).parse_args()
        command_line(main)
