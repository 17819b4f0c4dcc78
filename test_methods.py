"""The three methods against their equations, and the contract that every method fulfils: `python -m pytest`.

The oracles are independent of the code they check: the equation written out as a naive loop in float64, finite
differences, and peft and pyreft where they are installed. Everything else is tested in `tests/`; this file uses its
`helpers.py`. What takes longer than about four seconds is marked slow: `python -m pytest -m ""` runs all.

Read in this order: every method, the contract, MultiLoRA, CS-ReFT, CoFiTune, in another place.
"""

import doctest
import math
import re
import shutil
import signal
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cofitune
import csreft
import data
import formats
import multilora
import train
from base import suite as builtin
from engine.flags import Stopped
from data import Segment
from model import (Adapter, Cache, Context, Llama, LlamaConfig, UserError, find_linears, labelled_positions,
                   open_tensors, parse_layers)
from tests.helpers import (BASE, HERE, QUICK, builtin_examples, cli, clone, json_lines, perturb, random_ids, settled,
                           tiny, trained_on_builtin)
from tools.plot import gates_by_task

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
    """Attached, trained, frozen weights untouched, saved, reloaded bit for bit, merged where it can be."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, lr=1e-3)
    base, after, tensors = load_file(BASE / "model.safetensors"), model.state_dict(), adapter.tensors()
    assert any(not torch.equal(t, base[key]) if key in base else True for key, t in tensors.items())
    for key in base.keys() - tensors.keys():
        assert torch.equal(after[key], base[key]), f"the frozen {key} moved"
    ids = random_ids(model)
    with torch.no_grad():
        trained = model(ids)
        save_file(tensors, tmp_path / "adapter.safetensors")
        again = Llama.from_pretrained(BASE)
        plain = again.state_dict().keys()
        assert (again(ids) - trained).abs().max() > 1e-3, "training changed nothing"
        train.start_adapter(again, method, config).load_tensors(load_file(tmp_path / "adapter.safetensors"))
        assert torch.equal(again(ids), trained)
        if after.keys() != plain:  # the method has tensors that a checkpoint has no place for
            with pytest.raises(UserError, match="merge"):
                model.save_pretrained(tmp_path)
        try:
            adapter.merge()
        except UserError as error:
            assert "cannot be merged" in str(error) and torch.equal(model(ids), trained)
            return
        assert model.state_dict().keys() == plain
        torch.testing.assert_close(model(ids), trained, atol=1e-4, rtol=0)
        model.save_pretrained(tmp_path / "merged")
        assert torch.equal(Llama.from_pretrained(tmp_path / "merged")(ids), model(ids))


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_tensors_of_other_settings_are_refused(name):
    method, config = settled(name)
    adapter = train.start_adapter(Llama.from_pretrained(BASE), method, config)
    tensors = {key: t.clone() for key, t in adapter.tensors().items()}
    key = min(tensors)
    for wrong, name in (({k: t for k, t in tensors.items() if k != key}, key),
                        ({**tensors, "other": tensors[key]}, "other"), ({**tensors, key: tensors[key][..., :1]}, key)):
        with pytest.raises(UserError, match=f"tensor '{re.escape(name)}' .*made with other settings"):
            adapter.load_tensors(wrong)
    assert all(torch.equal(t, tensors[k]) for k, t in adapter.tensors().items())


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_every_method_trains_float32_tensors_beside_a_bfloat16_base(name):
    """What a GPU does by default, here on the CPU: importance, penalties, loss and scoring under autocast."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, steps=3, dtype=torch.bfloat16)
    with model.autocast():
        assert model(random_ids(model)).dtype == torch.bfloat16
    for p in model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    assert all(t.isfinite().all() for t in adapter.tensors().values())
    tokenizer, _ = builtin_examples()
    tests = {"add": data.encode(builtin.generate("add", "test")[:5], tokenizer, ["add"])}
    suite = data.Suite([], [], tests, {"add": "general"}, {"add": "reasoning"}, {"add": data.exact})
    assert 0 <= data.evaluate(model, suite, tokenizer)["add"]["exact match"] <= 100


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


OWN = SimpleNamespace(attach=OwnHooks), OwnConfig(3.0)


def test_the_loss_and_the_optimiser_are_those_of_the_method():
    """Four times the loss at a quarter of the rate is the same descent, bit for bit; Adam would go a quarter as far."""
    ends = [trained_on_builtin(OWN[0], OwnConfig(factor), lr=lr, clip=0.0)[1].norms
            for factor, lr in ((1.0, 1e-2), (4.0, 2.5e-3), (1.0, 2.5e-3))]
    for one, same, other in zip(*ends):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_methods_optimiser_and_its_integers_continue_to_the_same_bytes(tmp_path, monkeypatch):
    """After a signal in step 4 of 7; an integer and a bool come back as such."""
    monkeypatch.setattr(train, "find_methods", cache(lambda: {"own": OWN}))
    whole, stopped = (train.Config(method="own", base=str(BASE), tasks="currency", steps=7, batch_size=4, eval_limit=1,
                                   out=str(tmp_path / name)) for name in ("whole", "stopped"))
    train.run(whole)
    monkeypatch.setattr(OwnHooks, "stop_at", 4)
    with pytest.raises(Stopped, match="stopped after step 4 of 7; the same call continues"):
        train.run(stopped)
    with open_tensors(tmp_path / "stopped" / "checkpoint.safetensors") as saved:
        assert saved.get_tensor("adapter.count") == 4 and saved.get_tensor("optimizer.0.momentum_buffer").any()
    train.run(stopped)
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adapter = train.load_run(tmp_path / "stopped")[1]
    assert (adapter.count, adapter.count.dtype, adapter.skip.dtype) == (7, torch.int64, torch.bool)


@torch.no_grad()
def test_hidden_states_off_the_labels_are_right_too():
    """Also where the Context names the labelled positions: a value head or a KL on the prompt may read any of them."""
    model, seen = tiny(torch.float64), []
    model.model.norm.register_forward_hook(lambda norm, args, h: seen.append(h))
    batch = next(batches(model))
    where = Context(batch.ctx.prompt_mask, batch.ctx.tasks, labelled_positions(batch.labels))
    wanted = model(batch.ids)
    model(batch.ids, batch.labels, where)
    torch.testing.assert_close(model.lm_head(model.model(batch.ids, where)), wanted, atol=1e-12, rtol=0)
    assert len(seen) == 3 and all(torch.allclose(h, seen[0], atol=1e-12, rtol=0) for h in seen)


def test_a_hook_on_the_head_reaches_generation():
    model = tiny()
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, torch.tensor(7), 1e3))
    assert model.generate([[1, 2], [3]], 3) == [[7, 7, 7]] * 2 != tiny().generate([[1, 2], [3]], 3)


@torch.no_grad()
def test_a_context_may_be_used_again():
    model = tiny()
    csreft.attach(model, csreft_config(positions="f2+l2"))
    perturb(model, 0.5)
    ids, ctx, plain = random_ids(model), Context(torch.arange(11).expand(3, 11) < 6), Context()
    assert torch.equal(model(ids, ctx=ctx), model(ids, ctx=ctx))
    with pytest.raises(ValueError, match=r"\(3, 11\).*\(2, 11\)"):
        model(ids[:2], ctx=ctx)
    model(ids, ctx=plain)
    assert torch.equal(model(ids[:, :5], ctx=plain), model(ids[:, :5]))


# ---------------------------------------------------------------------------------------------- MultiLoRA


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
def test_stacked_multilora_equals_the_naive_sum(scaling):
    model = tiny(torch.float64)
    adapter = multilora.attach(model, multilora.Config(modules=3, rank=2, alpha=5.0, scaling=scaling))
    perturb(model, 0.3)
    x = torch.randn(4, 7, 48, dtype=torch.float64)
    linear = model.model.layers[1].mlp.down_proj  # (32, 48): not square
    m = linear.multilora
    wanted = x @ linear.weight.T
    for i in range(3):
        s = m.s[i] if m.s is not None else 1.0
        wanted = wanted + 5.0 / 2 * s * ((x @ m.A[i].T) @ m.B[i].T)
    torch.testing.assert_close(linear(x), wanted, atol=1e-9, rtol=0)
    before = model(random_ids(model))
    adapter.merge()
    torch.testing.assert_close(linear(x), wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(model(random_ids(model)), before, atol=1e-9, rtol=0)


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
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(ours) == count(theirs)


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
    scores = torch.relu(x @ net[0].weight.T + net[0].bias) @ net[2].weight.T
    net[2].bias.copy_(-scores.mean(0))  # so that some gates are above 1/2 and some below
    gates = 1 / (1 + torch.exp(-(scores + net[2].bias)))
    if gate == "hard":
        gates = (gates > 0.5).double()
        assert 0 < gates.mean() < 1, "all gates are equal: the test shows nothing"
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
def test_subspaces_stay_orthonormal(ortho):
    config, errors = csreft_config(ortho=ortho), []

    def check(adapter, step):
        for layer in adapter.edits.R.detach():
            for i, j in product(range(3), range(3)):
                if i == j or ortho == "joint":
                    errors.append((layer[i] @ layer[j].T - torch.eye(2) * (i == j)).abs().max().item())

    _, adapter = trained_on_builtin(csreft, config, steps=6, after=check, weight_decay=0.1)
    assert len(errors) == 6 * 8 * (9 if ortho == "joint" else 3) and max(errors) < 1e-5
    assert adapter.report()["orthonormality_error"] < 1e-5
    start = csreft.attach(Llama.from_pretrained(BASE), config)
    assert (start.edits.R - adapter.edits.R).abs().max() > 1e-2, "R did not move"


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
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
    model, gates = tiny(), []
    edits = csreft.attach(model, csreft_config()).edits
    perturb(model, 0.5)
    for edits.off in (None, 2):
        ctx = Context()
        model(random_ids(model), ctx=ctx)
        gates.append(ctx.memory["gates"])
    assert (gates[0] > 0).all() and torch.equal(gates[1], gates[0] * torch.tensor([1, 1, 0]))


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
def test_the_first_token_cannot_tell_tasks_apart_and_the_prompts_mean_can(capsys, route_on):
    """Behind one BOS and one template the first token is always the same, so the gates end at one value for both."""
    model, adapter = trained_on_builtin(csreft, csreft_config(route_on=route_on), steps=8)
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --route-on")]
    assert len(note) == (route_on == "first_token") == adapter.report()["constant_gates"]
    tokenizer, examples = builtin_examples()
    tests = {task: [e for e in examples if e.task == task][:20] for task in {e.task for e in examples}}
    one, other = gates_by_task(model, adapter, tests, tokenizer.pad_id).values()
    apart = max(abs(a - b) for a, b in zip(one, other))
    assert apart == 0 if route_on == "first_token" else apart > 0.1


@torch.no_grad()
def test_a_talks_gates_in_training_are_those_of_a_chat():
    """Log-probability of the second answer: as a training example, and said token by token behind the prompt."""
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    csreft.attach(model, csreft_config(positions="f2+l3"))
    perturb(model, 0.3)
    template, _ = formats.choose("short", tokenizer, BASE)
    said = [Segment("Sort: b a", "user"), Segment("a b", "assistant", True), Segment("Add 1 and 2.", "user"),
            Segment("3 !", "assistant", True)]
    one = data.encode(template.answers(data.Example("", said)), tokenizer, [""])[1]
    asked = tokenizer.encode_segments(template.apply(data.Example("", said[:3])).segments)
    batch = data.collate([one], 0)
    assert one.ids[: one.prompt] == asked[0]
    cache, total = Cache(model.config, torch.tensor([one.prompt]), 9, torch.float32), 0.0
    h = model.model(torch.tensor([asked[0]]), Context(torch.ones(1, one.prompt, dtype=torch.bool), cache=cache))
    for place, token in enumerate(one.ids[one.prompt :], one.prompt):
        total -= model.lm_head(h[0, -1]).log_softmax(-1)[token].item()
        h = model.model(torch.tensor([[token]]), Context(cache=cache, positions=torch.tensor([[place]])))
    assert model(batch.ids, batch.labels, batch.ctx, reduction="sum").item() == pytest.approx(total, rel=1e-4)


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
            ctx = Context(prompt_mask=torch.arange(len(ids))[None] < len(prompt))
            ids.append(model(torch.tensor([ids]), ctx=ctx)[0, -1].argmax().item())
        return ids[len(prompt):]

    wanted = [no_cache(p) for p in prompts]
    assert model.generate(prompts, 10) == wanted == [model.generate([p], 10)[0] for p in prompts]
    assert wanted != tiny(torch.float64).generate(prompts, 10), "the edits changed nothing: the test shows nothing"


def test_the_penalty_is_the_mean_gate():
    model, ctx = tiny(), Context()
    adapter = csreft.attach(model, csreft_config(sparsity=0.5))
    model(random_ids(model), ctx=ctx)
    gates = ctx.memory["gates"].tolist()
    assert adapter.penalty(ctx).item() == pytest.approx(0.5 * sum(map(sum, gates)) / 9, abs=1e-6)
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

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.2, True))

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
        rows = 8 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1
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


def test_micro_batches_of_a_step_are_one_batch_for_the_importance(monkeypatch):
    """Without dropout's draws, which differ: KL is replaced by the summed loss."""
    monkeypatch.setattr(cofitune, "two_pass_kl", lambda model, b: model(b.ids, b.labels, reduction="sum"))
    model = tiny(torch.float64)
    linears = find_linears(model, ["up_proj", "q_proj"])
    batch = next(batches(model, 1, 6))
    part = lambda *rows: data.Batch(batch.ids[slice(*rows)], batch.labels[slice(*rows)], Context())
    one, cut, apart = (cofitune.importance(model, linears, steps, 1e-12) for steps in (
        [[part(0, 6)]], [[part(0, 2), part(2, 6)]], [[part(0, 2)], [part(2, 6)]]))
    for name in linears:
        torch.testing.assert_close(cut[name], one[name], atol=1e-9, rtol=0)
    assert any((apart[name] - one[name]).abs().max() > 1e-3 for name in linears)


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
    masks = []
    for source in ("importance", "random"):
        model = tiny()
        torch.manual_seed(0)
        adapter = cofitune.attach(model, cofitune_config(mask_source=source))
        adapter.prepare([batch] for batch in batches(model))
        masks.append(adapter.masks)
    for name, mask in masks[0].items():
        torch.testing.assert_close(masks[1][name].sort().values, mask.sort().values)
    assert not torch.equal(*(mask["model.layers.1.mlp.up_proj"] for mask in masks))


def test_adam_cancels_a_constant_factor_on_the_gradient():
    """Why --mask-on update is the default. Total update (summed length of all steps) of the same run with every
    gradient times 0.25: unchanged. With every update times 0.25: about a third, since slower progress leaves larger
    gradients."""
    def total_update(on_gradient, on_update):
        model, total = tiny(), 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        for batch in list(batches(model)) * 20:
            old = torch.nn.utils.parameters_to_vector(model.parameters())
            optimizer.zero_grad()
            (on_gradient * model(batch.ids, batch.labels)).backward()
            optimizer.step()
            with torch.no_grad():
                step = on_update * (torch.nn.utils.parameters_to_vector(model.parameters()) - old)
                torch.nn.utils.vector_to_parameters(old + step, model.parameters())
            total += step.norm().item()
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


def test_sft_trains_everything():
    model = tiny(tie_word_embeddings=True)
    adapter = cofitune.attach(model, train.find_methods()["sft"][1])
    assert all(p.requires_grad for p in model.parameters()) and adapter.penalty(Context()) == 0
    assert adapter.tensors().keys() == dict(model.named_parameters()).keys()


def test_points_at_shares_are_those_of_weights_interpolated_by_hand(tmp_path, monkeypatch):
    """Wise-FT: `--method sft --shares 0.25,0.5`."""
    monkeypatch.chdir(HERE)
    config = train.Config(method="sft", tasks="currency", steps=12, batch_size=8, lr=2e-3, eval_limit=10, samples=0,
                          out=str(tmp_path / "run"))
    results = train.run(config, replace(train.method_of("sft")[1], shares="0.5,0.25"))
    end = load_file(tmp_path / "run" / "adapter.safetensors")
    suite, tokenizer, _ = train.load_data(config, train=False)
    assert [point["share"] for point in results["points"]] == [0.25, 0.5]
    for point in results["points"]:
        model = Llama.from_pretrained(BASE)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(p + point["share"] * (end[name] - p))
        scores = data.evaluate(model, suite, tokenizer)
        for key, group, error in zip(("speciality", "versatility"), ("new", "general"), point["errors"]):
            found = [s["exact match"] for task, s in scores.items() if suite.group[task] == group]
            assert point[key] == pytest.approx(sum(found) / len(found))
            assert error == pytest.approx(math.sqrt(sum(p * (100 - p) / 10 for p in found)) / len(found))
    assert len({point["versatility"] for point in results["points"]} | {results["versatility"]}) == 3


def searched(count, landscape):
    """(the settled Config, [(layers, modules)] in the order of their trials) of plan() for a model of `count` layers.
    landscape(layers, modules, share) is a node's (speciality, versatility)."""
    asked = {}

    def trial(name, config, steps, lr):
        assert config.mask_on == "none" and (steps, lr) == (7, 0.5)
        assert name not in asked and parse_layers(config.layers, count)
        asked[name] = config.layers, config.modules
        points = [(share, *landscape(*asked[name], share)) for share in cofitune.parse_shares(config.shares)]
        return {"seconds": 1.0, "points": [{"share": share, "speciality": S, "versatility": V, "errors": (1.0, 1.0)}
                                           for share, S, V in points]}

    chosen = cofitune.plan(cofitune.Config(search_steps=7, search_lr=0.5), LlamaConfig(96, 32, 48, count, 4), trial)
    return chosen, list(asked.values())


def test_the_tree_search_walks_to_the_best_node():
    """It follows the best range, quarter and modules by the harmonic mean, each node at its best share of the step, and
    scores nothing twice. The sum would choose every node at its full step."""
    def landscape(layers, modules, share):
        S = {"25%-75%": 30, "25%-50%": 40}.get(layers, 10)
        V = {"gate_proj,up_proj,down_proj": 50, "up_proj,down_proj": 60}.get(modules, 20)
        return {0.5: (S, V), 1.0: (100, 0)}.get(share, (0, 100))

    chosen, asked = searched(8, landscape)
    assert (chosen.layers, chosen.modules, chosen.mask_on) == ("25%-50%", "up_proj,down_proj", "update")
    assert len(asked) == len(set(asked)) == 1 + 6 + 2 + len(cofitune.PARTS[cofitune.KINDS["FFN"]])
    assert asked[0] == ("all", "all")
    fixed = cofitune.Config(layers="3,9")
    assert cofitune.plan(fixed, None, None) is fixed


def test_a_search_of_two_layers_skips_the_empty_quarters():
    order = []
    chosen, asked = searched(2, lambda *node: order.append(node) or (len(order), len(order)))
    assert ("75%-100%", cofitune.KINDS["FFN"]) in asked and "50%-75%" not in dict(asked)
    assert (chosen.layers, chosen.modules) == asked[-1]


def test_the_harmonic_mean_and_its_error():
    """Oracle: the reciprocals' mean, and how far H moves where S and V move by their errors, one after the other."""
    mean = lambda S, V: 2 / (1 / S + 1 / V)
    for S, V, errors in ((30.0, 60.0, (2.0, 3.0)), (0.5, 99.0, (0.1, 4.0)), (50.0, 50.0, (1.0, 0.0))):
        H, error = cofitune.harmonic({"speciality": S, "versatility": V, "errors": errors})
        by_S, by_V = ((mean(S + 1e-6, V) - mean(S, V)) / 1e-6, (mean(S, V + 1e-6) - mean(S, V)) / 1e-6)
        assert H == pytest.approx(mean(S, V))
        assert error == pytest.approx(math.hypot(by_S * errors[0], by_V * errors[1]), rel=1e-4)
    for V in (0.0, 90.0):
        assert cofitune.harmonic({"speciality": 0.0, "versatility": V, "errors": (0.0, 1.0)}) == (0.0, 0.0)


# ---------------------------------------------------------------------------------------------- in another place


@pytest.mark.slow
def test_a_new_file_is_a_new_method(tmp_path):
    """The README's example, dropped into a copy without another line changed: what is asked of every method holds."""
    project = clone(tmp_path / "project")
    code = re.search(r"```python\n(# gains\.py\n.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    assert len(code.splitlines()) < 60
    (project / "gains.py").write_text(code)
    assert "--norms" in cli("train.py", "--method", "gains", "--help", cwd=project).stdout
    cli("train.py", "--method", "gains", *QUICK, "--eval-limit", "2", cwd=project)
    tensors = load_file(project / "out" / "gains" / "adapter.safetensors")
    assert len(tensors) == 17 and all(name.endswith("norm.weight") for name in tensors)
    first, last = json_lines(project / "out" / "gains" / "metrics.jsonl")
    assert last["loss"] < first["loss"]
    said = cli("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gains or test_house", cwd=project).stdout
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10, said


ALONE = """
import importlib
import sys
from types import SimpleNamespace
import torch
from model import Context, Llama, LlamaConfig, UserError

SETTINGS = {"multilora": {}, "csreft": {"subspaces": 2, "rank": 3, "sparsity": 0.1}, "cofitune": {"layers": "all"}}
for name, settings in SETTINGS.items():
    method = importlib.import_module(name)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 32, 48, 2, 4))
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1), 0.1)
    ids = torch.randint(0, 64, (4, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    batch = SimpleNamespace(ids=ids, labels=labels, ctx=Context(labels == -100))
    before = model(ids, labels, batch.ctx).item()
    adapter = method.attach(model, method.Config(**settings))
    adapter.prepare([[batch]])
    optimizer = adapter.optimizer(0.01, 0.0)
    for _ in range(3):
        (adapter.loss(batch) / 24 + adapter.penalty(batch.ctx)).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
    model.eval()
    trained = model(ids, ctx=batch.ctx)
    assert model(ids, labels, batch.ctx) < before
    try:
        adapter.merge()
        assert (model(ids) - trained).abs().max() < 1e-5
        print("merged")
    except UserError as error:
        print("refused", error)
    del sys.modules[name]
    print(*sorted(set(sys.modules) & {"data", "train", "engine", "formats", "base", "tests", *SETTINGS}))
"""


def test_a_method_works_in_another_project_with_model_py_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for file in ("model.py", "multilora.py", "csreft.py", "cofitune.py"):
        shutil.copy(HERE / file, tmp_path / file)
    said = cli("-c", ALONE, cwd=tmp_path).stdout.splitlines()
    assert said[::2] == ["merged", said[2], "merged"] and said[2].startswith("refused CS-ReFT cannot be merged")
    assert said[1::2] == [""] * 3, "other modules of the project were imported"
