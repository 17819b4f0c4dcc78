"""All tests: `python -m pytest`. The oracles are independent of the code they check: the equation written out as a
naive loop in float64, transformers and peft where they are installed, and the command line run as a user runs it.

Read in this order: helpers, the model, the data, every method, MultiLoRA, CS-ReFT, CoFiTune, the command line,
reproduction, real files.
"""

import csv
import itertools
import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import cofitune
import csreft
import data
import multilora
import train
from model import Context, Llama, LlamaConfig, find_linears, parse_layers

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "reproduce"))
import compare  # noqa: E402
import table  # noqa: E402

BASE = HERE / "base"
REAL = HERE.parent / "shared" / "real"  # real files, where a checkout has them beside it
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real files beside this checkout")
TINY = REAL / "tinystories-656k"
SOURCES = ("csreft.py", "multilora.py", "cofitune.py", "model.py", "data.py", "train.py")


# ---------------------------------------------------------------------------------------------- helpers


def cli(*args, cwd=HERE, code=0):
    """Runs a program of the project as a user does; returns its finished process after checking the exit code."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def one_line_error(*args, cwd=HERE):
    """The message of a command that must fail as a user's mistake: exit code 2, one line, no traceback."""
    done = cli(*args, cwd=cwd, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "error: " in lines[0] and "Traceback" not in done.stdout, done.stderr
    return lines[0]


def tiny(dtype=torch.float32, seed=0, **changes):
    """A random two-layer model; norms and biases are randomised too, so that one which is not used shows."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = Llama(LlamaConfig(**{**shape, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else 0.15 * noise)
    return model.eval()


def perturb(model, scale=0.1, seed=1):
    """Stands in for training: moves every trainable tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def random_ids(model, batch=3, length=11, seed=2):
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def trained_on_builtin(method, method_config, steps=4, dtype=torch.float32, **changes):
    """(model, adapter) after a few steps on the built-in suite, in this process."""
    config = train.Config(method="x", steps=steps, **{"batch_size": 8, "lr": 1e-2, **changes})
    model = Llama.from_pretrained(BASE, dtype=dtype)
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    suite = data.load_builtin("currency,cipher", limit=10)
    examples = data.encode(suite.train, tokenizer, suite.names)
    torch.manual_seed(config.seed)
    adapter = train.start_adapter(model, method, method_config)
    train.train(model, adapter, examples, config, tokenizer.pad_id)
    return model, adapter


def settled(name):
    """(module, Config) of a method, with what a search would choose filled in."""
    method, config = train.find_methods()[name]
    return method, replace(config, layers="25%-50%") if getattr(config, "layers", "") == "search" else config


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Makes short runs by the command line, once for each set of arguments: runs(*args) -> run folder."""
    made = {}

    def make(*args):
        if args not in made:
            made[args] = tmp_path_factory.mktemp("run") / "out"
            cli("train.py", *args, "--out", made[args])
        return made[args]

    return make


# ---------------------------------------------------------------------------------------------- the model


SMALL = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
LINEAR = {"factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_checkpoint(path, raw, dtype=torch.float32, shards=0, absent=(), stray=False, seed=0):
    """A folder with `raw` as config.json and random weights under the names and shapes that transformers gives them,
    norms and biases too. shards: number of files beside an index; 0 is one file without. stray: an old buffer."""
    transformers = pytest.importorskip("transformers")
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(path)).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
               for name, shape in shapes.items()}
    if raw.get("tie_word_embeddings"):
        tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors = {name: t.to(dtype) for name, t in tensors.items() if name not in absent}
    if stray:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] or ["model.safetensors"]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in list(tensors)[i :: len(files)]}, path / file, {"format": "pt"})
    if shards:
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(tensors)}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def their_logits(path, ids):
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits


@pytest.mark.parametrize("raw, written", [
    ({}, {}),
    ({}, {"shards": 3}),
    ({"tie_word_embeddings": True}, {}),
    ({"tie_word_embeddings": True}, {"absent": [HEAD]}),
    ({"tie_word_embeddings": True}, {"absent": [EMBEDDING]}),
    ({"tie_word_embeddings": True}, {"absent": [EMBEDDING], "shards": 2, "dtype": torch.bfloat16}),
    ({"num_key_value_heads": 2}, {}),
    ({"num_key_value_heads": None}, {}),
    ({"head_dim": 12, "num_key_value_heads": 1}, {}),
    ({"attention_bias": True}, {}),
    ({"mlp_bias": True}, {}),
    ({"rope_theta": 500.0, "rms_norm_eps": 0.01}, {}),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", **LINEAR}}, {}),
    ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", **LINEAR}}, {}),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, **LINEAR}}, {}),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}}, {}),
    ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {}),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}, {}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {}),
    ({}, {"dtype": torch.float16}),
    ({}, {"dtype": torch.bfloat16, "stray": True}),
    ({"model_type": "mistral", "sliding_window": None, "head_dim": 12, "num_key_value_heads": 2}, {}),
], ids=str)
def test_checkpoints_agree_with_transformers_both_ways(tmp_path, raw, written):
    ids = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    write_checkpoint(tmp_path / "theirs", {**SMALL, **raw}, **written)
    wanted = their_logits(tmp_path / "theirs", ids)
    ours = Llama.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), wanted, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(their_logits(tmp_path / "ours", ids), wanted, atol=1e-4, rtol=0)
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["tie_word_embeddings"] == raw.get("tie_word_embeddings", False)


def random_checkpoint(rng):
    """(config.json, arguments of write_checkpoint) with everything that may vary, drawn together."""
    raw = {"model_type": rng.choice(["llama", "llama", "mistral"]), "vocab_size": rng.randint(20, 70),
           "intermediate_size": rng.randint(8, 60), "num_hidden_layers": rng.randint(1, 3),
           "num_attention_heads": rng.choice([1, 2, 4, 6]), "tie_word_embeddings": rng.random() < 0.5,
           "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]), "max_position_embeddings": rng.choice([64, 2048])}
    heads, head_dim = raw["num_attention_heads"], rng.choice([4, 6, 8])
    raw["hidden_size"] = heads * head_dim if heads > 2 else 16
    raw["num_key_value_heads"] = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    if rng.random() < 0.5:
        raw["head_dim"] = rng.choice([4, 10, 16])
    if raw["model_type"] == "mistral":
        raw["sliding_window"] = None
    else:
        raw.update(attention_bias=rng.random() < 0.5, mlp_bias=rng.random() < 0.5)
    theta = {"rope_theta": rng.choice([100.0, 10000.0, 500000.0])}
    kind = rng.choice(["default", "linear", "llama3"])
    scaling = {"default": {}, "linear": {"factor": rng.choice([2.0, 8])}, "llama3": {
        "factor": rng.choice([2, 8.0]), "low_freq_factor": rng.choice([0.5, 1.0]),
        "high_freq_factor": rng.choice([2.0, 4]), "original_max_position_embeddings": rng.choice([16, 32, 64])}}[kind]
    spelling = rng.choice(["type", "rope_type", "rope_parameters"])
    if spelling == "rope_parameters":
        raw["rope_parameters"] = {"rope_type": kind, **theta, **scaling}
    else:
        raw.update(theta, rope_scaling={spelling: kind, **scaling} if scaling else None)
    absent = [rng.choice([EMBEDDING, HEAD, None])] if raw["tie_word_embeddings"] else []
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    return raw, {"dtype": dtype, "shards": rng.choice([0, 1, 3]), "absent": absent, "stray": rng.random() < 0.2}


def test_200_random_checkpoints_agree_with_transformers(tmp_path):
    pytest.importorskip("transformers")
    for seed in range(200):
        raw, written = random_checkpoint(random.Random(seed))
        write_checkpoint(tmp_path / str(seed), raw, seed=seed, **written)
        ids = torch.randint(0, raw["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            ours = Llama.from_pretrained(tmp_path / str(seed))(ids)
        torch.testing.assert_close(ours, their_logits(tmp_path / str(seed), ids), atol=1e-4, rtol=0,
                                   msg=lambda text: f"seed {seed}: {raw}, {written}\n{text}")


def test_base_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE).eval()
    fast = transformers.AutoTokenizer.from_pretrained(BASE)
    for name in data.TASKS:
        example = data.generate(name, "test")[0]
        text = "".join(piece for piece, _ in example.segments)
        ids = tokenizer.encode(text)
        assert fast(text)["input_ids"] == ids and tokenizer.decode(ids[1:]) == text
        with torch.no_grad():
            ours = Llama.from_pretrained(BASE)(torch.tensor([ids]))
            torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0)


def test_rope_scaling_follows_the_published_rules():
    """Written out for each frequency, as the papers' code does it with branches."""
    config = LlamaConfig.from_dict({
        "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}})
    from model import rope_frequencies
    for i, got in enumerate(rope_frequencies(config).tolist()):
        freq = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / freq
        if wavelength > 8192 / 1.0:
            wanted = freq / 8
        elif wavelength < 8192 / 4.0:
            wanted = freq
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            wanted = (1 - smooth) * freq / 8 + smooth * freq
        assert got == pytest.approx(wanted, rel=1e-5)


def test_loss_is_the_mean_over_labelled_tokens():
    model = tiny(torch.float64)
    ids = random_ids(model)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    logits = model(ids).log_softmax(-1)
    terms = [-logits[b, t - 1, ids[b, t]] for b in range(3) for t in range(1, 11) if labels[b, t] != -100]
    assert model(ids, labels).item() == pytest.approx(sum(terms).item() / len(terms), abs=1e-12)
    assert model(ids, labels, reduction="sum").item() == pytest.approx(sum(terms).item(), abs=1e-12)


def greedy_without_cache(model, prompt, new, stop):
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop:
            return ids[len(prompt):-1]
    return ids[len(prompt):]


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_generation_in_a_batch_equals_one_by_one_and_no_cache(kv_heads):
    model = tiny(torch.float64, num_key_value_heads=kv_heads)
    prompts = [random_ids(model, 1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6, 14)]
    free = [greedy_without_cache(model, p, 12, ()) for p in prompts]
    stop = {free[0][5], free[1][3]}  # tokens that do come up, so that rows stop at different times
    for wanted_stop in ((), stop):
        wanted = [greedy_without_cache(model, p, 12, wanted_stop) for p in prompts]
        assert model.generate(prompts, 12, wanted_stop) == wanted
        assert [model.generate([p], 12, wanted_stop)[0] for p in prompts] == wanted
    assert {len(row) for row in wanted} != {12}, "no row stopped early: the test shows nothing"


@torch.no_grad()
def test_sampling_repeats_with_a_seed_and_differs_from_greedy():
    model = tiny()
    draws = [model.generate([[1, 2]], 20, (), 1.0, torch.Generator().manual_seed(s))[0] for s in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert model.generate([[1, 2]], 20)[0] not in draws


def refused(load, path, *words):
    """load(path) raises what the command line shows as one line: a ValueError of this project, with these words."""
    with pytest.raises(ValueError) as error:
        load(path)
    text = str(error.value)
    assert Path(error.traceback[-1].path).parent == HERE and "\n" not in text, text
    assert all(word in text for word in (str(path), *words)), text


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, ["model_type is 'gpt2'", "expected 'llama'"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["RoPE type is 'yarn'", "linear, llama3"]),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["RoPE type is 'dynamic'"]),
    ({"rope_scaling": {"rope_type": "linear"}}, ["needs a number 'factor'"]),
    ({"rope_scaling": "linear"}, ["RoPE scaling is 'linear'", "expected null or an object"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"model_type": "mistral", "sliding_window": 4096}, ["sliding_window is 4096, expected null"]),
    ({"model_type": "mistral"}, ["sliding_window is 4096, expected null"]),
    ({"hidden_size": None}, ["hidden_size is None"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads is 3"]),
])
def test_unsupported_configs_are_refused_in_one_line(tmp_path, change, words):
    tiny().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    refused(Llama.from_pretrained, tmp_path, "config.json", *words)


def test_broken_weight_files_are_refused_in_one_line(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, tensors = file.read_bytes(), {name: t.clone() for name, t in load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({k: t for k, t in tensors.items() if k != name}, file)
    refused(Llama.from_pretrained, tmp_path, f"{name}' is missing, expected shape (48, 32)")
    save_file({**tensors, name: tensors[name].T.contiguous()}, file)
    refused(Llama.from_pretrained, tmp_path, file.name, name, "has shape (32, 48), expected (48, 32)")
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    refused(Llama.from_pretrained, tmp_path, file.name, name, "holds I8, expected F32, F16 or BF16", "quantised")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)
    refused(Llama.from_pretrained, tmp_path, "q_proj.bias", "no place in this model")
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(Llama.from_pretrained, tmp_path, file.name, "not a complete safetensors file")
    file.rename(tmp_path / "pytorch_model.bin")
    refused(Llama.from_pretrained, tmp_path, "no model.safetensors, only pytorch_model.bin", "save it with")
    for text in ('["llama"]', "{", ""):
        (tmp_path / "config.json").write_text(text)
        refused(Llama.from_pretrained, tmp_path, "config.json", "JSON")


def test_broken_shards_are_refused_in_one_line(tmp_path):
    tiny().save_pretrained(tmp_path)
    shard, index = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.safetensors").rename(shard)
    places, whole = {name: shard.name for name in load_file(shard)}, shard.read_bytes()
    for wrong in ('{"weight_map"', "[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"x": 1}}'):
        index.write_text(wrong)
        refused(Llama.from_pretrained, tmp_path, index.name)
    index.write_text(json.dumps({"weight_map": {**places, HEAD: "model-00002-of-00002.safetensors"}}))
    refused(Llama.from_pretrained, tmp_path, index.name, "names model-00002-of-00002.safetensors", "not in the folder")
    index.write_text(json.dumps({"weight_map": {**places, "elsewhere": shard.name}}))
    refused(Llama.from_pretrained, tmp_path, shard.name, "'elsewhere' is missing")
    index.write_text(json.dumps({"weight_map": places}))
    Llama.from_pretrained(tmp_path)
    shard.write_bytes(whole[:-1])
    refused(Llama.from_pretrained, tmp_path, shard.name, "not a complete safetensors file")


def test_changing_or_saving_mapped_weights_leaves_the_rest_whole(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model, wanted = Llama.from_pretrained(tmp_path), tiny().state_dict()
    with torch.no_grad():
        for weight in (model.lm_head.weight, wanted[HEAD]):
            weight.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)  # over the very file that the weights are mapped from
    for loaded in (model, Llama.from_pretrained(tmp_path)):
        assert all(torch.equal(t, wanted[name]) for name, t in loaded.state_dict().items())


@pytest.mark.parametrize("method", ["csreft", "multilora"])
def test_checkpointing_runs_each_layer_again_and_changes_no_gradient(method):
    grads, calls = {}, {}
    for on in (False, True):
        model = tiny(torch.float64, num_hidden_layers=3)
        torch.manual_seed(0)
        if method == "csreft":  # the first layer's pre-hook makes gates, which all layers' hooks and the penalty read
            adapter = csreft.attach(model, csreft.Config(subspaces=2, rank=3, positions="f3+l2", sparsity=0.1))
        else:
            adapter = multilora.attach(model, multilora.Config(dropout=0.5))
        perturb(model)
        model.model.checkpointing, calls[on] = on, []
        model.model.layers[1].self_attn.register_forward_hook(lambda *args, on=on: calls[on].append(1))
        model.train()
        ids = random_ids(model, 4)
        for step in range(2):  # micro-batches accumulate
            ctx = Context(prompt_mask=torch.arange(ids.shape[1])[None] < torch.tensor([4, 6, 3, 5])[:, None])
            (model(ids, ids, ctx) + adapter.penalty(ctx)).backward()
        assert len(calls[on]) == (4 if on else 2)
        grads[on] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, wanted in grads[False].items():
        torch.testing.assert_close(grads[True][name], wanted, atol=1e-6, rtol=0)
        assert wanted.abs().max() > 1e-4, f"{name} has no gradient to compare"


# A real checkpoint, in whose file only the head of the tied pair is, and a tokenizer without a pre-tokenizer.
@needs_real
def test_a_real_checkpoint_agrees_with_transformers():
    ids = torch.randint(3, 2048, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Llama.from_pretrained(TINY)(ids)
    torch.testing.assert_close(ours, their_logits(TINY, ids), atol=1e-4, rtol=0)


@needs_real
def test_a_real_checkpoint_continues_a_story():
    model, tokenizer = Llama.from_pretrained(TINY), data.Tokenizer.from_pretrained(TINY)
    new = model.generate([tokenizer.encode("Once upon a time")], 60, tokenizer.stop_ids)[0]
    assert tokenizer.decode(new).startswith(", a little girl named Lily lived in a small house with her mom, dad, and")


@needs_real
def test_a_real_tokenizer_gives_the_ids_of_its_files():
    tokenizer = data.Tokenizer.from_pretrained(TINY)
    fast = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for text in ("Once upon a time", "", " two  spaces", "Lily's mom said:\n\"No!\"", "élan 北京", "3.14 x 42"):
        wanted = fast.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [1, *wanted], text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 0, {2})


def tokenizer_folder(path, before="<s> $A", **settings):
    """The built-in tokenizer with another post-processor (None: none) and these files beside it, without .json."""
    shutil.copytree(BASE, path, ignore=shutil.ignore_patterns("pretraining", "*.safetensors"))
    fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    fast.enable_truncation(4)  # left over from somebody's training, and not to be applied
    fast.enable_padding(length=9)
    if before:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=before, special_tokens=[("<s>", 1), ("</s>", 2)])
    raw = json.loads(fast.to_str())
    (path / "tokenizer.json").write_text(json.dumps(raw if before else {**raw, "post_processor": None}))
    for name, content in settings.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("before, add_bos, adds", [
    ("<s> $A", None, True),
    ("<s> $A", True, True),
    ("<s> $A", False, False),
    (None, None, False),
    (None, True, True),
    (None, False, False),
    ("<s> $A </s>", True, True),
    ("$A", True, True),
])
def test_bos_is_put_first_as_the_files_say(tmp_path, before, add_bos, adds):
    folder = tokenizer_folder(tmp_path / "x", before, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos, "add_eos_token": False, **NAMES})
    tokenizer = data.Tokenizer.from_pretrained(folder)
    plain = data.Tokenizer.from_pretrained(BASE).encode("Reverse: a b c d", start=False)
    assert len(plain) > 4 and tokenizer.encode("Reverse: a b c d") == [1] * adds + plain
    assert tokenizer.encode("Reverse: a b c d", start=False) == plain


@pytest.mark.parametrize("settings, eos, stop, pad", [
    ({"tokenizer_config": {**NAMES, "pad_token": "<pad>"}}, 2, {2}, 0),
    ({"tokenizer_config": {**NAMES, "pad_token": None}}, 2, {2}, 2),
    ({"tokenizer_config": {**NAMES, "pad_token": "[PAD]"}}, 2, {2}, 2),
    ({"tokenizer_config": NAMES, "generation_config": {"eos_token_id": [2, 40, 41]}}, 2, {2, 40, 41}, 2),
    ({"tokenizer_config": {"eos_token": "a"}, "generation_config": {"eos_token_id": [2, 41]}}, "a", {2, 41, "a"}, "a"),
    ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": {"content": "a"}}}, "a", {2, "a"}, "a"),
    ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [41, 40]}}, 40, {40, 41}, 40),
    ({"tokenizer_config": {}}, 2, {2}, 2),
], ids=str)
def test_eos_and_pad_come_from_the_files(tmp_path, settings, eos, stop, pad):
    tokenizer = data.Tokenizer.from_pretrained(tokenizer_folder(tmp_path / "x", **settings))
    number = lambda token: tokenizer.fast.token_to_id(token) if isinstance(token, str) else token
    assert (tokenizer.eos_id, tokenizer.pad_id) == (number(eos), number(pad))
    assert tokenizer.stop_ids == {number(token) for token in stop}


def test_broken_tokenizer_files_are_refused_in_one_line(tmp_path):
    load, folder = data.Tokenizer.from_pretrained, tokenizer_folder(tmp_path / "x")
    for name in ("config", "generation_config", "special_tokens_map", "tokenizer_config"):
        kept = (folder / f"{name}.json").read_text() if (folder / f"{name}.json").exists() else "{}"
        for wrong in ('{"eos_token": ', "[]", "", '"x"'):
            (folder / f"{name}.json").write_text(wrong)
            refused(load, folder, f"{name}.json", "JSON")
        (folder / f"{name}.json").write_bytes(b"\xff\xfe{}")
        refused(load, folder, f"{name}.json", "JSON")
        (folder / f"{name}.json").write_text(kept)
    load(folder)
    file = folder / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.add_tokens(["<extra>"])  # the vocabulary has 512 entries, as many as the model's embedding
    fast.save(str(file))
    refused(load, folder, "tokenizer.json", "'<extra>' has id 512, expected less than vocab_size 512", "another model")
    for wrong in ("{}", "not JSON", file.read_text()[:5000], '{"model": {"type": "Unigram"}}'):
        file.write_text(wrong)
        refused(load, folder, "tokenizer.json", "does not parse")
    file.rename(folder / "tokenizer.model")
    refused(load, folder, "no tokenizer.json, only tokenizer.model", "save it with")
    (folder / "tokenizer.model").unlink()
    refused(load, folder, "has no tokenizer.json")


def test_layer_ranges():
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("3,1", 4) == [1, 3]
    assert parse_layers("25%-50%", 8) == [2, 3] and parse_layers("25%-50%", 32) == list(range(8, 16))
    quarters = [parse_layers(f"{q}%-{q + 25}%", 22) for q in (0, 25, 50, 75)]
    assert sum(quarters, []) == list(range(22)), "quarters must neither overlap nor leave a layer out"
    for wrong in ("90%-10%", "3,9", "-1", "half", "25-50%-75%", "", "1.5"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(wrong, 8)


# ---------------------------------------------------------------------------------------------- the data


def test_splits_share_no_prompt_and_skills_share_no_operands():
    for name in data.TASKS:
        prompts = {split: {e.segments[0][0] for e in data.generate(name, split)} for split in data.SPLITS}
        assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"], name
        assert not prompts["validation"] & prompts["test"], name
        assert len(prompts["test"]) >= 200, name
    numbers = lambda split: {tuple(sorted(re.findall(r"\d+", e.segments[0][0]))) for e in data.generate("add", split)}
    assert not numbers("train") & numbers("test"), "12 + 34 is the same problem as 34 + 12"


def test_every_fact_that_is_tested_was_trained_on():
    for name, (aspect, _) in data.TASKS.items():
        if aspect in ("knowledge", "facts"):
            answers = {split: {e.segments[1][0] for e in data.generate(name, split)} for split in data.SPLITS}
            assert answers["test"] <= answers["train"], name


def test_the_suite_is_the_same_in_every_process():
    code = "import data, zlib; print(zlib.crc32(repr([data.generate(n, 'test') for n in data.TASKS]).encode()))"
    assert len({cli("-c", code).stdout for _ in range(2)}) == 1


def test_only_the_answer_and_its_eos_are_trained_on():
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    example = data.Example("t", [("Say hi.", False), ("hi", True), ("Again.", False), ("hi hi", True)])
    encoded = data.encode([example], tokenizer, ["t"])[0]
    trained = [i for i, label in zip(encoded.ids, encoded.labels) if label != -100]
    assert tokenizer.fast.decode(trained, skip_special_tokens=False) == "hi</s>hi hi</s>"
    assert encoded.ids[0] == tokenizer.bos_id and encoded.ids.count(tokenizer.bos_id) == 1
    assert encoded.labels[: encoded.prompt] == [-100] * encoded.prompt and encoded.labels[encoded.prompt] != -100
    batch = data.collate([encoded, replace(encoded, ids=encoded.ids[:5], labels=encoded.labels[:5], prompt=3)], 0)
    assert batch.prompt_mask.sum(1).tolist() == [encoded.prompt, 3]
    assert (batch.ids[1, 5:] == 0).all() and (batch.labels[1, 5:] == -100).all()


@needs_real
def test_a_text_that_continues_another_gets_no_space_of_its_own():
    """Llama 2's kind of tokenizer prepends one: prompt and answer apart must spell the text in one piece."""
    tokenizer = data.Tokenizer.from_pretrained(TINY)
    spelled = lambda ids: "".join(tokenizer.fast.id_to_token(i) for i in ids)
    for prompt, answer in (("Once upon", " a time there was"), ("She said", ', "Hello!"'), ("Tom", "'s dog ran.")):
        apart = tokenizer.encode(prompt) + tokenizer.encode(answer, start=False)
        assert spelled(apart) == spelled(tokenizer.encode(prompt + answer))
        assert spelled(tokenizer.encode(prompt) + tokenizer.fast.encode(answer).ids[1:]) != spelled(apart)


def test_an_epoch_draws_every_example_once_with_similar_lengths_together():
    examples = [data.Encoded([0] * (5 + i % 60), [0] * (5 + i % 60), 1, i) for i in range(320)]
    draws = data.draw(examples, 10, seed=0)
    epoch = [next(draws) for _ in range(32)]
    assert sorted(e.task for group in epoch for e in group) == list(range(320))
    spread = [max(len(e.ids) for e in g) / min(len(e.ids) for e in g) for g in epoch]
    assert sorted(spread)[len(spread) // 2] <= 1.5 and [e.task for e in epoch[0]] != [e.task for e in epoch[1]]
    assert [[e.task for e in next(data.draw(examples, 10, seed=s))] for s in (0, 0)][0] == [e.task for e in epoch[0]]


def test_exact_match_equals_greedy_decoding():
    """Scoring under teacher forcing gives the verdict of generating and comparing, on right and on wrong answers."""
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    examples = [e for name in ("capital", "add", "count", "cipher") for e in data.generate(name, "test")[:25]]
    encoded = data.encode(examples, tokenizer, list(data.TASKS))
    found = [hit for *_, hit in data.answer_scores(model, encoded, tokenizer.pad_id, lambda batch: None, 16)]
    wanted = [greedy_without_cache(model, e.ids[: e.prompt], len(e.ids) - e.prompt + 3, tokenizer.stop_ids)
              == e.ids[e.prompt : -1] for e in encoded]
    assert found == wanted and 0 < sum(found) < len(found)


# ---------------------------------------------------------------------------------------------- files and formats


def written(path, records, form="lines"):
    """A file of records as a JSON array, as JSON lines, or as CSV with or without a header."""
    if form.startswith("csv"):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerows(([list(records[0])] if form == "csv" else []) + [list(r.values()) for r in records])
    else:
        path.write_text(json.dumps(records, indent=1) if form == "array" else "\n".join(map(json.dumps, records)))
    return path


QUIZ = {"question": "2 + 2?", "A": "3", "B": "4", "C": "5, or 6", "D": "7"}
NUMBERED = {"question": "2 + 2?", "choice0": "3", "choice1": "4", "choice2": "5, or 6", "choice3": "7"}
PASSAGE = {"passage": "Ice floats.", "question": "does ice float"}
CLAIM = {"premise": "It rains.", "hypothesis": "It is wet."}
WORD = {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank of fog."}
COPA = {"premise": "He fell.", "choice1": "He slipped.", "choice2": "He sang.", "question": "cause", "label": 0}


@pytest.mark.parametrize("form, records, kind, prompt, answers, choices", [
    ("array", [{"instruction": "Add.", "input": "1 2", "output": "3"}], "alpaca", "Add.\n\n1 2", ["3"], None),
    ("lines", [{"instruction": "Hi", "output": ""}], "alpaca", "Hi", [""], None),
    ("csv", [{"instruction": "Say\nhi", "output": "hi, \"you\""}], "alpaca", "Say\nhi", ['hi, "you"'], None),
    ("lines", [{"prompt": "Q", "completion": "A"}], "pair", "Q", ["A"], None),
    ("csv", [{"question": "Q", "response": "A"}], "pair", "Q", ["A"], None),
    ("array", [{"question": "Q", "answer": "A"}], "pair", "Q", ["A"], None),
    ("array", [{"prompt": "Q", "output": "A"}], "pair", "Q", ["A"], None),
    ("lines", [{"question": "Q", "answer": "so\n#### 7"}], "gsm8k", "Q", ["so\n#### 7"], None),
    ("lines", [{"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A"),
                                                                     ("user", "R"), ("assistant", "B"))]}],
     "chat", "S\n\nQ", ["A", "B"], None),
    ("lines", [{**PASSAGE, "label": True}], "boolq", "Ice floats.\nQuestion: does ice float?\nAnswer:", ["yes"],
     ["yes", "no"]),
    ("lines", [{**CLAIM, "label": "not_entailment"}], "rte",
     "It rains.\nQuestion: It is wet. True or False?\nAnswer:", ["False"], ["True", "False"]),
    ("lines", [{**CLAIM, "label": "entailment"}, {**CLAIM, "label": "neutral"}], "cb",
     "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:", ["True"], ["True", "False", "Neither"]),
    ("lines", [{**WORD, "label": False}], "wic", "A river bank.\nA bank of fog.\nQuestion: Is the word 'bank' used in "
     "the same sense in both sentences?\nAnswer:", ["no"], ["yes", "no"]),
    ("lines", [COPA], "copa", "He fell because", ["he slipped."], ["he slipped.", "he sang."]),
    *((form, [{**fields, "answer": answer}], "mmlu", "2 + 2?\nA. 3\nB. 4\nC. 5, or 6\nD. 7\nAnswer:", ["B"],
       list("ABCD")) for form in ("csv", "csv without header") for fields in (QUIZ, NUMBERED) for answer in "B1"),
    ("lines", [{"text": "Once upon a time."}], "text", None, ["Once upon a time."], None),
])
def test_every_format_is_recognised_and_read(tmp_path, form, records, kind, prompt, answers, choices):
    file = written(tmp_path / "some.data", records, form)
    name, (found, rows) = next(iter(data.read_files([str(file)]).items()))
    assert (name, found, len(rows)) == ("some", kind, len(records))
    example = data.TEMPLATES["plain"].example(name, rows[0])
    space = "" if kind == "text" else " "
    assert [text for text, trained in example.segments if trained] == [space + a for a in answers]
    assert example.segments[0] == ((prompt, False) if prompt else (answers[0], True))
    assert example.choices == (choices and [space + c for c in choices])


def test_prompt_templates_are_the_published_ones():
    alpaca, llama2, llama3 = (data.TEMPLATES[name] for name in ("alpaca", "llama2", "llama3"))
    assert alpaca.opening("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n")
    assert alpaca.opening("Say {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x}.\n\n### Response:\n")
    row = data.Row([("Q", "A"), ("R", "B")], system="S")
    assert "".join(text for text, _ in llama2.example("t", row).segments) == (
        "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A <s>[INST] R [/INST] B ")
    assert llama3.opening("Q", system="S") == (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>" + llama3.opening("Q"))
    assert llama3.opening("Q") == ("<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
                                   "<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("content, line, message", [
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion":\n', 2, "not valid JSON"),
    ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "", "completion": "b"}\n', 3, "'prompt' is ''"),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', 2, "no field 'completion' or"),
    ('[{"prompt": "a", "completion": "b"},\n {"prompt": "c",\n  "completion": 3}]', 2, "'completion' is 3"),
    ('[{"prompt": "a", "completion": "b"},\n 7]', 2, "no object"),
    ('prompt,answer\na,b\n"c\nd"\n', 4, "1 columns, expected 2"),
    (json.dumps({**PASSAGE, "label": True}) + "\n" + json.dumps(PASSAGE), 2, "'label' is None, expected one of True"),
    (json.dumps({"question": "q", "answer": "#### 1"}) + "\n" + json.dumps({"question": "q", "answer": "one"}), 2,
     "no final '#### number'"),
])
def test_a_bad_row_is_named_by_file_and_line_or_counted(tmp_path, capsys, content, line, message):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        data.read_files([str(file)])
    assert str(error.value).startswith(f"{file}:{line}: ") and message in str(error.value)
    rows = data.read_files([str(file)], skip_bad=True)["rows"][1]
    assert len(rows) == 1 and "1 bad rows skipped" in capsys.readouterr().out


def test_one_odd_row_does_not_change_a_files_format(tmp_path):
    """Neither the first row nor a wrong label decides alone."""
    rte = [{**CLAIM, "label": "entailment"}, {**CLAIM, "label": "not_entailment"}, {**CLAIM, "label": "neutrl"}]
    problems = [{"question": "q", "answer": "?"}, {"question": "q", "answer": "#### 1"}]
    orders = [{"instruction": "i"}, {"instruction": "i", "output": "o"}]
    for kind, rows in (("rte", rte), ("gsm8k", problems), ("alpaca", orders)):
        file = written(tmp_path / f"{kind}.json", rows)
        assert data.read_files([str(file)], skip_bad=True)[kind][0] == kind
        with pytest.raises(ValueError, match=f"{kind}.json:{3 if kind == 'rte' else 1}: "):
            data.read_files([str(file)])


def test_what_is_held_out_is_never_trained_on(tmp_path):
    """By a second reading of the file: row i holds the number i."""
    big = written(tmp_path / "big.jsonl", [{"prompt": f"q{i}", "completion": str(i)} for i in range(100)])
    small = written(tmp_path / "small.jsonl", [{"prompt": f"q{i}", "completion": str(i)} for i in range(30)])
    other = written(tmp_path / "other.jsonl", [{"prompt": f"o{i}", "completion": str(i)} for i in range(9)])
    numbers = lambda examples, task: [int(e.segments[1][0]) for e in examples if e.task == task]
    suite = data.load_files([str(big), f"tiny={small}"], general_files=[str(other)])
    assert numbers(suite.tests["big"], "big") == [19, 39, 59, 79, 99] and numbers(suite.tests["tiny"], "tiny") == [19]
    assert numbers(suite.train, "big") == [i for i in range(100) if i % 20 != 19]
    assert numbers(suite.tests["other"], "other") == [1, 3, 5, 7] and suite.group == {
        "big": "new", "tiny": "new", "other": "general"}
    choosing = data.load_files([str(big), f"tiny={small}"], general_files=[str(other)], split="validation")
    left = [i for i in range(100) if i % 20 != 19]
    assert numbers(choosing.tests["big"], "big") == left[9::20]
    assert numbers(choosing.train, "big") == [i for i in left if i not in left[9::20]]
    assert numbers(choosing.tests["other"], "other") == [0, 2, 4, 6, 8]
    apart = data.load_files([str(big)], [str(other)])
    assert len(apart.train) == 100 and numbers(apart.tests["other"], "other") == list(range(9))
    equal = data.load_files([str(big), str(small)], mix="equal")
    assert len(numbers(equal.train, "big")) == len(numbers(equal.train, "small")) == 95
    assert set(numbers(equal.train, "small")) == {i for i in range(30) if i != 19}


def test_long_examples_are_cut_to_fit_or_dropped_and_counted():
    make = lambda prompt, answer: data.Encoded([1] + [5] * (prompt - 1) + [7] * answer, [-100] * prompt + [7] * answer,
                                               prompt, 0, gold="x")
    lengths = [(5, 3), (30, 3), (4, 30), (30, 30)]
    kept, count = data.fit([make(*n) for n in lengths], 20, "cut")
    assert count == 3 and [(e.prompt, len(e.ids)) for e in kept] == [(5, 8), (17, 20), (4, 20), (10, 20)]
    for e in kept:
        assert e.ids[0] == 1 and e.labels == [-100] * e.prompt + [7] * (len(e.ids) - e.prompt)
    kept, count = data.fit([make(*n) for n in lengths], 20, "drop")
    assert count == 3 and [len(e.ids) for e in kept] == [8]


def test_the_final_number_follows_the_reference_rule():
    """Against the rule spelled out by hand: after the first "#### " that a number can follow, as far as it goes."""
    def by_hand(text):
        for start in range(len(text)):
            if text.startswith("#### ", start):
                rest = text[start + 5 :]
                sign, rest = ("-", rest[1:]) if rest[:1] == "-" else ("", rest)
                digits = rest[: len(rest) - len(rest.lstrip("0123456789.,"))]
                if digits:
                    return (sign + digits).replace(",", "")
        return None

    known = {"#### 18": "18", "so 3\n#### 1,234,567": "1234567", "#### -5": "-5", "#### 2.50": "2.50", "#### $18": None,
             "####18": None, "#### 7 #### 8": "7", "#### x\n#### 9": "9", "18": None, "": None, "#### 3.": "3.",
             "#### - 4": None, "#### 1/2": "1", "##### 6": "6", "#### -": None}
    for text, number in known.items():
        assert data.final_number(text) == by_hand(text) == number, text
    if REAL.is_dir():
        answers = [json.loads(line)["answer"] for line in (REAL / "gsm8k" / "test.jsonl").read_text().splitlines()]
        assert len(answers) == 1319 and all(data.final_number(a) == by_hand(a) != None for a in answers)  # noqa: E711
        assert all(float(data.final_number(a)) == float(a.split("####")[1].replace(",", "")) for a in answers)


@needs_real
def test_every_real_file_is_recognised_with_all_its_rows():
    wanted = {}
    for path in sorted(REAL.glob("*/**/*")):
        if path.suffix == ".json" and path.parent.name in ("alpaca", "alpaca_eval"):
            wanted[path] = "alpaca", len(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            folder = path.parent.name.lower()
            wanted[path] = folder, sum(bool(line.strip()) for line in path.read_text().split("\n"))
        elif path.suffix == ".csv":
            with open(path, newline="") as f:
                wanted[path] = "mmlu", sum(1 for _ in csv.DictReader(f))
    assert len(wanted) == 22 and {kind for kind, _ in wanted.values()} == {
        "alpaca", "gsm8k", "boolq", "rte", "wic", "cb", "mmlu"}
    text = cli("data.py", "--base", TINY, *wanted).stdout
    for path, (kind, rows) in wanted.items():
        assert f"{rows:,} records of format {kind} in {path}, scored by" in text
    names = {data.task_name(path) for path in wanted}
    assert names == {"BoolQ", "RTE", "WiC", "CB", "gsm8k", "alpaca_en_demo", "gpt3_alpaca", "college_physics",
                     "elementary_mathematics", "global_facts", "international_law", "us_foreign_policy"}


def test_choices_are_scored_as_a_naive_loop_with_transformers_does(tmp_path):
    """Each choice on its own, no batch, no padding: log-probabilities summed, and divided by the choice's bytes."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    quiz = [{"question": f"What is {a} + {b}?", "A": str(a + b), "B": "one hundred", "C": str(b), "D": "ä",
             "answer": "ABCD"[(a + b) % 4]} for a, b in zip(range(10, 40), range(31, 61))]
    copa = [{**COPA, "premise": f"Job {i}.", "choice1": "Zq", "choice2": "the job of " * i, "label": int(i % 3 == 1)}
            for i in range(1, 20)]
    files = [written(tmp_path / "quiz.csv", quiz, "csv"), written(tmp_path / "copa.jsonl", copa)]
    for name, (kind, rows) in data.read_files(map(str, files)).items():
        rows = [data.with_shots(row, rows[:2]) for row in rows] if kind == "mmlu" else rows
        examples = [data.TEMPLATES["short"].example(name, row) for row in rows]
        raw = by_byte = 0
        for e in examples:
            (prompt, _), (answer, _) = e.segments
            sums = []
            for choice in e.choices:
                before, ids = tokenizer.encode(prompt), tokenizer.encode(choice, start=False)
                with torch.no_grad():
                    chances = theirs(torch.tensor([before + ids])).logits[0].log_softmax(-1)
                sums.append(sum(chances[len(before) + i - 1, t].item() for i, t in enumerate(ids)))
            rates = [s / len(c.strip().encode()) for s, c in zip(sums, e.choices)]
            raw += e.choices[sums.index(max(sums))] == answer
            by_byte += e.choices[rates.index(max(rates))] == answer
        got = data.choice(model, data.encode(examples, tokenizer, [name]), tokenizer, lambda batch: None, 16, 0)
        assert list(got.values()) == pytest.approx([100 * raw / len(rows), 100 * by_byte / len(rows)])
        assert kind == "mmlu" or got["choice"] != got["choice, by byte"], "both alike: the test shows nothing"


def test_loss_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    file = written(tmp_path / "a.json", [{"text": "abc " * n} for n in (1, 5, 9)], "array")
    rows = data.read_files([str(file)])["a"][1]
    encoded = data.encode([data.TEMPLATES["plain"].example("a", row) for row in rows], tokenizer, ["a"])
    total = count = 0
    for e in encoded:
        ids = torch.tensor([e.ids])
        with torch.no_grad():
            total += theirs(ids, labels=ids).loss.item() * (len(e.ids) - 1)
        count += len(e.ids) - 1
    got = data.loss(model, encoded, tokenizer, lambda batch: None, 2, 0)
    assert got["loss"] == pytest.approx(total / count, abs=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_generated_answers_to_gsm8k_are_read_and_compared():
    """A model that says one thing whatever it is asked: right where that is the answer."""
    tokenizer = data.Tokenizer.from_pretrained(BASE)

    class Parrot:
        config, device = LlamaConfig.from_dict(json.loads((BASE / "config.json").read_text())), "cpu"

        def generate(self, prompts, new, stop, tasks):
            assert all(p[0] == tokenizer.bos_id for p in prompts) and stop == tokenizer.stop_ids and new == 64
            return [tokenizer.encode("so\n#### 1,200\n#### 5", start=False) for _ in prompts]

    rows = [data.Row([("q" * n, f"#### {a}")]) for n, a in ((9, "1200"), (3, "5"), (5, "1,200"), (1, "12"))]
    encoded = data.encode([data.TEMPLATES["plain"].example("g", row) for row in rows], tokenizer, ["g"])
    assert data.gsm8k_answers(Parrot(), encoded, tokenizer, None, 3, 64) == {"final answer": 50.0}


# ---------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_every_method_starts_at_the_base(name):
    """Bit for bit; CS-ReFT too, since W_i = R_i and b_i = 0 make its update exactly zero."""
    model = Llama.from_pretrained(BASE)
    ids = random_ids(model)
    with torch.no_grad():
        before = model(ids)
        method, config = settled(name)
        train.start_adapter(model, method, config)
        assert torch.equal(model(ids), before)
        perturb(model)
        assert not torch.equal(model(ids), before)


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_an_adapters_whole_life(tmp_path, name):
    """Attached, trained, frozen weights untouched, saved, reloaded bit for bit, merged."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, lr=1e-3)
    base, after = load_file(BASE / "model.safetensors"), model.state_dict()
    frozen = [key for key in base if key not in adapter.tensors()]
    assert all(torch.equal(after[key], base[key]) for key in frozen), "a frozen weight moved"
    assert len(frozen) == len(base) or name in ("cofitune", "sft")
    ids = random_ids(model)
    with torch.no_grad():
        trained = model(ids)
        save_file(adapter.tensors(), tmp_path / "adapter.safetensors")
        again = Llama.from_pretrained(BASE)
        assert (again(ids) - trained).abs().max() > 1e-3, "training changed nothing"
        train.start_adapter(again, method, config).load_tensors(load_file(tmp_path / "adapter.safetensors"))
        assert torch.equal(again(ids), trained)
        if name not in ("cofitune", "sft"):  # these two have no tensors of their own
            with pytest.raises(ValueError, match="merge"):
                model.save_pretrained(tmp_path)
        if name in ("csreft", "loreft"):
            with pytest.raises(ValueError, match="cannot be merged"):
                adapter.merge()
            return
        adapter.merge()
        torch.testing.assert_close(model(ids), trained, atol=1e-4, rtol=0)
        model.save_pretrained(tmp_path / "merged")
        assert torch.equal(Llama.from_pretrained(tmp_path / "merged")(ids), model(ids))


# ---------------------------------------------------------------------------------------------- MultiLoRA


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
def test_stacked_multilora_equals_the_naive_sum(scaling):
    model = tiny(torch.float64)
    multilora.attach(model, multilora.Config(modules=3, rank=2, alpha=5.0, scaling=scaling))
    perturb(model, 0.3)
    x = torch.randn(4, 7, 48, dtype=torch.float64)
    linear = model.model.layers[1].mlp.down_proj  # (32, 48): not square
    m = linear.multilora
    wanted = x @ linear.weight.T
    for i in range(3):
        s = m.s[i] if m.s is not None else 1.0
        wanted = wanted + 5.0 / 2 * s * ((x @ m.A[i].T) @ m.B[i].T)
    torch.testing.assert_close(linear(x), wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(x @ (linear.weight + m.delta()).T, wanted, atol=1e-9, rtol=0)


def test_merging_is_exact_in_float64():
    model = tiny(torch.float64)
    adapter = multilora.attach(model, multilora.Config())
    perturb(model)
    ids = random_ids(model)
    with torch.no_grad():
        before = model(ids)
        adapter.merge()
        torch.testing.assert_close(model(ids), before, atol=1e-9, rtol=0)
    assert not any("multilora" in name for name, _ in model.named_parameters())


def test_lora_equals_peft(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ours = tiny()
    ours.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    config = replace(train.find_methods()["lora"][1], rank=3, alpha=6.0)
    multilora.attach(ours, config)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(multilora.LINEARS), lora_dropout=0.0)).eval()
    perturb(ours, 0.2)
    with torch.no_grad():
        for name, linear in find_linears(ours, multilora.LINEARS).items():
            twin = theirs.get_submodule(f"base_model.model.{name}")
            twin.lora_A["default"].weight.copy_(linear.multilora.A[0])
            twin.lora_B["default"].weight.copy_(linear.multilora.B[0])
        ids = random_ids(ours)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad)


def test_dropout_is_one_mask_for_all_modules_and_off_at_evaluation():
    model = tiny(torch.float64)
    multilora.attach(model, multilora.Config(modules=2, rank=2, dropout=0.5))
    perturb(model)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 32, dtype=torch.float64)
    assert torch.equal(linear(x), linear(x))
    linear.train()
    torch.manual_seed(0)
    got = linear.multilora(x)
    torch.manual_seed(0)
    masked = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got, masked @ linear.multilora.delta().T)


def test_spectrum_of_a_known_matrix():
    u, _ = torch.linalg.qr(torch.randn(20, 20))
    v, _ = torch.linalg.qr(torch.randn(16, 16))
    delta = u[:, :4] @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])) @ v[:4]
    values = multilora.singular_values(delta, 4)
    torch.testing.assert_close(values, torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), atol=1e-6, rtol=0)
    share, rank = multilora.spread(values)
    assert share == pytest.approx(0.5, abs=1e-6)
    assert rank == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 3), abs=1e-4)  # the entropy in bits, by hand
    assert multilora.spread(torch.full((5,), 0.2))[1] == pytest.approx(5, abs=1e-6)
    assert multilora.similarity(delta, 3 * delta, 4) == pytest.approx(1, abs=1e-5)
    assert multilora.similarity(delta, u[:, 4:8] @ v[:4], 4) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------------------- CS-ReFT


def csreft_config(**changes):
    return csreft.Config(**{"subspaces": 3, "rank": 2, **changes})


def naive_edit(edits, i, h, gates, edited=None):
    """The equation, one subspace and one token at a time: h (B, T, d), gates (B, k)."""
    out = h.clone()
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if edited is None or edited[b][t]:
                for n in range(gates.shape[1]):
                    R, W, bias = edits.R[i, n], edits.W[i, n], edits.b[i, n]
                    out[b, t] = out[b, t] + gates[b, n] * (R.T @ (W @ h[b, t] + bias - R @ h[b, t]))
    return out


@pytest.mark.parametrize("positions", ["all", "f2+l2", "f1", "l3", "f5+l5"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("ortho, norm", [("joint", True), ("separate", False)], ids=["joint", "separate, bare input"])
@torch.no_grad()
def test_stacked_csreft_equals_the_naive_sum(positions, gate, ortho, norm):
    """Two models with equal weights: in one the hooks edit, in the other the test does, layer by layer."""
    ours, plain = tiny(torch.float64), tiny(torch.float64)
    adapter = csreft.attach(ours, csreft_config(positions=positions, gate=gate, ortho=ortho, router_norm=norm))
    perturb(ours, 0.5)
    adapter.after_step()
    ours.eval()
    ids, lengths = random_ids(ours, 3, 12), torch.tensor([12, 4, 7])
    prompt = torch.arange(12) < lengths[:, None]
    x = torch.stack([ours.model.embed_tokens(ids[b, : lengths[b]]).mean(0) for b in range(3)])
    x = x / x.square().mean(1, keepdim=True).sqrt() if norm else x
    net = adapter.edits.router
    gates = 1 / (1 + torch.exp(-(torch.relu(x @ net[0].weight.T + net[0].bias) @ net[2].weight.T + net[2].bias)))
    if gate == "hard":
        threshold = adapter.edits.config.threshold = gates.median().item() + 1e-6
        gates = (gates > threshold).double()
        assert 0 < gates.mean() < 1, "all gates alike: the test shows nothing"
    ctx = Context(prompt_mask=prompt)
    got = ours(ids, ctx=ctx)
    torch.testing.assert_close(ctx.memory["gates"], gates, atol=1e-12, rtol=0)
    first, last = {"all": (99, 0), "f2+l2": (2, 2), "f1": (1, 0), "l3": (0, 3), "f5+l5": (5, 5)}[positions]
    edited = None if positions == "all" else [
        [t < n and (t < first or t >= n - last) for t in range(12)] for n in lengths.tolist()]
    for i, layer in enumerate(plain.model.layers):
        layer.register_forward_hook(lambda m, a, h, i=i: naive_edit(adapter.edits, i, h, gates, edited))
    torch.testing.assert_close(got, plain(ids), atol=1e-9, rtol=0)
    assert (got - tiny(torch.float64)(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_loreft_equals_its_equation_and_pyreft():
    model = tiny()
    adapter = csreft.attach(model, replace(train.find_methods()["loreft"][1], rank=4))
    perturb(model, 0.5)
    adapter.after_step()
    edits, h = adapter.edits, torch.randn(2, 5, 32)
    ctx = Context()
    edits.route(h, ctx)
    got = edits.edit(1, h, ctx)
    torch.testing.assert_close(got, naive_edit(edits, 1, h, torch.ones(2, 1)), atol=1e-5, rtol=0)
    pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed; the written-out equation above was checked")
    theirs = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4, dtype=torch.float32)
    theirs.rotate_layer.parametrizations.weight[0].base.copy_(torch.eye(32))
    theirs.rotate_layer.weight = edits.R[1, 0].T
    theirs.learned_source.weight.copy_(edits.W[1, 0])
    theirs.learned_source.bias.copy_(edits.b[1, 0])
    torch.testing.assert_close(got, theirs.eval()(h), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ortho", ["joint", "separate"])
def test_subspaces_stay_orthonormal(tmp_path, ortho):
    config = csreft_config(ortho=ortho)
    model = Llama.from_pretrained(BASE)
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    suite = data.load_builtin("currency,cipher", limit=1)
    examples = data.encode(suite.train, tokenizer, suite.names)
    torch.manual_seed(0)
    adapter, errors = train.start_adapter(model, csreft, config), []

    def check(record):
        R = adapter.edits.R.detach()
        for layer in R:
            for i, j in ((i, j) for i in range(3) for j in range(3)):
                if i == j or ortho == "joint":
                    errors.append((layer[i] @ layer[j].T - torch.eye(2) * (i == j)).abs().max().item())

    settings = train.Config(method="x", steps=6, batch_size=8, lr=1e-2, log_every=1, weight_decay=0.1)
    train.train(model, adapter, examples, settings, tokenizer.pad_id, check)
    assert len(errors) == 6 * 8 * (9 if ortho == "joint" else 3) and max(errors) < 1e-5
    start = csreft.attach(Llama.from_pretrained(BASE), config)
    assert (start.edits.R - adapter.edits.R).abs().max() > 1e-2, "R did not move"
    assert set(adapter.tensors()) == {"csreft.R", "csreft.W", "csreft.b", *(f"csreft.router.{n}" for n in (
        "0.weight", "0.bias", "2.weight", "2.bias"))}
    save_file(adapter.tensors(), tmp_path / "a.safetensors")
    start.load_tensors(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(start.edits.R, adapter.edits.R) and start.orthonormality_error() < 1e-5


@pytest.mark.parametrize("route_on", ["prompt_mean", "last_token", "first_token"])
@torch.no_grad()
def test_gates_depend_on_the_prompt_alone(route_on):
    model = tiny()
    csreft.attach(model, csreft_config(route_on=route_on))
    perturb(model, 0.5)
    model.eval()

    def gates(rows, prompts):
        batch = data.collate([data.Encoded(r, [-100] * len(r), p, 0) for r, p in zip(rows, prompts)], 0)
        ctx = Context(prompt_mask=batch.prompt_mask)
        model(batch.ids, ctx=ctx)
        return ctx.memory["gates"]

    prompt, other = [5, 8, 13, 21], random_ids(model, 1, 30)[0].tolist()
    alone = gates([prompt], [4])[0]
    variants = ([prompt + [7, 7, 2]], [4]), ([prompt + [9], other], [4, 25]), ([prompt, other + [1]], [4, 30])
    for rows, lengths in variants:
        torch.testing.assert_close(gates(rows, lengths)[0], alone, atol=1e-6, rtol=0)
    assert (gates([other], [30])[0] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
def test_the_first_token_cannot_tell_tasks_apart_and_the_prompts_mean_can(tmp_path, route_on):
    """Even when the right gates are taught by label: behind one BOS and one template the first token is always the
    same, so its gates end at the same value for both tasks."""
    out = tmp_path / "run"
    text = cli("train.py", "--method", "csreft", "--tasks", "currency,cipher", "--steps", "40", "--router-lr", "0.03",
               "--supervise-gates", "--route-on", route_on, "--eval-limit", "10", "--out", out).stdout
    note = [line for line in text.splitlines() if line.startswith("note: --route-on")]
    assert len(note) == (route_on == "first_token")
    assert json.loads((out / "results.json").read_text())["report"]["constant_gates"] == (route_on == "first_token")
    table = cli("csreft.py", out, "--eval-limit", "10").stdout.split("score in %")[0].splitlines()
    gates = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in table
             if row.startswith(("currency", "cipher"))}
    apart = max(abs(a - b) for a, b in zip(gates["currency"], gates["cipher"]))
    assert apart == 0 if route_on == "first_token" else apart > 0.2


@pytest.mark.parametrize("positions", ["all", "f2+l2"])
@torch.no_grad()
def test_edited_generation_in_a_batch_equals_one_by_one_and_no_cache(positions):
    model = tiny(torch.float64)
    csreft.attach(model, csreft_config(positions=positions))
    perturb(model, 0.5)
    model.eval()
    prompts = [random_ids(model, 1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6)]

    def no_cache(prompt):
        ids = list(prompt)
        for _ in range(10):
            mask = torch.arange(len(ids))[None] < len(prompt)
            ids.append(model(torch.tensor([ids]), ctx=Context(prompt_mask=mask))[0, -1].argmax().item())
        return ids[len(prompt):]

    wanted = [no_cache(p) for p in prompts]
    assert model.generate(prompts, 10) == wanted == [model.generate([p], 10)[0] for p in prompts]
    assert wanted != tiny(torch.float64).generate(prompts, 10), "the edits changed nothing: the test shows nothing"


def test_gate_penalties_are_what_they_say():
    model = tiny()
    adapter = csreft.attach(model, csreft_config(sparsity=0.5, supervise_gates=True))
    ctx = Context(tasks=torch.tensor([0, 1, 5]))
    model.train()
    model(random_ids(model), ctx=ctx)
    gates = ctx.memory["gates"].tolist()
    own = [0, 1, 2]  # 5 mod 3
    bce = -sum(math.log(g if n == own[b] else 1 - g) for b, row in enumerate(gates) for n, g in enumerate(row)) / 9
    assert adapter.penalty(ctx).item() == pytest.approx(0.5 * sum(map(sum, gates)) / 9 + bce, abs=1e-5)
    assert csreft.attach(tiny(), csreft_config()).penalty(ctx) == 0


def test_parameters_at_published_sizes():
    text = cli("csreft.py", "--count", "llama-2-7b").stdout
    assert "6,738,415,616" in text and "262,176" in text and "0.0039 %" in text
    assert "8,398,852" in text and "0.1246 %" in text and "0.0098 %" in text
    text = cli("multilora.py", "--count", "llama-2-7b", "--modules", "2").stdout  # 32 (4 x 8,192 + 3 x 15,104) n r
    assert "159,907,840" in text and "2.37 %" in text and f"{159_907_840 + 2 * 1_359_872:,}" in text
    assert "llama-2-7b" in one_line_error("multilora.py")


# ---------------------------------------------------------------------------------------------- CoFiTune


def cofitune_config(**changes):
    chosen = {"layers": "all", "modules": "q_proj,v_proj,up_proj,down_proj"}
    return cofitune.Config(**{**chosen, "importance_batches": 2, **changes})


def batches(model, count=2, batch=3):
    for i in range(count):
        ids = random_ids(model, batch, 9, seed=10 + i)
        labels = ids.clone()
        labels[:, :4] = -100
        yield data.Batch(ids, labels, (labels == -100), torch.zeros(batch, dtype=torch.long))


def test_importance_equals_finite_differences():
    """Oracle: a mask on a unit's output is a factor on the unit's rows of weight and bias, so the derivative of the KL
    is taken by moving those rows, with the same dropout drawn again."""
    model = tiny(torch.float64, num_key_value_heads=2, attention_bias=True)
    linears = find_linears(model, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])
    torch.manual_seed(3)
    got = cofitune.importance(model, linears, batches(model, 2), 0.2)

    handles = []
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            handles.append(block.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.2, True)))

    @torch.no_grad()
    def losses():
        torch.manual_seed(3)
        out = []
        for batch in batches(model, 2):
            log_p = [model(batch.ids)[:, :-1].log_softmax(-1) for _ in range(2)]
            kl = (log_p[1].exp() * (log_p[1] - log_p[0])).sum(-1)
            wanted = batch.labels[:, 1:] != -100
            out.append((kl * wanted).sum().item() / wanted.sum().item())
        return out

    for name, linear in linears.items():
        heads = name.endswith(("q_proj", "k_proj", "v_proj"))
        rows = 8 if heads else 1
        count = linear.out_features // rows
        assert got[name].shape == (count,), name
        raw = []
        for u in range(count):
            part, slopes = slice(u * rows, (u + 1) * rows), []
            for sign in (1, -1):
                with torch.no_grad():
                    kept = [p[part].clone() for p in linear.parameters()]
                    for p in linear.parameters():
                        p[part] *= 1 + sign * 1e-5
                    slopes.append(losses())
                    for p, old in zip(linear.parameters(), kept):
                        p[part] = old
            raw.append(sum(abs(a - b) / 2e-5 for a, b in zip(*slopes)) / 2)
        mean = sum(raw) / count
        deviation = math.sqrt(sum((r - mean) ** 2 for r in raw) / count)
        wanted = [abs(math.tanh((r - mean) / deviation)) for r in raw]
        assert got[name].tolist() == pytest.approx(wanted, abs=1e-4), name
        assert 0 <= got[name].min() and got[name].max() <= 1


@pytest.mark.parametrize("mask_on", ["update", "grad"])
def test_the_mask_scales_exactly_the_rows_of_a_unit(mask_on):
    """One step of plain gradient descent with weight decay on non-square weights and grouped queries."""
    moves = {}
    for on in ("none", mask_on):
        model = tiny(torch.float64, num_key_value_heads=2, attention_bias=True)
        config = cofitune_config(mask_on=on, modules="q_proj,k_proj,v_proj,up_proj,down_proj")
        torch.manual_seed(0)
        adapter = cofitune.attach(model, config)
        adapter.prepare(batches(model))
        old = {name: p.detach().clone() for name, p in adapter.trained.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.0 if mask_on == "grad" else 0.3)
        for batch in batches(model):
            model(batch.ids, batch.labels).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        moves[on] = {name: p.detach() - old[name] for name, p in adapter.trained.items()}
    importance = {k: t for k, t in adapter.tensors().items() if k.startswith("importance.")}
    assert len(importance) == 10
    for name, move in moves[mask_on].items():
        module, key = name.rsplit(".", 1)
        score, free = importance[f"importance.{module}"], moves["none"][name]
        rows = {"q_proj": 8, "k_proj": 8, "v_proj": 8}.get(module.rsplit(".", 1)[1], 1)
        assert len(score) * rows == len(move), name
        for row in range(len(move)):
            torch.testing.assert_close(move[row], (1 - score[row // rows]) * free[row], atol=1e-12, rtol=1e-9)
        assert free.abs().max() > 0 and (move - free).abs().max() > 0, name


def test_a_random_mask_has_the_same_values_on_other_units():
    tensors = {}
    for source in ("importance", "random"):
        model = tiny()
        torch.manual_seed(0)
        adapter = cofitune.attach(model, cofitune_config(mask_source=source))
        adapter.prepare(batches(model))
        tensors[source] = {k: t for k, t in adapter.tensors().items() if k.startswith("importance.")}
    for name, score in tensors["importance"].items():
        torch.testing.assert_close(tensors["random"][name].sort().values, score.sort().values)
    name = "importance.model.layers.1.mlp.up_proj"
    assert not torch.equal(tensors["random"][name], tensors["importance"][name])


def test_adam_cancels_a_constant_factor_on_the_gradient():
    """Why --mask-on update is the default. Total update (summed length of all steps) of the same run with every
    gradient times 0.25: unchanged. With every update times 0.25: about a third, since slower progress leaves larger
    gradients."""
    def total_update(factor_on_gradient, factor_on_update):
        model, total = tiny(), 0.0
        params = list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
        for _ in range(20):
            for batch in batches(model):
                optimizer.zero_grad()
                model(batch.ids, batch.labels).backward()
                old = [p.detach().clone() for p in params]
                with torch.no_grad():
                    for p in params:
                        p.grad.mul_(factor_on_gradient)
                    optimizer.step()
                    for p, before in zip(params, old):
                        p.copy_(before + factor_on_update * (p - before))
                total += math.sqrt(sum((p - q).square().sum().item() for p, q in zip(params, old)))
        return total

    free = total_update(1.0, 1.0)
    assert total_update(0.25, 1.0) / free == pytest.approx(1.0, abs=0.01)
    assert 0.25 <= total_update(1.0, 0.25) / free < 0.4


def test_nothing_outside_the_choice_moves_or_is_saved():
    config = cofitune_config(layers="25%-50%", modules="up_proj,down_proj")
    model, adapter = trained_on_builtin(cofitune, config, lr=1e-3)
    base, after = load_file(BASE / "model.safetensors"), model.state_dict()
    chosen = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (2, 3) for m in ("up", "down")}
    for name, tensor in base.items():
        assert torch.equal(after[name], tensor) == (name not in chosen), name
    assert set(adapter.tensors()) == chosen | {f"importance.{n.removesuffix('.weight')}" for n in chosen}


def test_no_backward_computation_below_the_lowest_trained_layer():
    model = tiny(num_hidden_layers=4)
    cofitune.attach(model, cofitune_config(layers="2,3", modules="down_proj", mask_on="none"))
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, h: states.append(h))
    ids = random_ids(model)
    loss = model(ids, ids)
    assert [h.requires_grad for h in states] == [False, False, True, True]
    leaves, seen, queue = set(), set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        queue += [parent for parent, _ in node.next_functions]
    assert leaves == {id(model.model.layers[i].mlp.down_proj.weight) for i in (2, 3)}


def test_sft_trains_everything_and_l2_pulls_back():
    model = tiny(tie_word_embeddings=True)
    config = replace(train.find_methods()["sft"][1], l2_to_base=0.5)
    adapter = cofitune.attach(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert adapter.penalty(Context()) == 0
    perturb(model, 0.1)
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), tiny(tie_word_embeddings=True).parameters()))
    assert adapter.penalty(Context()).item() == pytest.approx(0.5 * moved.item(), rel=1e-4)


def test_the_tree_search_walks_to_the_best_node():
    """plan() on a made-up landscape: it must follow the best range, quarter and modules, and score nothing twice."""
    asked = []

    class Trial:
        def __call__(self, config, steps):
            assert config.mask_on == "none" and steps == 7
            asked.append((config.layers, config.modules))
            return {"25%-75%": 30, "25%-50%": 40}.get(config.layers, 10), {
                "gate_proj,up_proj,down_proj": 50, "up_proj,down_proj": 60}.get(config.modules, 20)

        def estimate(self, config, steps):
            return 1.0

    chosen = cofitune.plan(cofitune.Config(search_steps=7), LlamaConfig(96, 32, 48, 8, 4), Trial())
    assert (chosen.layers, chosen.modules, chosen.mask_on) == ("25%-50%", "up_proj,down_proj", "update")
    assert len(asked) == len(set(asked)) == 6 + 2 + 3
    fixed = cofitune.Config(layers="3,9")
    assert cofitune.plan(fixed, None, None) is fixed


SEARCH = ("train.py", "--method", "cofitune", "--tasks", "currency", "--steps", "3", "--search-steps", "2",
          "--batch-size", "4", "--eval-limit", "4", "--importance-batches", "2")


def test_a_search_of_two_layers_skips_the_empty_quarters():
    class Trial:
        seen = []
        estimate = lambda self, config, steps: 1.0

        def __call__(self, config, steps):
            assert parse_layers(config.layers, 2)
            self.seen.append((config.layers, config.modules))
            return len(self.seen), 0.0

    chosen = cofitune.plan(cofitune.Config(), LlamaConfig(96, 32, 48, 2, 4), Trial())
    assert ("75%-100%", cofitune.KINDS["FFN"]) in Trial.seen and "50%-75%" not in dict(Trial.seen)
    assert (chosen.layers, chosen.modules) == Trial.seen[-1]


def test_a_killed_search_resumes_and_chooses_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    text = cli(*SEARCH, "--out", whole).stdout
    assert "tree search" in text and "*" in text and "nodes" in text
    process = subprocess.Popen([sys.executable, *SEARCH, "--out", str(killed)], cwd=HERE, stdout=subprocess.DEVNULL)
    while not (killed / "search.json").exists() or len(json.loads((killed / "search.json").read_text())["trials"]) < 4:
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((killed / "search.json").read_text())["trials"]
    changed = [*SEARCH, "--out", killed, "--lr", "0.5"]
    assert "already holds" in one_line_error(*changed)
    cli(*SEARCH, "--out", killed)
    after, wanted = (json.loads((folder / "search.json").read_text())["trials"] for folder in (killed, whole))
    assert after[: len(before)] == before, "a scored node was trained again"
    strip = lambda trials: [{k: v for k, v in t.items() if k != "seconds"} for t in trials]
    assert strip(after) == strip(wanted)
    chosen = [json.loads((folder / "config.json").read_text())["method_settings"] for folder in (killed, whole)]
    assert chosen[0] == chosen[1] and chosen[0]["layers"] != "search"


def test_counts_at_published_sizes():
    for name, billions in (("llama-2-7b", 0.72), ("llama-2-13b", 1.42), ("llama-33b", 3.58)):
        text = cli("cofitune.py", "--count", name).stdout
        number = int(re.search(r"([\d,]+) of", text.split(": ", 2)[-1]).group(1).replace(",", ""))
        assert number / 1e9 == pytest.approx(billions, abs=0.005), text


# ---------------------------------------------------------------------------------------------- the command line

QUICK = ("--tasks", "currency,cipher", "--steps", "12", "--batch-size", "8", "--eval-limit", "10", "--log-every", "3")


def test_a_run_leaves_what_it_promises(runs):
    out = runs("--method", "multilora", *QUICK)
    results, config = (json.loads((out / name).read_text()) for name in ("results.json", "config.json"))
    for key in ("method", "seed", "base", "steps", "trainable_parameters", "total_parameters", "seconds",
                "peak_memory_bytes", "tasks", "speciality", "versatility", "uni", "report"):
        assert key in results, key
    assert results["total_parameters"] == sum(t.numel() for t in load_file(BASE / "model.safetensors").values())
    new = {t: s for t, s in results["tasks"].items() if s["group"] == "new"}
    general = {t: s for t, s in results["tasks"].items() if s["group"] == "general"}
    assert set(new) == {"currency", "cipher"} and len(general) >= 8
    assert results["speciality"] == pytest.approx(sum(s["after"] for s in new.values()) / 2)
    assert results["uni"] == pytest.approx(results["speciality"] + results["versatility"])
    assert {s["aspect"] for s in general.values()} == {"knowledge", "reasoning", "instruction"}
    assert config["settings"]["steps"] == 12 and "--tasks currency,cipher" in config["command"]
    assert config["versions"]["torch"] == torch.__version__ and len(config["base_sha256"]) == 64
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12] and lines[-1]["loss"] < lines[0]["loss"]
    assert load_file(out / "adapter.safetensors")
    model, _, _, _ = train.load_run(out)
    assert not torch.equal(model(torch.tensor([[1, 5, 9]])), Llama.from_pretrained(BASE)(torch.tensor([[1, 5, 9]])))


def test_the_same_command_writes_the_same_bytes(runs, tmp_path):
    first = runs("--method", "multilora", *QUICK)
    cli("train.py", "--method", "multilora", *QUICK, "--out", tmp_path / "b")
    cli("train.py", "--method", "multilora", *QUICK, "--seed", "1", "--out", tmp_path / "c")
    weights = [(folder / "adapter.safetensors").read_bytes() for folder in (first, tmp_path / "b", tmp_path / "c")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-9), ("float32", 1e-6)])
def test_gradient_accumulation_equals_one_large_batch(runs, dtype, bound):
    """Exactly so in float64. In float32 the rounding of the gradients, which Adam divides by their size, adds up: these
    two tasks stay within 1e-6 for ten steps, all six together drift to about 1e-5."""
    common = ("--method", "multilora", "--tasks", "currency,cipher", "--steps", "10", "--eval-limit", "2",
              "--log-every", "1", "--dtype", dtype)
    large = runs(*common, "--batch-size", "32")
    small = runs(*common, "--batch-size", "8", "--grad-accum", "4")
    losses = [[json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")] for folder in (large, small)]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], abs=bound)


def test_gradient_checkpointing_is_the_same_training(runs, tmp_path):
    config, method_config = train.parse(["--method", "csreft", "--grad-checkpointing", "--base", str(BASE), "--out",
                                         str(tmp_path)], train.find_methods())
    assert train.open_job(config, "csreft", method_config).start(method_config)[0].model.checkpointing
    plain, again = (runs("--method", "csreft", *QUICK, *flag) for flag in ((), ("--grad-checkpointing",)))
    a, b = (load_file(out / "adapter.safetensors") for out in (plain, again))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_every_method_trains_float32_tensors_beside_a_bfloat16_base(name):
    """What a GPU does by default, here on the CPU: importance, penalties, loss and scoring under autocast."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, steps=3, dtype=torch.bfloat16)
    for p in model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    assert all(t.isfinite().all() for t in adapter.tensors().values())
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    tests = {"add": data.encode(data.generate("add", "test")[:5], tokenizer, list(data.TASKS))}
    assert 0 <= train.evaluate(model, tests, tokenizer, {"add": "exact"})["add"]["exact match"] <= 100


def test_an_existing_run_is_never_overwritten_silently(runs):
    out = runs("--method", "multilora", *QUICK)
    before = (out / "results.json").read_bytes()
    assert "--overwrite" in one_line_error("train.py", "--method", "multilora", *QUICK, "--out", out)
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("args, names", [
    (["--method", "multilora", "--rnak", "3"], ["--rnak", "did you mean --rank"]),
    (["--method", "multilora", "--rank", "0"], ["--rank is 0"]),
    (["--method", "multilora", "--rank", "many"], ["--rank", "many"]),
    (["--method", "multilora", "--lr", "-1"], ["--lr is -1"]),
    (["--method", "multilora", "--lr", "nan"], ["--lr is nan"]),
    (["--method", "multilora", "--targets", "q_prj"], ["'q_prj' matches no linear layer", "q_proj", "down_proj"]),
    (["--method", "multilora", "--targets", ""], ["no target", "q_proj"]),
    (["--method", "multilora", "--scaling", "matrix"], ["vector", "scalar"]),
    (["--method", "multilora", "--base", "nowhere"], ["nowhere", "checkpoint"]),
    (["--method", "multilora", "--tasks", "currency,juggling"], ["'juggling'", "currency", "cipher"]),
    (["--method", "multilora", "--device", "abacus"], ["abacus"]),
    (["--method", "multilora", "--steps", "0"], ["--steps is 0"]),
    (["--method", "csreft", "--rank", "40"], ["--rank 40", "128"]),
    (["--method", "csreft", "--layers", "3,8"], ["layers '3,8'", "0 to 7"]),
    (["--method", "csreft", "--positions", "x5"], ["--positions 'x5'", "f5+l5"]),
    (["--method", "csreft", "--threshold", "1.5"], ["--threshold is 1.5"]),
    (["--method", "csreft", "--no-router", "--supervise-gates"], ["--supervise-gates"]),
    (["--method", "cofitune", "--layers", "90%-10%"], ["90%-10%"]),
    (["--method", "cofitune", "--layers", "49%-51%"], ["49%-51%", "none of the model's 8 layers"]),
    (["--method", "cofitune", "--layers", "all", "--modules", "up_prj"], ["'up_prj'", "up_proj"]),
    (["--method", "sft", "--mask-on", "update"], ["--mask-on none"]),
    (["--method", "sft", "--replay", "1"], ["--replay"]),
    (["--method", "dreamlora"], ["'dreamlora'", "multilora", "lora"]),
    (["--steps", "5"], ["--method", "multilora"]),
    (["--method", "multilora", "--pretrain"], ["--pretrain"]),
])
def test_a_mistake_is_one_clear_line(tmp_path, args, names):
    steps = [] if "--steps" in args else ["--steps", "1"]
    message = one_line_error("train.py", *args, *steps, "--out", tmp_path / "out")
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists(), "a refused run must leave nothing behind"


def test_help_shows_a_methods_own_flags_and_defaults():
    text = cli("train.py", "--method", "lora", "--help").stdout
    for expected in ("--grad-accum", "--eval-split", "--modules", "--scaling", "(12)", "--method lora"):
        assert expected in text, expected
    assert "--modules" in cli("train.py", "--help").stdout


def test_a_new_file_is_a_new_method(tmp_path):
    """The README's example, dropped beside train.py, without another line changed."""
    for name in (*SOURCES, "base"):
        source = HERE / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    code = re.search(r"```python\n(# gains\.py\n.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    assert len(code.splitlines()) < 60
    (tmp_path / "gains.py").write_text(code)
    assert "--norms" in cli("train.py", "--method", "gains", "--help", cwd=tmp_path).stdout
    cli("train.py", "--method", "gains", *QUICK, cwd=tmp_path)
    out = tmp_path / "out" / "gains"
    tensors = load_file(out / "adapter.safetensors")
    assert len(tensors) == 17 and all(name.endswith("norm.weight") for name in tensors)
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "gains" and results["trainable_parameters"] == 17 * 128
    metrics = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1] < metrics[0]


def test_programs_show_their_subject(runs):
    out = runs("--method", "multilora", *QUICK)
    text = cli("multilora.py", out).stdout
    for kind in multilora.LINEARS:
        assert re.search(rf"^{kind} +0\.\d+ +\d+\.\d+", text, re.M), text
    assert "first share" in text and "eff. rank" in text
    text = cli("data.py").stdout
    for name in data.TASKS:
        assert re.search(rf"^{name} ", text, re.M), name
    assert "[</s>]" in text
    text = cli("model.py", "base", "What is 21 + 34?").stdout
    assert text.splitlines()[0] == "55" and "tokens/s" in text
    said = [cli("model.py", "base", "Hi", "--adapter", out, "--temperature", "3", "--seed", seed).stdout.splitlines()[0]
            for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert "no adapter.safetensors" in one_line_error("multilora.py", "base")
    assert "nowhere" in one_line_error("model.py", "nowhere", "Hello")


def test_the_base_knows_the_general_tasks_and_not_the_new_ones(runs):
    """What README claims of base/, on 50 unseen prompts of each task."""
    results = json.loads((BASE / "pretraining" / "results.json").read_text())
    assert results["versatility"] >= 97 and all(s["group"] == "general" for s in results["tasks"].values())
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    names = list(data.TASKS)
    tests = {t: data.encode(data.generate(t, "test")[:50], tokenizer, names) for t in names}
    scores = train.evaluate(model, tests, tokenizer, dict.fromkeys(names, "exact"))
    assert train.mean([scores[t]["exact match"] for t in data.GENERAL]) >= 97
    assert train.mean([scores[t]["exact match"] for t in data.NEW]) < 10
    assert train.mean([scores[t]["exact match"] for t in data.HARD]) < 10


# ---------------------------------------------------------------------------------------------- reproduction


def test_the_sign_test_equals_counting_all_outcomes():
    """Oracle: of all patterns of wins and losses, the share with at least as many wins. Ties are left out."""
    for differences in ([1.0] * 5, [1, -2, 3, 4, 5], [0.0, 1, -1, 2], [-1.0, -2, -3, -4, -5, -6], [0.0, 0.0]):
        kept = [d for d in differences if d]
        patterns = list(itertools.product((1, -1), repeat=len(kept)))
        share = lambda sign: sum(p.count(sign) >= sum(d * sign > 0 for d in kept) for p in patterns) / len(patterns)
        assert compare.sign_test(differences) == (share(1), share(-1))
    assert compare.sign_test([1.0] * 5)[0] == 1 / 32
    for ours, verdict in (([2] * 5, "holds"), ([0] * 5, "does not hold"), ([2, 2, 2, 2, 0], "undecided")):
        assert compare.judge("", range(5), ours, [1] * 5)["verdict"] == verdict
    for lower, verdict in ((98.0, "holds"), (97.9, "undecided")):  # more than two points below is not about equal
        claim = compare.judge("", range(5), [2] * 5, [1] * 5, "points", [[lower] * 5, [100.0] * 5])
        assert claim["verdict"] == verdict
        claim = compare.judge("", range(5), [1] * 5, [2] * 5, "points", [[100.0] * 5, [lower] * 5])
        assert claim["verdict"] == verdict.replace("holds", "does not hold")
    assert compare.band([1.0, 2.0, 3.0]) == [0.0, 4.0] and compare.band([5.0]) == [5.0, 5.0]


def test_published_verdicts_and_tables_follow_from_the_stored_figures():
    """No verdict and no table of README is typed by hand."""
    stored = json.loads(compare.STORED.read_text())
    for name in [key for key in stored if key.startswith(tuple(compare.CLAIMS))]:
        section = stored[name]
        assert len(section["claims"][0]["seeds"]) >= 5 and section["tried"] == compare.TRIED[name]
        assert not {stored["tune"]["seed"], compare.CHOSEN_WITH} & set(section["claims"][0]["seeds"])
        for claim in section["claims"]:
            given = (claim[key] for key in ("statement", "seeds", "ours", "theirs", "unit", "speciality"))
            assert compare.judge(*given) == claim
    for section in ("compare", "quick"):
        for row in stored[section]["rows"].values():
            for figure in ("speciality", "versatility"):
                values = [results[figure] for results in row["seeds"].values()]
                assert len(values) >= 5 and row[figure] == [statistics.mean(values), statistics.stdev(values)]
                assert row["band"][figure] == compare.band(values)
    rows = [("section", "row", "seed", "figure", "value"), *compare.flat(stored)]
    with open(compare.STORED.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [[str(cell) for cell in row] for row in rows]
    for name, row in stored["tune"]["grid"].items():
        assert stored["tune"]["best"][name] == compare.best_rate(row)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert set(table.TABLES) == set(re.findall(r"<!-- table: ([\w-]+) -->", readme))
    assert table.rewritten(readme, stored) == readme, "run python reproduce/table.py --readme"


def test_a_quick_comparison_survives_a_kill_lands_in_its_published_band_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the band is a CPU's
    command = ["reproduce/compare.py", "multilora", "--seeds", "1", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    folder = tmp_path / "quick-multilora-test-11"
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.DEVNULL)
    for _ in range(3000):
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    size = (folder / "metrics.jsonl").stat().st_size
    time.sleep(3)
    assert (folder / "metrics.jsonl").stat().st_size == size, "the run goes on without its parent"
    assert not (folder / "results.json").exists()

    assert "1 of 1 runs to make" in cli(*command).stdout
    row = json.loads((tmp_path / "compare.json").read_text())["quick"]["rows"]["multilora"]
    band = json.loads(compare.STORED.read_text())["quick"]["rows"]["multilora"]["band"]
    for figure in ("speciality", "versatility"):
        assert band[figure][0] <= row[figure][0] <= band[figure][1], figure
    assert f",{row['speciality'][0]}" in (tmp_path / "compare.csv").read_text()
    written = (folder / "results.json").stat().st_mtime_ns
    assert "to make" not in cli(*command).stdout and (folder / "results.json").stat().st_mtime_ns == written
    settings = json.loads((folder / "run.json").read_text())
    settings["settings"]["steps"] += 1
    (folder / "run.json").write_text(json.dumps(settings))
    assert "run with other settings" in one_line_error(*command)


def test_wise_ft_runs_from_the_base_to_sft(runs, tmp_path, monkeypatch):
    """Weight 0 scores as the base does and weight 1 as the run does."""
    flags = ("--tasks", "tool", "--steps", "30", "--batch-size", "8", "--eval-limit", "20")
    source = runs("--method", "sft", *flags)
    shutil.copytree(source, tmp_path / "sft-test-0")
    (tmp_path / "sft-wise-test-0").mkdir()
    monkeypatch.setattr(compare, "WISE_WEIGHTS", (0.0, 0.5, 1.0))
    run = compare.Run("sft", " ".join(("--method", "sft", *flags)), 0, kind="wise")
    compare.wise(run, tmp_path / "sft-wise-test-0")
    points = json.loads((tmp_path / "sft-wise-test-0" / "results.json").read_text())["points"]
    results = json.loads((source / "results.json").read_text())
    before = [s["before"] for s in results["tasks"].values() if s["group"] == "general"]
    assert points[0]["versatility"] == pytest.approx(train.mean(before))
    assert points[2]["versatility"] == pytest.approx(results["versatility"])
    assert results["versatility"] < points[1]["versatility"] <= points[0]["versatility"]


def test_a_task_alone_is_a_run_on_that_task(runs, tmp_path, monkeypatch):
    """Oracle: the command line with --tasks and as many steps as the task's share of the run on all of them."""
    monkeypatch.setattr(data, "NEW", {task: data.NEW[task] for task in ("tool", "cipher")})
    flags = "--method loreft --tasks tool,cipher --steps 40 --batch-size 24 --eval-limit 20"
    compare.alone(compare.Run("loreft", flags, 0), tmp_path)
    scores = json.loads((tmp_path / "results.json").read_text())["alone"]
    for task in ("tool", "cipher"):
        one = runs("--method", "loreft", "--tasks", task, "--steps", "20", "--batch-size", "24", "--eval-limit", "20")
        assert json.loads((one / "results.json").read_text())["tasks"][task]["after"] == scores[task]


def test_the_pictures_are_drawn_from_the_stored_figures(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(HERE / "reproduce", tmp_path / "reproduce")
    for picture in (tmp_path / "reproduce" / "results").glob("*.png"):
        picture.unlink()
    cli(tmp_path / "reproduce" / "figures.py")
    drawn = {picture.name for picture in (tmp_path / "reproduce" / "results").glob("*.png")}
    assert len(drawn) == 8 and drawn == {picture.name for picture in (HERE / "reproduce" / "results").glob("*.png")}
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"reproduce/results/{name}" in readme for name in drawn)


# ---------------------------------------------------------------------------------------------- real files


@needs_real
@pytest.mark.parametrize("method, args", [("multilora", []), ("csreft", []), ("cofitune", ["--layers", "all"])])
def test_every_method_learns_real_instructions_on_a_real_checkpoint(runs, tmp_path, method, args):
    """The held-out loss falls, the saved run scores the same again, and what is exported has the same logits."""
    out = runs("--method", method, *args, "--base", TINY, "--data", REAL / "alpaca" / "alpaca_en_demo.json",
               "--template", "alpaca", "--steps", "30", "--batch-size", "8", "--lr", "2e-3", "--eval-limit", "20")
    results = json.loads((out / "results.json").read_text())
    row = results["tasks"]["alpaca_en_demo"]
    assert row["after"] < row["before"] - 0.1 and results["speciality"] is None
    assert row["figures"]["perplexity"][1] == pytest.approx(math.exp(row["after"]))
    again = tmp_path / "again"
    cli("train.py", "--eval-only", "--adapter", out, "--data", REAL / "alpaca" / "alpaca_en_demo.json", "--eval-limit",
        "20", "--out", again)
    assert json.loads((again / "results.json").read_text())["tasks"]["alpaca_en_demo"]["after"] == pytest.approx(
        row["after"], abs=1e-5)

    if method == "csreft":
        assert "cannot be merged" in one_line_error("model.py", TINY, "--adapter", out, "--save", tmp_path / "merged")
        assert "only MultiLoRA and LoRA" in one_line_error("multilora.py", out, "--export-peft", tmp_path / "peft")
        return
    cli("model.py", TINY, "--adapter", out, "--save", tmp_path / "merged")
    assert "holds something" in one_line_error("model.py", TINY, "--adapter", out, "--save", tmp_path / "merged")
    transformers = pytest.importorskip("transformers")
    model = train.load_run(out)[0]
    ids = random_ids(model, 2, 40)
    with torch.no_grad():
        wanted, plain = model(ids), Llama.from_pretrained(TINY)(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-4, rtol=0)
    assert (wanted - plain).abs().max() > 1e-2
    ours = data.Tokenizer.from_pretrained(TINY).encode("Once upon a time")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("Once upon a time").input_ids == ours


@pytest.mark.parametrize("method", ["multilora", "lora"])
def test_an_exported_peft_adapter_has_the_same_logits(runs, tmp_path, method):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out = runs("--method", method, *QUICK)
    cli("multilora.py", out, "--export-peft", tmp_path / "peft")
    assert "is there already" in one_line_error("multilora.py", out, "--export-peft", tmp_path / "peft")
    model = train.load_run(out)[0]
    ids = random_ids(model, 2, 20)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)
        assert (model(ids) - Llama.from_pretrained(BASE)(ids)).abs().max() > 1e-3
    assert theirs.peft_config["default"].r == 12


@needs_real
def test_a_mixture_of_real_tasks_trains_and_is_scored(runs):
    files = REAL / "superglue/BoolQ/val.jsonl", REAL / "superglue/RTE/val.jsonl", REAL / "gsm8k/train-first-3000.jsonl"
    out = runs("--method", "multilora", "--base", TINY, "--data", *files, "--mix", "equal", "--steps", "4",
               "--batch-size", "8", "--eval-limit", "8", "--max-new-tokens", "48")
    results = json.loads((out / "results.json").read_text())
    assert {task: (row["score"], list(row["figures"])) for task, row in results["tasks"].items()} == {
        "BoolQ": ("choice", ["choice", "choice, by byte"]), "RTE": ("choice", ["choice", "choice, by byte"]),
        "gsm8k": ("gsm8k", ["final answer"])}
    assert results["speciality"] == pytest.approx(sum(row["after"] for row in results["tasks"].values()) / 3)


@needs_real
def test_model_outputs_are_alpaca_evals(tmp_path):
    source = REAL / "alpaca_eval" / "gpt3_alpaca.json"
    cli("model.py", TINY, "--prompts", source, "--template", "alpaca", "--max-new-tokens", "6", "--generator", "tiny",
        "--outputs", tmp_path / "model_outputs.json")
    outputs, wanted = (json.loads(f.read_text()) for f in (tmp_path / "model_outputs.json", source))
    assert [(o["dataset"], o["instruction"]) for o in outputs] == [(w["dataset"], w["instruction"]) for w in wanted]
    assert len(outputs) == 805 and {tuple(o) for o in outputs} == {("dataset", "instruction", "output", "generator")}
    assert {o["generator"] for o in outputs} == {"tiny"} and len({o["output"] for o in outputs}) > 100
    tokenizer, model = data.Tokenizer.from_pretrained(TINY), Llama.from_pretrained(TINY)
    prompt = tokenizer.encode(data.TEMPLATES["alpaca"].opening(wanted[3]["instruction"]))
    assert outputs[3]["output"] == tokenizer.decode(model.generate([prompt], 6, tokenizer.stop_ids)[0]).strip()


@pytest.mark.parametrize("args, names", [
    (["--data", "none.json"], ["none.json", "cannot be read"]),
    (["--data", "odd.json"], ["odd.json", "the fields colour match no format", "alpaca", "mmlu"]),
    (["--data", "empty.json"], ["empty.json holds no records"]),
    (["--data", "pairs.json", "builtin"], ["builtin or files"]),
    (["--data", "pairs.json", "--tasks", "currency"], ["--tasks"]),
    (["--data", "pairs.json", "--replay", "0.1"], ["--replay"]),
    (["--eval-data", "pairs.json"], ["--eval-data"]),
    (["--template", "alpaca"], ["--template"]),
    (["--data", "pairs.json", "pairs=boolq.json"], ["two files of task 'pairs'", "NAME=FILE"]),
    (["--data", "pairs.json", "--general-data", "pairs.json"], ["'pairs' is both general and to be learned"]),
    (["--data", "boolq.json", "--shots", "3"], ["--shot-data"]),
    (["--data", "boolq.json", "--shots", "3", "--shot-data", "few=boolq.json"], ["--shots 3", "'boolq'"]),
    (["--data", "pairs.json", "--eval-data", "boolq.json", "--eval-split", "validation"], ["--eval-data"]),
    (["--data", "bad.csv", "--skip-bad-rows"], ["bad.csv holds no record", "1 columns"]),
    (["--data", "pairs.json", "--max-length", "3", "--too-long", "drop"], ["longer than --max-length 3"]),
    (["--data", "pairs.json", "--template", "chatty"], ["chatty", "alpaca", "llama3"]),
    (["--data", "pairs.json", "--method", "cofitune"], ["--general-data", "--layers 25%-50%"]),
    (["--data", "pairs.json", "--adapter", "x"], ["--eval-only"]),
])
def test_a_mistake_about_data_is_one_clear_line(tmp_path, args, names):
    written(tmp_path / "pairs.json", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(40)])
    written(tmp_path / "boolq.json", [{**PASSAGE, "label": True}] * 40)
    written(tmp_path / "odd.json", [{"colour": "red"}])
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.csv").write_text("prompt,answer\nonly one\n")
    method = [] if "--method" in args else ["--method", "multilora"]
    message = one_line_error(HERE / "train.py", *method, *args, "--base", BASE, "--steps", "1", cwd=tmp_path)
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists(), "a refused run must leave nothing behind"
