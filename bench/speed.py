"""Training steps, their memory, generation and loading, beside transformers and peft and the bare matrix products.

    pip install -r bench/requirements.txt
    python -m bench.speed --shape base 512
    python -m bench.speed --shape 7b --device cuda --dtype bfloat16      # 14 GB of disk

A step is train.py's: loss, backward, clipping and AdamW, on random weights and examples of one length with labels on
their last part. Theirs has a LoRA of rank 12 on every linear layer, MultiLoRA's total rank; beside sft it trains
everything. The products are those of the step's linear layers, forward and backward. Memory is what loading and a step
add to the peak of a fresh process. Ratios are by ours (above 1 ours is faster or smaller), medians over rounds.
"""

import gc
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from statistics import median

import torch

import data
import train
from engine.flags import Parser, command_line
from engine.folder import peak_memory
from model import Adapter, Llama, LlamaConfig
from tools.pretrain import init_weights

try:
    import peft
    import transformers
    transformers.utils.logging.disable_progress_bar()
except ImportError:
    peft = None

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)  # of 135M parameters
# {name: (configuration, examples, tokens of each, labelled ones of them)}
SHAPES = {"base": (LlamaConfig.from_pretrained(train.HERE / "base"), 48, 43, 10),
          "512": (LlamaConfig(32000, 512, 1376, 8, 8), 8, 160, 40),
          "135m": (SMOLLM2, 8, 128, 38), "135m-all": (SMOLLM2, 8, 128, 128), "135m-long": (SMOLLM2, 2, 512, 154),
          "1b": (LlamaConfig(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True), 2, 256, 64),  # Llama-3.2-1B
          "7b": (LlamaConfig(32000, 4096, 11008, 32, 32), 16, 64, 16)}  # Llama-2-7B
METHODS = ("multilora", "lora", "sft", "csreft")


def make(shape, folder, dtype):
    """Writes a checkpoint of this shape; returns the encoded examples."""
    config, B, T, labelled = SHAPES[shape]
    with torch.device("meta"):
        model = Llama(replace(config, eos_token_id=None)).to(dtype)
    init_weights(model.to_empty(device="cpu").tie_weights(), seed=0)
    model.save_pretrained(folder)
    cut, rows = T - labelled, torch.randint(3, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    return [data.Encoded(ids, [-100] * cut + ids[cut:], cut, 0) for ids in rows.tolist()]


def ours(method, case):
    """(the model, its adapter, a function for the gradients). case: the flags, and the shape's folder and examples."""
    model = Llama.from_pretrained(case.folder, case.device, case.dtype).train()
    if case.compile:
        train.compile_layers(model.model)
    adapter = train.start_adapter(model, *train.method_of(method))
    return model, adapter, lambda: train.backward(model, adapter, [case.examples], 0)


def theirs(method, case):
    """The same of transformers, with peft's LoRA but for sft. What is trained is float32, as ours is."""
    dtype = torch.float32 if method == "sft" else case.dtype
    model = transformers.LlamaForCausalLM.from_pretrained(case.folder, dtype=dtype).to(case.device).train()
    if method != "sft":
        model = peft.get_peft_model(model, peft.LoraConfig(r=12, lora_alpha=24, target_modules="all-linear"))
    batch = data.collate(case.examples, 0).to(case.device)

    def backward():
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            model(input_ids=batch.ids, labels=batch.labels).loss.backward()

    return model, Adapter(model), backward


def training(who, method, case):
    """(a step of training, the model)"""
    model, adapter, backward = who(method, case)
    optimizer = adapter.optimizer(1e-4, 0.0)

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()

    return step, model


def products(model, case, everything):
    """The products of a step alone; everything: those of the weights' gradients too."""
    tokens, labelled = (sum(x != -100 for e in case.examples for x in getattr(e, of)) for of in ("ids", "labels"))
    weights = [(labelled if name == "lm_head.weight" else tokens, p.to(case.dtype))
               for name, p in model.state_dict().items() if name.endswith(("_proj.weight", "lm_head.weight"))]
    random = cache(lambda *shape: torch.randn(shape, device=case.device, dtype=case.dtype))

    def step():
        for n, w in weights:
            x, g = random(n, w.shape[1]), random(n, w.shape[0])
            x @ w.T, g @ w, g.T @ x if everything else None

    return step


def generation(who, case):
    """64 greedy tokens behind eight prompts of 32."""
    ids = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    if who is ours:
        return partial(Llama.from_pretrained(case.folder, case.device, case.dtype).generate, ids.tolist(), 64)
    model, ids = transformers.LlamaForCausalLM.from_pretrained(case.folder, dtype=case.dtype), ids.to(case.device)
    return partial(model.to(case.device).eval().generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                   do_sample=False, eos_token_id=None, pad_token_id=0)


def loading(who, case):
    """From the folder to the first logits."""
    ids = torch.tensor([[3, 4, 5]], device=case.device)
    if who is ours:
        return torch.no_grad()(lambda: Llama.from_pretrained(case.folder, case.device, case.dtype)(ids))
    read = partial(transformers.LlamaForCausalLM.from_pretrained, case.folder, dtype=case.dtype)
    return torch.no_grad()(lambda: read().to(case.device)(ids))


def added_memory(who, method, case):
    """Bytes that loading and a step add to this process's peak."""
    before = peak_memory(case.device)
    training(who, method, case)[0]()
    return peak_memory(case.device) - before


def in_turns(functions, case):
    """[seconds in each round] for each function. The first round is not counted."""
    seconds, wait = [[] for _ in functions], torch.cuda.synchronize if case.device.type == "cuda" else lambda: None
    for _ in range(1 + case.rounds):
        for taken, function in zip(seconds, functions):
            wait()
            start = time.perf_counter()
            function()
            wait()
            taken.append(time.perf_counter() - start)
    return [taken[1:] for taken in seconds]


OTHERS = {"generate": generation, "load": loading}


def measure(what, case, sides):
    """The columns of a row: of training with a method, of generation or of loading."""
    peaks = []
    if what not in METHODS:
        seconds = in_turns([OTHERS[what](who, case) for who in sides], case)
    else:
        for who in sides:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                peaks.append(pool.submit(added_memory, who, what, case).result())
        steps, models = zip(*(training(who, what, case) for who in sides))
        seconds = in_turns([*steps, products(models[0], case, what == "sft")], case)
    ratios = [f"{median(b / a for a, b in zip(seconds[0], row)):.2f}" for row in seconds[1:]]
    return [f"{1e3 * median(seconds[0]):,.0f} ms", *[""] * (2 - len(sides)), *ratios, *[""] * (not peaks),
            *(f"{peak / 2**30:.2f} GiB" for peak in peaks[:1]), *(f"{peak / peaks[0]:.2f}" for peak in peaks[1:])]


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["base"], help="of the model (base)")
    parser.add_argument("--rows", nargs="+", choices=(*METHODS, *OTHERS), default=(*METHODS, *OTHERS))
    parser.add_argument("--device", default="cpu", help="as in train.py, and so is --dtype (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7, help="of which a ratio is the median (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile our layers, as train.py --compile does")
    case = parser.parse_args()
    case.device, case.dtype = train.device_and_dtype(case)
    sides = (ours, theirs) if peft else (ours,)
    if not peft:
        print("theirs is left out: transformers and peft are not installed (pip install -r bench/requirements.txt)")
    line = lambda title, cells: print(f"{title:<20}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    line(f"{case.device}, {str(case.dtype)[6:]}", ("ours", "theirs", "products", "memory", "theirs"))
    for shape in case.shape:
        with tempfile.TemporaryDirectory() as case.folder:
            case.examples = make(shape, case.folder, case.dtype)
            for what in case.rows:
                try:
                    line(f"{shape}, {what}", measure(what, case, sides))
                except (OSError, MemoryError, RuntimeError) as error:  # too big for this machine
                    print(f"{shape}, {what}: {error!r:.200}", flush=True)
                gc.collect()  # a method's hooks and its model hold each other


if __name__ == "__main__":
    command_line(main)
