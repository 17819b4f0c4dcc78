"""The three methods against their equations, and the contract that every method fulfils: `python -m pytest`.

The oracles are independent of the code they check: the equation written out as a naive loop in float64, finite
differences, and peft and pyreft where they are installed. Everything else is tested in `tests/`, whose `helpers.py`
this file uses. What takes longer than about five seconds is marked slow and left out: `python -m pytest -m ""` runs
all.

Read in this order: every method, MultiLoRA, CS-ReFT, CoFiTune, in another place.
"""

import doctest
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cofitune
import csreft
import data
import multilora
import train
from base import suite as builtin
from model import Context, Llama, LlamaConfig, UserError, find_linears, parse_layers
from tests.helpers import (
    BASE,
    HERE,
    QUICK,
    SOURCES,
    builtin_examples,
    cli,
    here,
    perturb,
    random_ids,
    settled,
    tiny,
    trained_on_builtin,
)

# ---------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", [multilora, csreft, cofitune], ids=lambda method: method.__name__)
def test_the_worked_example_holds(method):
    failed, tried = doctest.testmod(method)
    assert tried >= 4 and not failed


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
            with pytest.raises(UserError, match="merge"):
                model.save_pretrained(tmp_path)
        if name in ("csreft", "loreft"):
            with pytest.raises(UserError, match="cannot be merged"):
                adapter.merge()
            return
        adapter.merge()
        torch.testing.assert_close(model(ids), trained, atol=1e-4, rtol=0)
        model.save_pretrained(tmp_path / "merged")
        assert torch.equal(Llama.from_pretrained(tmp_path / "merged")(ids), model(ids))


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_tensors_of_other_settings_are_refused(name):
    method, config = settled(name)
    adapter = train.start_adapter(Llama.from_pretrained(BASE), method, config)
    tensors = {key: t.clone() for key, t in adapter.tensors().items()}
    key = min(tensors)
    for wrong, text in (({k: t for k, t in tensors.items() if k != key}, f"{key!r} is missing"),
                        ({**tensors, "other": tensors[key]}, "'other' is unexpected"),
                        ({**tensors, key: tensors[key][..., :1]}, f"{key!r} has shape")):
        with pytest.raises(UserError, match=re.escape(text) + ".*made with other settings"):
            adapter.load_tensors(wrong)
    assert all(torch.equal(t, tensors[k]) for k, t in adapter.tensors().items())


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_every_method_trains_float32_tensors_beside_a_bfloat16_base(name):
    """What a GPU does by default, here on the CPU: importance, penalties, loss and scoring under autocast."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, steps=3, dtype=torch.bfloat16)
    for p in model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    assert all(t.isfinite().all() for t in adapter.tensors().values())
    tokenizer, _ = builtin_examples()
    tests = {"add": data.encode(builtin.generate("add", "test")[:5], tokenizer, ["add"])}
    suite = data.Suite([], [], tests, {"add": "general"}, {"add": "reasoning"}, {"add": data.exact})
    assert 0 <= data.evaluate(model, suite, tokenizer)["add"]["exact match"] <= 100


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


def test_controls_of_multiloras_start():
    """What starts at zero, and what is trained."""
    def attached(**changes):
        model = tiny(torch.float64)
        multilora.attach(model, multilora.Config(modules=2, rank=3, **changes))
        return model, model.model.layers[0].mlp.up_proj.multilora

    ids = random_ids(tiny())
    plain = tiny(torch.float64)(ids)
    for changes, at_base in (({}, True), ({"zero": "B"}, True), ({"scaling": "none"}, True),
                             ({"scaling": "none", "zero": "s"}, False), ({"zero": "B", "scaling": "scalar"}, True)):
        model, m = attached(**changes)
        assert torch.equal(model(ids), plain) == at_base, changes
        assert (m.B.abs().sum() == 0) == (changes.get("zero") == "B" or changes == {"scaling": "none"})
        assert m.s is None or (m.s == (changes.get("zero") == "B")).all()
    model, _ = attached(train="s")
    names = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"s"}
    with pytest.raises(UserError, match="--train s needs scales"):
        multilora.Config(train="s", scaling="none")


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
    config, errors = csreft_config(ortho=ortho), []

    def check(adapter, record):
        R = adapter.edits.R.detach()
        for layer in R:
            for i, j in ((i, j) for i in range(3) for j in range(3)):
                if i == j or ortho == "joint":
                    errors.append((layer[i] @ layer[j].T - torch.eye(2) * (i == j)).abs().max().item())

    _, adapter = trained_on_builtin(csreft, config, steps=6, log=check, log_every=1, weight_decay=0.1)
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
        model(batch.ids, ctx=batch.ctx)
        return batch.ctx.memory["gates"]

    prompt, other = [5, 8, 13, 21], random_ids(model, 1, 30)[0].tolist()
    alone = gates([prompt], [4])[0]
    variants = ([prompt + [7, 7, 2]], [4]), ([prompt + [9], other], [4, 25]), ([prompt, other + [1]], [4, 30])
    for rows, lengths in variants:
        torch.testing.assert_close(gates(rows, lengths)[0], alone, atol=1e-6, rtol=0)
    assert (gates([other], [30])[0] - alone).abs().max() > 1e-3


@torch.no_grad()
def test_a_subspace_that_is_switched_off_has_no_gate():
    model = tiny()
    edits = csreft.attach(model, csreft_config()).edits
    perturb(model, 0.5)
    gates = {}
    for edits.off in (None, 0, 2):
        ctx = Context()
        model(random_ids(model), ctx=ctx)
        gates[edits.off] = ctx.memory["gates"]
    for off in (0, 2):
        assert (gates[off][:, off] == 0).all() and (gates[None] > 0).all()
        others = [i for i in range(3) if i != off]
        assert torch.equal(gates[off][:, others], gates[None][:, others])


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
def test_the_first_token_cannot_tell_tasks_apart_and_the_prompts_mean_can(tmp_path, route_on):
    """Even when the right gates are taught by label: behind one BOS and one template the first token is always the
    same, so its gates end at the same value for both tasks."""
    out = tmp_path / "run"
    text = here("train.py", "--method", "csreft", "--tasks", "currency,cipher", "--steps", "40", "--batch-size", "8",
                "--router-lr", "0.03", "--supervise-gates", "--route-on", route_on, "--eval-limit", "5",
                "--out", out).stdout
    note = [line for line in text.splitlines() if line.startswith("note: --route-on")]
    assert len(note) == (route_on == "first_token")
    assert json.loads((out / "results.json").read_text())["report"]["constant_gates"] == (route_on == "first_token")
    table = here("-m", "reproduce.gates", out, "--eval-limit", "5").stdout.split("score in %")[0].splitlines()
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


# ---------------------------------------------------------------------------------------------- CoFiTune


def cofitune_config(**changes):
    chosen = {"layers": "all", "modules": "q_proj,v_proj,up_proj,down_proj"}
    return cofitune.Config(**{**chosen, "importance_batches": 2, **changes})


def batches(model, count=2, batch=3):
    """Made-up training batches; a step that prepares a method is a list of them, here of one."""
    for i in range(count):
        ids = random_ids(model, batch, 9, seed=10 + i)
        labels = ids.clone()
        labels[:, :4] = -100
        yield data.Batch(ids, labels, Context(labels == -100, torch.zeros(batch, dtype=torch.long)))


def test_importance_equals_finite_differences():
    """Oracle: a mask on a unit's output is a factor on the unit's rows of weight and bias, so the derivative of the KL
    is taken by moving those rows, with the same dropout drawn again."""
    model = tiny(torch.float64, num_key_value_heads=2, attention_bias=True)
    linears = find_linears(model, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])
    torch.manual_seed(3)
    got = cofitune.importance(model, linears, ([batch] for batch in batches(model)), 0.2)

    handles = []
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            handles.append(block.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.2, True)))

    @torch.no_grad()
    def losses():
        torch.manual_seed(3)
        out = []
        for batch in batches(model):
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
        adapter.prepare([batch] for batch in batches(model))
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
        adapter.prepare([batch] for batch in batches(model))
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
    """plan() on a made-up landscape: it must follow the best range, quarter and modules by the harmonic mean, each node
    at its best share of the step, and score nothing twice. The sum would choose every node at its full step."""
    asked, names = [], []

    def trial(name, config, shares, steps, lr):
        assert config.mask_on == "none" and (steps, lr) == (7, 0.5)
        asked.append((config.layers, config.modules))
        names.append(name)
        found = {"speciality": {"25%-75%": 30, "25%-50%": 40}.get(config.layers, 10), "versatility": {
            "gate_proj,up_proj,down_proj": 50, "up_proj,down_proj": 60}.get(config.modules, 20)}
        lost, untouched = {"speciality": 100, "versatility": 0}, {"speciality": 0, "versatility": 100}
        return {"seconds": 1.0, "points": [
            {"share": share, "errors": (1.0, 1.0), **{0.0: untouched, 0.5: found, 1.0: lost}.get(share, untouched)}
            for share in shares]}

    chosen = cofitune.plan(cofitune.Config(search_steps=7, search_lr=0.5), LlamaConfig(96, 32, 48, 8, 4), trial)
    assert (chosen.layers, chosen.modules, chosen.mask_on) == ("25%-50%", "up_proj,down_proj", "update")
    assert len(asked) == len(set(asked)) == len(set(names)) == 1 + 6 + 2 + len(cofitune.PARTS[cofitune.KINDS["FFN"]])
    assert asked[0] == ("all", "all")
    fixed = cofitune.Config(layers="3,9")
    assert cofitune.plan(fixed, None, None) is fixed


def test_the_harmonic_mean_and_its_error():
    """Oracle: the reciprocals' mean, and how far H moves where S and V move by their errors, one after the other."""
    for S, V, errors in ((30.0, 60.0, (2.0, 3.0)), (0.5, 99.0, (0.1, 4.0)), (50.0, 50.0, (1.0, 0.0))):
        H, error = cofitune.harmonic({"speciality": S, "versatility": V, "errors": errors})
        mean = lambda S, V: 2 / (1 / S + 1 / V)
        by_S, by_V = ((mean(S + 1e-6, V) - mean(S, V)) / 1e-6, (mean(S, V + 1e-6) - mean(S, V)) / 1e-6)
        assert H == pytest.approx(mean(S, V)) and error == pytest.approx(math.hypot(
            by_S * errors[0], by_V * errors[1]), rel=1e-4)
    assert cofitune.harmonic({"speciality": 0.0, "versatility": 0.0, "errors": (1.0, 1.0)}) == (0.0, 0.0)
    assert cofitune.harmonic({"speciality": 0.0, "versatility": 90.0, "errors": (0.0, 1.0)}) == (0.0, 0.0)


def test_a_search_of_two_layers_skips_the_empty_quarters():
    seen = []

    def trial(name, config, shares, steps, lr):
        assert parse_layers(config.layers, 2)
        seen.append((config.layers, config.modules))
        return {"seconds": 1.0, "points": [{"share": share, "speciality": len(seen), "versatility": len(seen),
                                            "errors": (0.0, 0.0)} for share in shares]}

    chosen = cofitune.plan(cofitune.Config(), LlamaConfig(96, 32, 48, 2, 4), trial)
    assert ("75%-100%", cofitune.KINDS["FFN"]) in seen and "50%-75%" not in dict(seen)
    assert (chosen.layers, chosen.modules) == seen[-1]


# ---------------------------------------------------------------------------------------------- in another place


@pytest.mark.slow
def test_a_new_file_is_a_new_method(tmp_path):
    """The README's example, dropped beside train.py, without another line changed."""
    for name in SOURCES:
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, tmp_path / name)
    code = re.search(r"```python\n(# gains\.py\n.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    assert len(code.splitlines()) < 60
    (tmp_path / "gains.py").write_text(code)
    assert "--norms" in cli("train.py", "--method", "gains", "--help", cwd=tmp_path).stdout
    cli("train.py", "--method", "gains", *QUICK, "--eval-limit", "2", cwd=tmp_path)
    out = tmp_path / "out" / "gains"
    tensors = load_file(out / "adapter.safetensors")
    assert len(tensors) == 17 and all(name.endswith("norm.weight") for name in tensors)
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "gains" and results["trainable_parameters"] == 17 * 128
    metrics = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1] < metrics[0]


ALONE = """
import sys
from types import SimpleNamespace
import torch
import {name} as method
from model import Context, Llama, LlamaConfig, UserError

torch.manual_seed(0)
model = Llama(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4))
model.init_weights(seed=0)
ids = torch.randint(0, 64, (4, 9))
labels = ids.clone()
labels[:, :3] = -100
batch = SimpleNamespace(ids=ids, labels=labels, ctx=Context(labels == -100, torch.tensor([0, 1, 0, 1])))
with torch.no_grad():
    before = model(ids, labels, batch.ctx).item()
adapter = method.attach(model, method.Config({settings}))
adapter.prepare([[batch]])
groups = adapter.param_groups(0.05, 0.0)
for _ in range(3):
    ctx = Context(batch.ctx.prompt_mask, batch.ctx.tasks)
    (model(ids, labels, ctx) + adapter.penalty(ctx)).backward()
    adapter.before_step()
    with torch.no_grad():  # gradient descent: torch's optimisers take a second to import
        for group in groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                p.grad = None
    adapter.after_step()
model.eval()
with torch.no_grad():
    ctx = Context(batch.ctx.prompt_mask, batch.ctx.tasks)
    trained, after = model(ids, ctx=ctx), model(ids, labels, ctx).item()
    assert after < before, (before, after)
    try:
        adapter.merge()
        print("merged", (model(ids) - trained).abs().max().item())
    except UserError as error:
        print("refused", error)
print(*sorted(set(sys.modules) & {{"data", "train", "engine", "formats", "base", "tests"}}))
"""


@pytest.mark.parametrize("name, settings", [
    ("multilora", ""), ("csreft", "subspaces=2, rank=3, sparsity=0.1"), ("cofitune", "layers='all'")])
def test_a_method_works_in_another_project_with_model_py_alone(tmp_path, monkeypatch, name, settings):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for file in ("model.py", f"{name}.py"):
        shutil.copy(HERE / file, tmp_path / file)
    merged, modules = cli("-c", ALONE.format(name=name, settings=settings), cwd=tmp_path).stdout.split("\n")[:2]
    assert modules == "", "modules of the project were imported"
    if name == "csreft":
        assert merged.startswith("refused CS-ReFT cannot be merged")
    else:
        assert merged.startswith("merged ") and float(merged.split()[1]) < 1e-5
