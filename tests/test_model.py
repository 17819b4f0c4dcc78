"""The model: against transformers, against loops written out, and what it refuses to load."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import csreft
import data
import multilora
from base import suite as builtin
from model import Context, Llama, LlamaConfig, UserError, parse_layers, rope_frequencies
from tests.helpers import BASE, greedy_without_cache, perturb, random_ids, refused, their_logits, tiny

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


@pytest.mark.slow
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


def test_a_hook_on_the_head_reaches_generation():
    model = tiny()
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.roll(1, -1))
    prompt = [1, 2, 3]
    with torch.no_grad():
        assert model.generate([prompt], 1)[0][0] == model(torch.tensor([prompt]))[0, -1].argmax()


def test_a_context_serves_a_second_pass_and_labels_leave_hidden_states_alone():
    model, ids = tiny(torch.float64), random_ids(tiny())
    where = torch.tensor([3, 5, 14])
    ctx, mask = Context(), torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model(ids, ctx=ctx), model(ids))
        assert torch.equal(model(ids[:, :4], ctx=ctx), model(ids[:, :4]))
        assert torch.equal(model.model(ids, Context(labelled=where)), model.model(ids, Context()))
        with pytest.raises(ValueError, match=r"\(3, 11\) tokens, the ids are \(3, 4\)"):
            model(ids[:, :4], ctx=Context(mask))


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_a_model_whose_numbers_overflow_does_not_generate(temperature):
    model = tiny()
    model.model.embed_tokens.weight[1] = torch.inf
    with pytest.raises(UserError, match="overflow"):
        model.generate([[1, 2]], 20, (), temperature)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, ["model_type is 'gpt2'", "expected 'llama'"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["RoPE type is 'yarn'", "linear or llama3"]),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["RoPE type is 'dynamic'"]),
    ({"rope_scaling": {"rope_type": "linear"}}, ["'factor' is missing"]),
    ({"rope_scaling": "linear"}, ["cannot be read"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"model_type": "mistral", "sliding_window": 4096}, ["sliding_window is 4096, expected null"]),
    ({"model_type": "mistral"}, ["sliding_window is None, expected null, written out"]),
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
    refused(Llama.from_pretrained, tmp_path, name, "of shape (32, 48), expected float32", "of shape (48, 32)")
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    refused(Llama.from_pretrained, tmp_path, file.name, name, "is int8", "quantised")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)
    refused(Llama.from_pretrained, tmp_path, "q_proj.bias", "no place in the model")
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(Llama.from_pretrained, tmp_path, file.name, "not a complete safetensors file")
    file.rename(tmp_path / "pytorch_model.bin")
    refused(Llama.from_pretrained, tmp_path, "no model.safetensors, only pytorch_model.bin", "save it with")
    for text in ('["llama"]', "{", ""):
        (tmp_path / "config.json").write_text(text)
        refused(Llama.from_pretrained, tmp_path, "config.json")


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
    refused(Llama.from_pretrained, tmp_path, "'elsewhere' has no place")
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
        for _ in range(2):  # micro-batches accumulate
            ctx = Context(prompt_mask=torch.arange(ids.shape[1])[None] < torch.tensor([4, 6, 3, 5])[:, None])
            (model(ids, ids, ctx) + adapter.penalty(ctx)).backward()
        assert len(calls[on]) == (4 if on else 2)
        grads[on] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
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
