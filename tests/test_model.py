"""The model: against transformers, against loops written out, and what it refuses to load."""

import json
import math
import random
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import csreft
import data
from base import suite as builtin
from model import Context, Llama, LlamaConfig, UserError, parse_layers, rope_frequencies
from tests.helpers import BASE, greedy_without_cache, perturb, random_ids, refused, their_logits, tiny

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
        raw["num_key_value_heads"] = rng.choice([raw["num_key_value_heads"], None])  # None: as many as heads
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


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 200), marks=pytest.mark.slow)])
def test_200_random_checkpoints_agree_with_transformers_both_ways(tmp_path, seeds):
    for seed in seeds:
        raw, written = random_checkpoint(random.Random(seed))
        theirs, own = tmp_path / f"{seed}-theirs", tmp_path / f"{seed}-ours"
        write_checkpoint(theirs, raw, seed=seed, **written)
        ids = torch.randint(0, raw["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
        ours, wanted = Llama.from_pretrained(theirs), their_logits(theirs, ids)
        close = partial(torch.testing.assert_close, atol=1e-4, rtol=0, msg=lambda text: f"{raw}, {written}\n{text}")
        with torch.no_grad():
            close(ours(ids), wanted)
        ours.save_pretrained(own)
        close(their_logits(own, ids), wanted)
        saved = json.loads((own / "config.json").read_text())
        assert saved["tie_word_embeddings"] == raw["tie_word_embeddings"]


def test_base_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE).eval()
    fast = transformers.AutoTokenizer.from_pretrained(BASE)
    for name in builtin.TASKS:
        example = builtin.generate(name, "test")[0]
        text = "".join(segment.text for segment in example.segments)
        ids = tokenizer.encode(text)
        assert fast(text)["input_ids"] == ids and tokenizer.decode(ids[1:]) == text
        with torch.no_grad():
            ours = Llama.from_pretrained(BASE)(torch.tensor([ids]))
            torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0)


def test_rope_scaling_follows_the_published_rules():
    """Written out for each frequency, as the papers' code does it with branches."""
    config = LlamaConfig(8, 64, 8, 1, 1, rope_theta=500000.0, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
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
def test_a_model_whose_numbers_overflow_does_not_generate():
    model = tiny()
    model.model.embed_tokens.weight[1] = torch.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="overflow"):
            model.generate([[1, 2]], 20, (), temperature)


CONFIG, WEIGHTS, INDEX, SHARD = "config.json", "model.safetensors", "model.safetensors.index.json", "1.safetensors"
UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("file, change, words", [
    (CONFIG, {"model_type": "gpt2"}, ["config.json", "model_type is 'gpt2'", "expected 'llama'"]),
    (CONFIG, {"quantization_config": {"bits": 4}}, ["quantization_config is {'bits': 4}", "bfloat16 weights"]),
    (CONFIG, {"hidden_act": "gelu"}, ["hidden_act is 'gelu', expected 'silu'"]),
    (CONFIG, {"model_type": "mistral", "sliding_window": 4096}, ["sliding_window is 4096, expected null"]),
    (CONFIG, {"model_type": "mistral"}, ["sliding_window is None, expected null, written out"]),
    (CONFIG, {"hidden_size": None}, ["hidden_size is None, expected a positive integer"]),
    (CONFIG, {"num_key_value_heads": 3}, ["num_key_value_heads is 3, expected a divisor of num_attention_heads = 4"]),
    (CONFIG, {"head_dim": 7}, ["head_dim is 7, expected an even number"]),
    (CONFIG, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["RoPE type is 'yarn'", "linear or llama3"]),
    (CONFIG, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["RoPE type is 'dynamic'"]),
    (CONFIG, {"rope_scaling": {"rope_type": "linear"}}, ["config.json", "'factor' is missing"]),
    (CONFIG, {"rope_scaling": "linear"}, ["config.json cannot be read"]),
    (CONFIG, "{", ["config.json cannot be read"]),
    (CONFIG, '["llama"]', ["config.json holds a JSON list"]),
    (WEIGHTS, {UP: lambda t: None}, [f"'{UP}' is missing, expected shape (48, 32)"]),
    (WEIGHTS, {UP: lambda t: t.T.contiguous()}, [UP, "of shape (32, 48), expected", "of shape (48, 32)"]),
    (WEIGHTS, {UP: lambda t: t.to(torch.int8)}, ["model.safetensors", UP, "is int8", "quantised"]),
    (WEIGHTS, {BIAS: lambda t: torch.zeros(32)}, [f"'{BIAS}' has no place in the model"]),
    *((WEIGHTS, share, ["model.safetensors is not a complete safetensors file"]) for share in (0, 0.001, 0.5, 1)),
    (WEIGHTS, "pytorch_model.bin", ["no model.safetensors, only pytorch_model.bin", "load and save it with"]),
    *((INDEX, text, [INDEX]) for text in ("{", "[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"x": 1}}')),
    (INDEX, {HEAD: "2.safetensors"}, [INDEX, "names 2.safetensors, which is not in the folder"]),
    (INDEX, {"elsewhere": SHARD}, ["'elsewhere' has no place in the model"]),
    (INDEX, {}, None),
], ids=str)
def test_what_is_wrong_with_a_checkpoint_is_one_line(tmp_path, file, change, words):
    """change: other values, tensors or places than there are; a whole text; the share of the bytes that is there."""
    tiny().save_pretrained(tmp_path)
    whole, place = (tmp_path / WEIGHTS).read_bytes(), tmp_path / file
    tensors = {name: t.clone() for name, t in load_file(tmp_path / WEIGHTS).items()}
    if file == INDEX:
        (tmp_path / WEIGHTS).rename(tmp_path / SHARD)
    if file == WEIGHTS and isinstance(change, dict):
        tensors |= {name: function(tensors.get(name)) for name, function in change.items()}
        save_file({name: t for name, t in tensors.items() if t is not None}, place)
    elif file == WEIGHTS and isinstance(change, str):
        place.rename(tmp_path / change)
    elif file == WEIGHTS:
        place.write_bytes(whole[: int(change * (len(whole) - 1))])
    elif isinstance(change, str):
        place.write_text(change)
    else:
        there = json.loads(place.read_text()) if file == CONFIG else dict.fromkeys(tensors, SHARD)
        place.write_text(json.dumps(there | change if file == CONFIG else {"weight_map": there | change}))
    if words:
        refused(Llama.from_pretrained, tmp_path, *words)
    else:
        Llama.from_pretrained(tmp_path)


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


def test_checkpointing_runs_each_layer_again_and_changes_no_gradient():
    """Of CS-ReFT, whose gates the first layer's pre-hook makes, and all layers' hooks and the penalty read."""
    grads, calls = {}, {False: [], True: []}
    for on in calls:
        model = tiny(torch.float64, num_hidden_layers=3)
        torch.manual_seed(0)
        adapter = csreft.attach(model, csreft.Config(subspaces=2, rank=3, positions="f3+l2", sparsity=0.1))
        perturb(model)
        model.model.checkpointing = on
        model.model.layers[1].self_attn.register_forward_hook(lambda *args, on=on: calls[on].append(1))
        model.train()
        ids = random_ids(model, 4)
        for _ in range(2):  # micro-batches accumulate
            ctx = Context(prompt_mask=torch.arange(ids.shape[1])[None] < torch.tensor([4, 6, 3, 5])[:, None])
            (model(ids, ids, ctx) + adapter.penalty(ctx)).backward()
        grads[on] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert (len(calls[False]), len(calls[True])) == (2, 4)
    for name, wanted in grads[False].items():
        torch.testing.assert_close(grads[True][name], wanted, atol=1e-6, rtol=0)
        assert wanted.abs().max() > 1e-4, f"{name} has no gradient to compare"


def test_layer_ranges():
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("3,1", 4) == [1, 3]
    assert parse_layers("25%-50%", 8) == [2, 3] and parse_layers("25%-50%", 32) == list(range(8, 16))
    quarters = [parse_layers(f"{q}%-{q + 25}%", 22) for q in (0, 25, 50, 75)]
    assert sum(quarters, []) == list(range(22)), "quarters must neither overlap nor leave a layer out"
    for wrong in ("90%-10%", "3,9", "-1", "half", "25-50%-75%", "", "1.5"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(wrong, 8)


def test_a_tied_head_that_differs_counts_as_in_transformers(tmp_path, capsys):
    """And an ignored buffer of another rope_theta is said."""
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    file, ids = tmp_path / "model.safetensors", random_ids(tiny())
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    tensors[HEAD] = tensors[EMBEDDING].roll(1, 0)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    save_file(tensors, file, {"format": "pt"})
    ours = Llama.from_pretrained(tmp_path)
    assert "of another rope_theta than config.json" in capsys.readouterr().out
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), their_logits(tmp_path, ids), atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(Llama.from_pretrained(tmp_path / "again").lm_head.weight, tensors[HEAD])
