"""Training steps and generation beside transformers and peft, and beside the bare matrix products.

    pip install -r bench/requirements.txt
    python -m bench.speed

Two models with random weights: the built-in base's shape with 48 examples of 43 tokens, and width 512 with a vocabulary
of 32,000 and 8 examples of 160; labels on the last quarter of each. A step is loss, backward and AdamW, in float32, all
examples of one length, so nothing is won by less padding. Theirs has a LoRA of rank 12 on every linear layer of the
decoder where ours has MultiLoRA (n = 3, r = 4), the same rank in all, or trains everything where ours is sft. The
products are those of the step's linear layers, forward and backward, without anything around them.

Each round takes all of them in turns; a ratio is the median over the rounds of their seconds by ours. With --compile
our steps and tokens are made as `train.py --compile` makes them.
"""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import train
from engine.compiled import compile_model
from engine.flags import Parser, command_line
from model import Context, Llama, LlamaConfig

SHAPES = {"width 128": (LlamaConfig.from_pretrained(train.HERE / "base"), (48, 43)),
          "width 512": (LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                                    num_attention_heads=8), (8, 160))}
METHODS = ("multilora", "lora", "sft", "csreft")
PROMPTS, NEW = (8, 32), 64


def ours(method, folder, ids, labels, compiled=False):
    """(a step of training, numbers that it trains)"""
    model = Llama.from_pretrained(folder).train()
    if compiled:
        compile_model(model)
    module, config = train.method_of(method)
    adapter = train.start_adapter(model, module, config)
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-4, 0.0), fused=True)
    mask = labels == -100

    def step():
        ctx = Context(mask, torch.zeros(len(ids), dtype=torch.long))
        (model(ids, labels, ctx) + adapter.penalty(ctx)).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


def theirs(method, folder, ids, labels):
    """The same of transformers, with peft's LoRA but for sft; CS-ReFT has no peer here and is held against LoRA."""
    import peft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method != "sft":
        model = peft.get_peft_model(model, peft.LoraConfig(r=12, lora_alpha=24, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


def pyrefts(method, folder, ids, labels):
    """The same of pyreft's LoReFT with rank 20 on every token after every layer."""
    import pyreft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    edit = lambda: pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=20,
                                             dtype=torch.float32)
    count = model.config.num_hidden_layers
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=[
        {"layer": i, "component": "block_output", "low_rank_dimension": 20, "intervention": edit()}
        for i in range(count)]))
    reft.set_device("cpu")
    places = {"sources->base": (None, [[list(range(ids.shape[1]))] * len(ids)] * count)}
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        _, output = reft({"input_ids": ids}, unit_locations=places, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in reft.parameters() if p.requires_grad)


def products(folder, tokens, labelled, everything):
    """The products of a step alone; everything: those of the weights' gradients too."""
    model = Llama.from_pretrained(folder)
    weights = [(p.detach(), tokens) for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    weights.append((model.lm_head.weight.detach(), labelled))
    inputs = [(torch.randn(n, w.shape[1]), torch.randn(n, w.shape[0]), w) for w, n in weights]

    def step():
        for x, g, w in inputs:
            x @ w.T, g @ w
            if everything:
                g.T @ x

    return step


def generation(folder, compiled=False):
    """(ours, theirs): the same greedy tokens."""
    import transformers

    ids = torch.randint(3, 500, PROMPTS, generator=torch.Generator().manual_seed(0))
    model, peer = Llama.from_pretrained(folder), transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    if compiled:
        compile_model(model)
    texts = ids.tolist()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return (lambda: model.generate(texts, NEW),
            lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPTS[1] :].tolist())


def in_turns(functions, rounds, calls):
    """[seconds of a call] for each function, one for each round."""
    seconds = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for taken, function in zip(seconds, functions):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            taken.append((time.perf_counter() - start) / calls)
    return seconds


def row(title, counts, seconds):
    mine, ratios = seconds[0], [statistics.median(b / a for a, b in zip(seconds[0], other)) for other in seconds[1:]]
    print(f"{title:<24}{counts:>24}{statistics.median(mine) * 1e3:>9.0f} ms" + "".join(f"{r:>10.2f}" for r in ratios),
          flush=True)


def profile(step):
    """Prints which operations take a step's time, without that of the operations they are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    named = lambda key: key.removeprefix("aten::").replace("_scaled_dot_product_flash_attention_for_cpu", "attention")
    own = {named(event.key): event.self_cpu_time_total for event in found.key_averages()}
    most = sorted(own, key=own.get, reverse=True)[:6]
    print("  ours: " + ", ".join(f"{name} {100 * own[name] / sum(own.values()):.1f} %" for name in most), flush=True)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of which a ratio is the median (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="one of the two alone")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--profile", action="store_true", help="say what takes the time of our steps, too")
    parser.add_argument("--peer", choices=("peft", "pyreft"), default="peft",
                        help="pyreft: its LoReFT beside csreft and loreft, in an environment of .ci/pyreft.txt")
    args = parser.parse_args()
    methods, peer = (METHODS, theirs) if args.peer == "peft" else (("loreft", "csreft"), pyrefts)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    print(f"float32, {torch.get_num_threads()} threads, medians of {args.rounds} rounds\n"
          f"{'':<24}{'numbers ours / theirs':>24}{'ours':>12}{'theirs':>10}{'products':>10}")
    for title, (config, (B, T)) in SHAPES.items():
        if args.shape not in (None, title):
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = Llama(replace(config, eos_token_id=None))
            model.init_weights(seed=0)
            model.save_pretrained(Path(folder))
            ids = torch.randint(3, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
            labels = ids.masked_fill(torch.arange(T) < T - T // 4, -100)
            for method in methods:
                mine, a = ours(method, folder, ids, labels, args.compile)
                other, b = peer(method, folder, ids, labels)
                bare = products(folder, B * T, B * (T // 4), method == "sft")
                row(f"{title}, {method}", f"{a:,} / {b:,}", in_turns((mine, other, bare), args.rounds, 2))
                if args.profile:
                    profile(mine)
            if peer is not theirs:
                continue
            mine, other = generation(folder, args.compile)
            assert mine() == other(), "the generated tokens differ"
            row(f"{title}, generate", "", in_turns((mine, other), args.rounds, 1))


if __name__ == "__main__":
    command_line(main)
