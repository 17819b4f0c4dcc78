"""The model: its blocks against loops written out, in the order in which they are written; the whole against
transformers; what it refuses to load; and the contract of a method."""

import json
import math
import random
import signal
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import csreft
import data
import train
from base import suite as builtin
from engine import devices
from engine.flags import Stopped
from model import (Adapter, Attention, Context, Llama, LlamaConfig, MLP, RMSNorm, UserError, labelled_positions,
                   open_tensors, parse_layers, rope_frequencies, rotate)
from tests.helpers import (BASE, builtin_examples, greedy_without_cache, perturb, random_ids, refused, their_logits,
                           tiny, trained_on_builtin)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
close = partial(torch.testing.assert_close, atol=1e-9, rtol=0, check_dtype=False)


# ---------------------------------------------------------------------------------------------- blocks

SHAPE = LlamaConfig(96, 32, 48, 2, 4, num_key_value_heads=2)  # d = 32, four heads of width 8, two key-value heads


@torch.no_grad()
def random_block(block):
    for seed, p in enumerate(block.double().parameters()):
        p.normal_(generator=torch.Generator().manual_seed(seed))
    return block


@torch.no_grad()
def test_rms_norm_divides_by_the_root_of_mean_square_plus_eps():
    norm, x = random_block(RMSNorm(5, 0.5)), torch.randn(3, 5).double()
    wanted = [[w * v / math.sqrt(sum(v * v for v in row) / 5 + 0.5) for w, v in zip(norm.weight.tolist(), row)]
              for row in x.tolist()]
    close(norm(x), torch.tensor(wanted).double(), atol=1e-6, msg="RMSNorm is weight * x / sqrt(mean(x^2) + eps)")


def test_rope_frequencies_are_powers_of_theta_scaled_by_the_published_rules():
    config = LlamaConfig(8, 64, 8, 1, 2, rope_theta=500000.0)
    linear = {"rope_type": "linear", "factor": 4.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    found = [rope_frequencies(replace(config, rope_scaling=scaling)).tolist() for scaling in (None, linear, llama3)]
    for i, (plain, divided, blended) in enumerate(zip(*found)):
        freq = 500000.0 ** (-2 * i / 32)
        wavelength = 2 * math.pi / freq
        if wavelength > 8192 / 1.0:
            wanted = freq / 8
        elif wavelength < 8192 / 4.0:
            wanted = freq
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            wanted = (1 - smooth) * freq / 8 + smooth * freq
        assert plain == pytest.approx(freq, rel=1e-5), f"pair {i} has theta^(-2i / hd) = {freq}, with hd = 32"
        assert divided == pytest.approx(freq / 4, rel=1e-5), "linear divides every frequency by its factor"
        assert blended == pytest.approx(wanted, rel=1e-5), f"llama3: a wave of {wavelength:.0f} tokens has {wanted}"


def test_rotate_turns_channel_i_with_channel_i_plus_half_as_a_complex_number():
    x, angles = torch.randn(2, 3, 5, 8).double(), torch.randn(1, 1, 5, 4).double()
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    both = torch.cat((-angles, angles), -1)
    close(rotate(x, both.cos(), both.sin()), torch.cat((turned.real, turned.imag), -1),
          msg="the pair (a, b) = (x_i, x_{i + hd/2}) is turned to (a cos - b sin, b cos + a sin)")


@torch.no_grad()
def test_attention_is_causal_with_two_query_heads_to_a_key_value_head():
    """One head and one token at a time, where positions turn by no angle and where they do."""
    block, x = random_block(Attention(SHAPE, 0)), torch.randn(2, 5, 32).double() / 4
    for words, angles in (("without rotation", torch.zeros(1, 1, 5, 4)), ("rotated", torch.randn(1, 1, 5, 4))):
        angles = torch.cat((-angles, angles), -1).double()
        cos, sin = angles.cos(), angles.sin()
        got = block(x, Context(rope=(cos, sin)))
        for b in range(2):
            q, k, v = ((x[b] @ p.weight.T).view(5, -1, 8) for p in (block.q_proj, block.k_proj, block.v_proj))
            q, k = (rotate(t.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for t in (q, k))
            for t in range(5):
                heads = []
                for h in range(4):
                    weights = torch.stack([q[t, h] @ k[s, h // 2] / math.sqrt(8) for s in range(t + 1)]).softmax(0)
                    heads.append(sum(w * v[s, h // 2] for s, w in enumerate(weights)))
                close(got[b, t], torch.cat(heads) @ block.o_proj.weight.T, msg=(
                    f"token {t}, {words}: softmax over tokens 0 to {t} of q k / sqrt(hd), query head h with key-value "
                    "head h // 2, q and k rotated and v not"))


@torch.no_grad()
def test_mlp_multiplies_silu_of_the_gate_by_up():
    block, x = random_block(MLP(SHAPE)), torch.randn(3, 32).double() / 4
    gate, up = x @ block.gate_proj.weight.T, x @ block.up_proj.weight.T
    close(block(x), (gate / (1 + torch.exp(-gate)) * up) @ block.down_proj.weight.T,
          msg="the MLP is down(silu(gate(x)) * up(x)), with silu(z) = z sigmoid(z)")


@torch.no_grad()
def test_a_layer_adds_both_blocks_to_the_stream_each_behind_its_own_norm():
    model, ids, ctx, seen = tiny(torch.float64), random_ids(tiny()), Context(), []
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda layer, args, h: seen.extend((*args, h)))
    model(ids, ctx=ctx)
    h, given, got = seen
    middle = h + layer.self_attn(layer.input_layernorm(h), given)
    close(got, middle + layer.mlp(layer.post_attention_layernorm(middle)),
          msg="h = h + attention(input_layernorm(h)), then h = h + mlp(post_attention_layernorm(h))")
    turns = torch.arange(11)[:, None] * rope_frequencies(model.config)
    close(given.rope[0][0, 0], torch.cat((turns, turns), -1).cos(), atol=1e-6, msg="position t is turned t times")
    assert ctx == Context(), "a pass works on a copy of its Context"


@torch.no_grad()
def test_a_sample_has_the_probabilities_at_its_temperature():
    model, generator = tiny(), torch.Generator().manual_seed(0)
    wanted = (model(torch.tensor([[5, 6]]))[0, -1] / 0.5).softmax(-1)
    drawn = torch.tensor(model.generate([[5, 6]] * 20_000, 1, temperature=0.5, generator=generator)).flatten()
    close(drawn.bincount(minlength=96) / 20_000, wanted, atol=0.02, msg="samples follow softmax(logits / T), T = 0.5")


def test_more_tokens_than_positions_are_refused():
    model = tiny(max_position_embeddings=8)
    assert len(model.generate([[1, 2, 3]], 5)[0]) == 5
    with pytest.raises(UserError, match="3 prompt tokens and 6 new ones exceed .* of 8"):
        model.generate([[1, 2, 3]], 6)


# ---------------------------------------------------------------------------------------------- whole models


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
        if rng.random() < 0.5:
            del raw["max_position_embeddings"]
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
        length = pytest.importorskip("transformers").AutoConfig.from_pretrained(theirs).max_position_embeddings
        assert saved["max_position_embeddings"] == length


def test_base_agrees_with_transformers():
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    fast = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(BASE)
    for name in builtin.TASKS:
        text = "".join(segment.text for segment in builtin.generate(name, "test")[0].segments)
        ids = tokenizer.encode(text)
        assert fast(text)["input_ids"] == ids and tokenizer.decode(ids[1:]) == text
    ids = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(BASE)(ids), their_logits(BASE, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_generation_in_a_batch_equals_one_by_one_and_no_cache(kv_heads):
    model = tiny(torch.float64, num_key_value_heads=kv_heads)
    prompts = [random_ids(model, 1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6, 14)]
    free = [greedy_without_cache(model, p, 12, ()) for p in prompts]
    stop = {free[0][5], free[1][3]}  # tokens that do come up, so that rows stop at different times
    for wanted_stop in ((), stop):
        wanted = [greedy_without_cache(model, p, 12, wanted_stop) for p in prompts]
        alone = [model.generate([p], 12, wanted_stop)[0] for p in prompts]
        assert alone == wanted, "the cache changes nothing: each prompt by itself continues as without one"
        assert model.generate(prompts, 12, wanted_stop) == wanted, "nor do other, longer prompts in the batch"
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
    (CONFIG, {"model_type": "mistral"}, ["sliding_window is 4096, expected null, written out"]),
    *((CONFIG, {"hidden_size": value}, [f"hidden_size is {value!r}, expected a positive integer"])
      for value in (-1, 0, "8", 1.5, True, [8], None)),
    (CONFIG, {"hidden_size": 2**31}, ["shape"]),
    (CONFIG, {"num_hidden_layers": 1_000_000}, ["num_hidden_layers"]),
    (CONFIG, {"num_hidden_layers": 1}, ["model.layers.1."]),
    (CONFIG, {"max_position_embeddings": -1}, ["max_position_embeddings is -1"]),
    (CONFIG, {"attention_bias": 1}, ["bias"]),
    (CONFIG, {"num_key_value_heads": 3}, ["num_key_value_heads is 3, expected a divisor of num_attention_heads = 4"]),
    (CONFIG, {"head_dim": 7}, ["head_dim is 7, expected an even number"]),
    (CONFIG, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["RoPE type is 'yarn'", "linear or llama3"]),
    (CONFIG, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["RoPE type is 'dynamic'"]),
    (CONFIG, {"rope_scaling": {"rope_type": "linear"}}, ["config.json", "'factor' is missing"]),
    (CONFIG, {"rope_scaling": {"rope_type": 3}}, ["RoPE type"]),
    *((CONFIG, {key: value}, []) for key, value in (
        ("num_key_value_heads", "x"), ("head_dim", [8]), ("head_dim", 2**39), ("rms_norm_eps", "1"),
        ("rope_scaling", 7), ("rope_scaling", {"rope_type": "linear", "factor": "4"}),
        ("rope_parameters", {"rope_theta": [1]}))),
    (CONFIG, {"rope_scaling": "linear"}, ["config.json cannot be read"]),
    *((CONFIG, text, [CONFIG]) for text in ("[" * 10**5, '{"a":' * 10**5, "\x00", "NaN", "null", '"text"', "{]")),
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
    *((INDEX, {HEAD: place}, [INDEX]) for place in ("../other.safetensors", "/etc/hostname", "a/b.safetensors", "")),
    (INDEX, {"elsewhere": SHARD}, ["'elsewhere' has no place in the model"]),
    (INDEX, {}, None),
], ids=lambda value: str(value)[:40])
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
    if words is None:
        Llama.from_pretrained(tmp_path)
    else:
        refused(Llama.from_pretrained, tmp_path, *words)


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


@pytest.mark.parametrize("attach", [csreft.attach, lambda model, config: model.model.layers[2].requires_grad_(True)])
def test_nothing_below_the_first_trained_module_is_kept_or_run_again(attach):
    model, batch = tiny(num_hidden_layers=4).train().requires_grad_(False), torch.tensor([[1, 2, 3]])
    attach(model, csreft.Config(layers="2,3"))
    at, kept, runs = [3], [0] * 4, [0] * 4  # the layer that runs; tensors kept in each, runs of each

    def enter(index, layer, args):
        at[0] = index
        runs[index] += 1

    def keep(tensor):
        kept[at[0]] += 1
        return tensor

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(enter, index))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch, batch)
    assert kept[:2] == [0, 0] and min(kept[2:]) > 0
    model.model.checkpointing, runs[:] = True, [0] * 4
    model(batch, batch).backward()
    assert runs[:2] == [1, 1] and runs[3] == 2


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
    for text, count, wanted in (("all", 3, [0, 1, 2]), ("3,1", 4, [1, 3]), ("25%-50%", 8, [2, 3]),
                                ("25%-50%", 32, list(range(8, 16))), ("25%-75%", 2, [0]), ("75%-100%", 2, [1])):
        assert parse_layers(text, count) == wanted, f"{text} of {count}: lo <= (i + 1/2) / {count} < hi, so {wanted}"
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


# ---------------------------------------------------------------------------------------------- the contract


@dataclass
class OwnConfig:
    factor: float = 1.0


class OwnHooks(Adapter):
    """Trains norms on `factor` times the loss, by gradient descent with momentum. Every third step has no gradient; an
    integer and a bool remember that."""

    stop_at = None  # the step in which a signal comes

    def __init__(self, model, config):
        super().__init__(model.requires_grad_(False))
        self.norms = [layer.input_layernorm.weight.requires_grad_(True) for layer in model.model.layers]
        self.factor, self.count, self.skip = config.factor, torch.tensor(0), torch.tensor(False)

    def loss(self, batch):
        return self.factor * super().loss(batch)

    def optimizer(self, lr, weight_decay):
        return torch.optim.SGD(self.param_groups(lr, weight_decay), momentum=0.9)

    def before_step(self):
        for p in self.norms:
            p.grad.mul_(~self.skip)

    def after_step(self):
        self.count += 1
        self.skip.fill_(self.count % 3 == 2)
        if self.count == self.stop_at:
            signal.raise_signal(signal.SIGTERM)

    def tensors(self):
        return {**super().tensors(), "count": self.count, "skip": self.skip}

    def scored(self, scores, score, suite):
        return {"same": scores == score(), "means": suite.means(scores)}


OWN = SimpleNamespace(attach=OwnHooks), OwnConfig(3.0)


def test_the_loss_and_the_optimiser_are_those_of_the_method():
    """Four times the loss at a quarter of the rate is the same descent, bit for bit; Adam would go a quarter as far."""
    ends = [trained_on_builtin(OWN[0], OwnConfig(factor), lr=lr, clip=0.0)[1].norms
            for factor, lr in ((1.0, 1e-2), (4.0, 2.5e-3), (1.0, 2.5e-3))]
    for one, same, other in zip(*ends):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_methods_optimiser_and_its_integers_continue_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_methods", cache(lambda: {"own": OWN}))
    whole, stopped = (train.Config(method="own", base=str(BASE), tasks="currency", steps=7, batch_size=4, eval_limit=1,
                                   out=str(tmp_path / name)) for name in ("whole", "stopped"))
    train.run(whole)
    monkeypatch.setattr(OwnHooks, "stop_at", 4)
    with pytest.raises(Stopped, match="stopped after step 4 of 7; the same call continues, without overwrite$"):
        train.run(replace(stopped, overwrite=True))
    with open_tensors(tmp_path / "stopped" / "checkpoint.safetensors") as saved:
        assert saved.get_tensor("adapter.count") == 4 and saved.get_tensor("optimizer.0.momentum_buffer").any()
    found = train.run(stopped)
    assert found["same"] and found["means"] == (found["speciality"], found["versatility"])
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adapter = train.load_run(tmp_path / "stopped")[1]
    assert (adapter.count, adapter.count.dtype, adapter.skip.dtype) == (7, torch.int64, torch.bool)


def test_a_training_step_is_the_one_written_out():
    """Of CS-ReFT, with two micro-batches, dropout, a penalty, clipping, and a rate of its own for the router."""
    config = train.Config(steps=5, batch_size=4, grad_accum=2, lr=1e-2, clip=0.1, weight_decay=0.1, warmup=0.4, seed=3)
    tokenizer, examples = builtin_examples()
    ends, seen = [], {False: [], True: []}
    for written_out in seen:
        model = tiny(torch.float64, vocab_size=512)
        model.model.layers[0].mlp.register_forward_hook(
            lambda mlp, args, output: torch.nn.functional.dropout(output, 0.1, mlp.training))
        torch.manual_seed(0)
        adapter = csreft.attach(model, csreft.Config(subspaces=2, rank=3, sparsity=0.5, router_lr=0.1))
        adapter.before_step = lambda adapter=adapter, on=written_out: seen[on].append(adapter.edits.W.tolist())
        ends.append(adapter.tensors())
        if not written_out:
            train.train(model, adapter, examples, config, tokenizer.pad_id)
            assert not model.training, "after training the model is in evaluation"
            continue
        optimizer, groups = adapter.optimizer(1e-2, 0.1), data.draw(examples, 8, 3)
        peaks = [group["lr"] for group in optimizer.param_groups]
        model.train()
        for step, share in enumerate((0.5, 1.0, 1.0, 0.75, 0.25), 1):  # of the rate: a warm-up, half a cosine
            torch.manual_seed(devices.seed(3, step))
            parts = [data.collate(part, tokenizer.pad_id)
                     for part in data.micro_batches(next(groups), 4, torch.device("cpu"))]
            labelled = sum((batch.labels != -100).sum() for batch in parts)
            for batch in parts:
                loss = model(batch.ids, batch.labels, batch.ctx, reduction="sum") / labelled
                (loss + 0.5 * batch.ctx.memory["gates"].mean() * len(batch.ids) / 8).backward()
            torch.nn.utils.clip_grad_norm_(model.csreft.parameters(), 0.1)
            adapter.before_step()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = share * peak
            optimizer.step()
            adapter.after_step()
            optimizer.zero_grad()
    for name, wanted in ends[1].items():
        close(ends[0][name], wanted, msg=f"{name} after five steps is that of the loop written out")
    assert seen[False] == seen[True], "before_step() comes before the optimiser's step"


@torch.no_grad()
def test_a_context_may_be_used_again():
    model = tiny()
    csreft.attach(model, csreft.Config(subspaces=3, rank=2, positions="f2+l2"))
    perturb(model, 0.5)
    ids, ctx, plain = random_ids(model), Context(torch.arange(11).expand(3, 11) < 6), Context()
    assert torch.equal(model(ids, ctx=ctx), model(ids, ctx=ctx))
    with pytest.raises(ValueError, match=r"\(3, 11\).*\(2, 11\)"):
        model(ids[:2], ctx=ctx)
    model(ids, ctx=plain)
    assert torch.equal(model(ids[:, :5], ctx=plain), model(ids[:, :5]))
    where = Context(labelled=labelled_positions(ids.masked_fill(torch.arange(11) < 4, -100)))
    assert torch.equal(model.model(ids, where), model.model(ids, Context())), "off the labels, too"


def test_a_hook_on_the_head_reaches_generation():
    model = tiny()
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, torch.tensor(7), 1e3))
    assert model.generate([[1, 2], [3]], 3) == [[7, 7, 7]] * 2 != tiny().generate([[1, 2], [3]], 3)
