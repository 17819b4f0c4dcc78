"""The three methods against their equations, and what every method fulfils: `python -m pytest`.

For whoever writes a method: `python -m pytest -x test_methods.py -k multilora` (or csreft, cofitune) stops at the first
part that is wrong, and says what was expected. The tests stand in the order in which a method is written, and each is
named after the part that it looks at. `python -m tests.mutate` tests the tests.

The oracles are independent of the code they check: the equation written out as a naive loop in float64 with torch's
gradients of it, and peft and pyreft where they are installed. Everything else is tested in `tests/`; this file uses its
`helpers.py`. What takes longer than about four seconds is marked slow: `python -m pytest -m ""` runs all.

Read in this order: MultiLoRA, CS-ReFT, CoFiTune, every method, in another place.
"""

import doctest
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
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
from data import Segment
from model import Cache, Context, Llama, LlamaConfig, UserError, find_linears, parse_layers
from reproduce.gates import gates_by_task
from tests.helpers import (BASE, HERE, QUICK, builtin_examples, cli, clone, greedy_without_cache, json_lines, perturb,
                           random_ids, settled, tiny, trained_on_builtin)

DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same(got, wanted, words, atol=1e-9):
    """Fails with these words where two tensors (or lists of numbers) differ."""
    got, wanted = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (got, wanted))
    assert got.shape == wanted.shape, f"{words}: found shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    off = (got - wanted).abs().max().item()
    assert off <= atol, f"{words}: the largest difference is {off:.2g}"


def same_gradients(got, wanted, named, words):
    """Fails with these words and the tensor's name where d got differs from d wanted. named: {name: tensor}"""
    assert got.requires_grad, f"{words}: there are none, as if everything were detached"
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(5))
    found, expected = (torch.autograd.grad((t * weights).sum(), list(named.values()), allow_unused=True)
                       for t in (got, wanted))
    for name, one, other in zip(named, found, expected):
        assert one is not None, f"{words}: none reaches {name}, as if it were detached"
        same(one, other, f"{words}: that of {name}", atol=1e-8)


def rates(model, adapter):
    """{name of a trained parameter: (rate, weight decay)} that the optimiser is asked for at rate 1 and decay 0.1."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (group["lr"], group["weight_decay"]))
             for group in adapter.param_groups(1.0, 0.1) for p in group["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups of the optimiser"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert dict(found).keys() == trained, f"not in the optimiser's groups: {sorted(trained - dict(found).keys())}"
    return dict(found)


# ---------------------------------------------------------------------------------------------- MultiLoRA


def update_of(n=3, alpha=5.0, scaling="vector", dropout=0.0):
    """A MultiLoRA of rank 2 beside a linear layer of 10 -> 7 in float64, every number random, as if trained."""
    linear = torch.nn.Linear(10, 7, bias=False, dtype=torch.float64)
    m = multilora.MultiLoRA(linear, multilora.Config(n, 2, alpha, scaling, dropout))
    for seed, p in enumerate(m.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return m


def naive_update(m, x, alpha=5.0):
    """(alpha / r) sum_i s_i * (B_i A_i x), one module at a time."""
    return alpha / 2 * sum((1.0 if m.s is None else m.s[i]) * (x @ m.A[i].T @ m.B[i].T) for i in range(len(m.A)))


@pytest.mark.parametrize("scaling, width", [("vector", 48), ("scalar", 1), ("none", None)])
def test_multilora_init_draws_A_and_B_and_starts_s_at_zero(scaling, width):
    m = multilora.MultiLoRA(torch.nn.Linear(64, 48, bias=False), multilora.Config(3, 4, scaling=scaling))
    found = {name: tuple(p.shape) for name, p in m.named_parameters()}
    wanted = {"A": (3, 4, 64), "B": (3, 48, 4), **({"s": (3, width)} if width else {})}
    assert found == wanted, f"trained with --scaling {scaling} are {wanted}, found {found}"
    bounds = {"A": ("1/sqrt(in)", 64**-0.5), "B": ("1/sqrt(r)", 4**-0.5)}
    for name in "A" if scaling == "none" else "AB":
        (formula, bound), t = bounds[name], getattr(m, name).detach()
        words = f"{name}_i starts uniform in +-{formula} = {bound:.4g}"
        assert 0.98 * bound < t.abs().max() <= bound, f"{words}, found up to {t.abs().max():.4g}"
        assert t.std() == pytest.approx(bound / 3**0.5, rel=0.1), f"{words}, found a deviation of {t.std():.4g}"
        assert abs(t.mean()) < 0.1 * bound, f"{words}, found a mean of {t.mean():.4g}"
    zero = m.B if scaling == "none" else m.s
    assert not zero.any(), f"with --scaling {scaling}, {'B' if scaling == 'none' else 's'} starts at zero"


@pytest.mark.parametrize("base, wanted", DTYPES, ids=str)
def test_multilora_init_trains_float32_or_more(base, wanted):
    m = multilora.MultiLoRA(torch.nn.Linear(8, 8, dtype=base), multilora.Config())
    for name, p in m.named_parameters():
        assert p.dtype == wanted, f"{name} beside a {base} base is {wanted}, found {p.dtype}"


@pytest.mark.parametrize("n, alpha, scaling, words", [
    (1, 2.0, "none", "one module without s and alpha = r: ΔW = B_1 A_1"),
    (1, 5.0, "none", "ΔW is multiplied by alpha / r, here 5 / 2"),
    (3, 2.0, "none", "the B_i A_i of the n modules add up"),
    (3, 2.0, "vector", "row o of B_i A_i is multiplied by s_i[o]"),
    (3, 5.0, "scalar", "B_i A_i is multiplied by its own number s_i"),
], ids=["B A", "alpha over r", "sum", "vector", "scalar"])
def test_multilora_factors_and_delta_multiply_to_the_update(n, alpha, scaling, words):
    m = update_of(n, alpha, scaling)
    down, up = m.factors()
    assert (down.shape, up.shape) == ((2 * n, 10), (7, 2 * n)), "factors() are down (n r, in) and up (out, n r)"
    wanted = naive_update(m, torch.eye(10, dtype=torch.float64), alpha).T
    same(up @ down, wanted, words)
    same(m.delta(), wanted, "delta() is up @ down, ΔW (out, in)")


def test_multilora_forward_is_the_naive_sum_with_its_gradients():
    m, x = update_of(), torch.randn(4, 6, 10, dtype=torch.float64)
    got, wanted = m(x), naive_update(m, x)
    same(got, wanted, "the update of x is (alpha / r) sum_i s_i * (B_i A_i x)")
    same_gradients(got, wanted, dict(m.named_parameters()), "the gradients of the update")


def test_multilora_forward_drops_inputs_in_training_alone_by_one_mask_for_all_modules():
    m, x = update_of(dropout=0.5), torch.randn(5, 10, dtype=torch.float64)
    torch.manual_seed(1)
    got = m(x)
    torch.manual_seed(1)
    same(got, naive_update(m, torch.nn.functional.dropout(x, 0.5)), "in training each B_i A_i sees the same dropout(x)")
    same(m.eval()(x), naive_update(m, x), "there is no dropout at evaluation")


def test_multilora_attach_adds_the_update_to_the_targets_alone():
    model = tiny(torch.float64)
    multilora.attach(model, multilora.Config(3, 2, 5.0, dropout=0.5, targets="q_proj, down_proj"))
    perturb(model, 0.3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {f"model.layers.{i}.{name}.multilora.{key}" for i in (0, 1) for key in "ABs"
              for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert trained == wanted, f"the base is frozen, A, B and s of each target are trained; wrong: {trained ^ wanted}"
    linear, x = model.model.layers[1].mlp.down_proj, torch.randn(4, 7, 48, dtype=torch.float64)
    got = linear(x)
    same(got, linear(x), "attached to a model in evaluation, the update is in evaluation too, without dropout")
    same(got, x @ linear.weight.T + naive_update(linear.multilora, x), "y = W x + the update of x")


def test_multilora_param_groups_decay_A_and_B_and_not_s():
    for scaling in ("vector", "none"):  # without s there is no None among the parameters
        model = tiny()
        for name, found in rates(model, multilora.attach(model, multilora.Config(scaling=scaling))).items():
            wanted = (1.0, 0.0 if name.endswith(".s") else 0.1)
            assert found == wanted, f"{name[-11:]} has (rate, weight decay) = {wanted} of --lr 1 and 0.1, found {found}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_multilora_merge_adds_the_update_to_the_weight_and_rounds_once(dtype):
    model = tiny(dtype)
    adapter = multilora.attach(model, multilora.Config(3, 2, 5.0))
    perturb(model, 0.2)
    wanted = {name: linear.weight.double() + naive_update(linear.multilora.double(), torch.eye(
        linear.in_features, dtype=torch.float64)).T for name, linear in find_linears(model, multilora.LINEARS).items()}
    merged, ids = tiny(dtype), random_ids(model)
    adapter.merge()
    for name, linear in find_linears(model, multilora.LINEARS).items():
        rounded = wanted[name].to(dtype).double()
        wrong = ((linear.weight.double() - rounded).abs() > 1e-9).double().mean().item()
        assert wrong < 0.01, f"merged, {name} is W + ΔW rounded to {dtype} once: {wrong:.0%} of its numbers differ"
        merged.get_submodule(name).weight.data.copy_(linear.weight)
    assert not any("multilora" in name for name in model.state_dict()), "merge() takes A, B and s out of the model"
    assert torch.equal(model(ids), merged(ids)), "merge() takes the hooks away: the update was added twice"


def test_multilora_report_is_of_singular_values_over_their_sum_and_their_spread(monkeypatch):
    q, _ = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))
    delta = q @ torch.diag(torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)) @ q.T
    same(multilora.singular_values(delta, 4), [0.5, 0.375, 0.125, 0.0], "singular values 4, 3, 1, 0 over their sum, 8")
    same(multilora.singular_values(delta, 2), [4 / 7, 3 / 7], "the largest two of 4, 3, 1, over the sum of these, 7")
    same(multilora.singular_values(0 * delta, 3), [0.0, 0.0, 0.0], "singular values of ΔW = 0 are zeros")
    for values, rank in (([1.0, 0.0], 1.0), ([0.5, 0.5], 2.0), ([0.5, 0.25, 0.25], 2**1.5)):
        found = multilora.spread(torch.tensor(values, dtype=torch.float64))
        assert found == pytest.approx((values[0], rank)), f"(first, exp(-sum v log v)) of {values}: found {found}"
    model = tiny(torch.float64)
    adapter = multilora.attach(model, multilora.Config(2, 3, targets="q_proj,up_proj"))
    perturb(model, 0.3)
    norm, deltas = torch.linalg.matrix_norm, adapter.deltas()
    shares = [norm(delta, 2) / norm(delta, "nuc") for delta in deltas.values()]
    for linear, delta in zip(adapter.linears.values(), deltas.values()):
        core, both = linear.multilora.core(), min(6, *delta.shape)
        assert core.shape[0] <= 6 >= core.shape[1], f"core() is no larger than n r = 6, found {tuple(core.shape)}"
        same(torch.linalg.svdvals(core)[:both], torch.linalg.svdvals(delta)[:both], "core()'s singular values are ΔW's")
    monkeypatch.setattr(multilora.MultiLoRA, "delta", lambda self: pytest.fail("report() made ΔW, which is slow at 7B"))
    found = adapter.report()
    same(found["first_value_share"], sum(shares) / 4, "the first singular value's share, mean over the four weights")
    assert found["total_rank"] == 6 > found["effective_rank"] > 1, f"total_rank is n r = 6, found {found['total_rank']}"


def test_multilora_lora_is_one_module_of_the_same_total_rank_and_factor():
    lora, own = multilora.PRESETS["lora"], multilora.Config()
    assert (lora.modules, lora.scaling) == (1, "none"), "LoRA is n = 1 with B = 0 at the start and no s"
    assert (lora.rank, lora.alpha / lora.rank) == (own.modules * own.rank, own.alpha / own.rank), (
        "LoRA is compared at rank n r and at the same alpha / r")


def test_multilora_lora_equals_peft(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ours = tiny()
    ours.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    multilora.attach(ours, replace(multilora.PRESETS["lora"], rank=3, alpha=6.0))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(multilora.LINEARS), lora_dropout=0.0)).eval()
    perturb(ours, 0.2)
    with torch.no_grad():
        for name, linear in find_linears(ours, multilora.LINEARS).items():
            twin = theirs.get_submodule(f"base_model.model.{name}")
            twin.lora_A["default"].weight.copy_(linear.multilora.A[0])
            twin.lora_B["default"].weight.copy_(linear.multilora.B[0])
        ids = random_ids(ours)
        same(ours(ids), theirs(ids).logits, "logits of --method lora and of peft's LoRA", atol=1e-4)
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(ours) == count(theirs), "trainable parameters of --method lora and of peft's LoRA"


# ---------------------------------------------------------------------------------------------- CS-ReFT


def csreft_config(**changes):
    return csreft.Config(**{"subspaces": 3, "rank": 2, **changes})


def edits_of(**changes):
    """The CSReFT of a two-layer model of width 32 in float64, k = 3, r = 2, every number random, as if trained."""
    torch.manual_seed(0)
    edits = csreft.CSReFT(tiny(torch.float64), csreft_config(**changes), [0, 1]).eval()
    perturb(edits, 0.5)
    edits.orthonormalize()
    return edits


def prompts_of(*lengths):
    """(embeddings (B, 8, 32), prompt mask (B, 8)) of prompts of these lengths."""
    return (torch.randn(len(lengths), 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            torch.arange(8) < torch.tensor(lengths)[:, None])


def naive_gates(edits, x):
    """sigmoid(V_2 relu(V_1 x + c_1) + c_2)"""
    first, _, second = edits.router
    hidden = (x @ first.weight.T + first.bias).clamp_min(0)
    return 1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))


def naive_edit(edits, i, h, gates, edited=None):
    """The equation, one subspace and one token at a time: h (B, T, d), gates (B, k)."""
    rows = []
    for b, t in product(range(h.shape[0]), range(h.shape[1])):
        row = h[b, t]
        if edited is None or edited[b][t]:
            for n in range(gates.shape[1]):
                R, W, bias = edits.R[i, n], edits.W[i, n], edits.b[i, n]
                row = row + gates[b, n] * (R.T @ (W @ h[b, t] + bias - R @ h[b, t]))
        rows.append(row)
    return torch.stack(rows).view(h.shape)


def test_csreft_config_and_parse_positions_are_as_the_docstring_says():
    found = csreft.Config()
    wanted = replace(found, layers="all", positions="all", route_on="prompt_mean", router=True, router_norm=True,
                     gate="soft", ortho="joint", sparsity=0.0)
    assert found == wanted, f"what the docstring says of --layers, --positions, ...: {wanted}, found {found}"
    loreft = csreft.PRESETS["loreft"]
    assert (loreft.subspaces, loreft.rank, loreft.router) == (1, found.subspaces * found.rank, False), (
        "LoReFT is all rank in one subspace, without a router")
    for text, wanted in (("all", None), ("f5+l3", (5, 3)), ("l1", (0, 1)), ("f2", (2, 0))):
        assert csreft.parse_positions(text) == wanted, f"--positions {text} is (first, last) = {wanted}"


@pytest.mark.parametrize("ortho", ["joint", "separate"])
def test_csreft_orthonormalize_keeps_the_direction_of_every_row(ortho):
    """Oracle: Gram-Schmidt, whose rows are those of a QR without negative numbers on its diagonal."""
    R = torch.randn(2, 3, 2, 16, dtype=torch.float64)
    edits = SimpleNamespace(R=R.clone(), config=csreft_config(ortho=ortho))
    csreft.CSReFT.orthonormalize(edits)
    for layer, i, n in product(range(2), range(3), range(2)):
        if n == 0 and (i == 0 or ortho == "separate"):
            done = []
        got, row = edits.R[layer, i, n], R[layer, i, n]
        for other in done:
            same(got @ other, 0.0, f"with --ortho {ortho}, a row of R_i is orthogonal to those before it")
            row = row - (row @ other) * other
        done.append(row / row.norm())
        same(got.norm(), 1.0, "rows of R_i have length 1")
        assert got @ row > 0, "the QR may turn a row round: signs keep its direction"
        same(got, done[-1], f"with --ortho {ortho}, row {n} of R_{i + 1} made orthogonal to those before it")


@pytest.mark.parametrize("ortho", ["joint", "separate"])
def test_csreft_init_starts_W_at_R_and_b_at_zero(ortho):
    edits = csreft.CSReFT(tiny(), csreft_config(ortho=ortho), [0, 1])
    shapes = [tuple(t.shape) for t in (edits.R, edits.W, edits.b)]
    assert shapes == [(2, 3, 2, 32), (2, 3, 2, 32), (2, 3, 2)], f"R, W (L, k, r, d) and b (L, k, r), found {shapes}"
    rows = edits.R.flatten(1, 2) if ortho == "joint" else edits.R
    same(rows @ rows.mT, torch.eye(rows.shape[-2]).expand(*rows.shape[:-1], -1), "R starts orthonormal", atol=1e-5)
    assert not torch.equal(edits.R[0], edits.R[1]), "R starts random, in each layer another one"
    assert torch.equal(edits.W, edits.R), "W_i starts at R_i"
    assert edits.W.data_ptr() != edits.R.data_ptr(), "W_i is a copy of R_i: training moves them apart"
    assert not edits.b.any(), "b_i starts at zero"
    assert csreft.CSReFT(tiny(), csreft_config(router=False), [0]).router is None, "--no-router: there is no router"


@pytest.mark.parametrize("base, wanted", DTYPES, ids=str)
def test_csreft_init_makes_a_router_of_two_layers_in_float32_or_more(base, wanted):
    edits = csreft.CSReFT(tiny(base), csreft_config(), [0])
    shapes = {name: tuple(p.shape) for name, p in edits.router.named_parameters()}
    assert list(shapes.values()) == [(16, 32), (16,), (3, 16), (3,)], (
        f"the router is V_1 (d/2, d), c_1, V_2 (k, d/2), c_2, found {shapes}")
    for name, p in edits.named_parameters():
        assert p.dtype == wanted, f"{name} beside a {base} base is {wanted}, found {p.dtype}"


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
def test_csreft_read_is_the_prompts_mean_or_first_token_at_unit_root_mean_square(route_on):
    h, prompt = prompts_of(8, 4, 1)
    for norm in (False, True):
        got = edits_of(route_on=route_on, router_norm=norm).read(0.02 * h, prompt)
        for b, n in enumerate((8, 4, 1)):
            x = 0.02 * (h[b, 0] if route_on == "first_token" else sum(h[b, t] for t in range(n)) / n)
            words = "the first token" if route_on == "first_token" else "the mean over the prompt's tokens"
            if norm:
                x = x / math.sqrt(sum(v * v for v in x.tolist()) / 32)
            same(got[b], x, f"x is {words}, " + ("divided by its root mean square" if norm else "as it is"))
    assert edits_of().read(h.float(), prompt).dtype == torch.float64, "x has the router's dtype, not the embedding's"


def test_csreft_route_is_a_sigmoid_of_a_network_of_two_layers():
    (h, prompt), edits, ctx, bare = prompts_of(8, 4, 1), edits_of(), Context(), Context()
    ctx.prompt_mask = prompt
    edits.route(h, ctx)
    edits.route(h, bare)
    wanted = naive_gates(edits, edits.read(h, prompt))
    same(ctx.memory["gates"], wanted, "α = sigmoid(V_2 relu(V_1 x + c_1) + c_2)")
    same_gradients(ctx.memory["gates"], wanted, dict(edits.router.named_parameters()), "the router's gradients")
    same(bare.memory["gates"], naive_gates(edits, edits.read(h, prompt | True)), "without a prompt mask all is prompt")
    with torch.autocast("cpu", torch.bfloat16):
        edits.float().route(h.float(), ctx)
    same(ctx.memory["gates"], wanted, "autocast does not round the router", atol=1e-5)
    ctx.memory["gates"], ctx.prompt_mask, ctx.cache = "those of the prompt", None, object()
    edits.route(h, ctx)
    assert ctx.memory["gates"] == "those of the prompt", "while decoding the gates stay as they are"


def test_csreft_route_opens_hard_gates_above_a_half_at_evaluation_alone():
    h, _ = prompts_of(*[8] * 20)
    edits, ctx = edits_of(gate="hard"), Context()
    soft = naive_gates(edits, edits.read(h, torch.ones(20, 8, dtype=torch.bool)))
    assert ((soft > 0.5) != (soft > 0.4)).any() and ((soft > 0.5) != (soft > 0.6)).any(), "the test shows nothing"
    edits.route(h, ctx)
    same(ctx.memory["gates"], soft > 0.5, "--gate hard: 1 above 0.5, else 0")
    edits.train().route(h, ctx)
    same(ctx.memory["gates"], soft, "--gate hard: the gates stay soft in training")


def test_csreft_route_without_a_router_opens_every_gate_and_off_closes_one():
    h, _ = prompts_of(8, 8)
    for router, off in ((False, None), (False, 0), (True, 2)):
        edits, ctx = edits_of(router=router), Context()
        edits.route(h, ctx)
        gates = ctx.memory["gates"]
        if not router:
            same(gates, torch.ones(2, 3), "without a router every α is 1")
        edits.off = off
        edits.route(h, ctx)
        wanted = [[gate * (i != off) for i, gate in enumerate(row)] for row in gates.tolist()]
        same(ctx.memory["gates"], wanted, f"off = {off}: that gate alone is 0, the others are as before")


@pytest.mark.parametrize("positions, wanted", [
    ("f2+l2", ["11....11", "11.11...", "11......"]), ("f1", ["1.......", "1.......", "1......."]),
    ("l3", [".....111", "..111...", "11......"]), ("f5+l5", ["11111111", "11111...", "11......"])])
def test_csreft_route_marks_the_first_and_last_tokens_of_each_prompt(positions, wanted):
    (h, prompt), edits = prompts_of(8, 5, 2), edits_of(positions=positions)
    ctx = Context(prompt)
    edits.route(h, ctx)
    found = ["".join(".1"[mark] for mark in row) for row in ctx.memory["edited"].int().tolist()]
    assert found == wanted, f"--positions {positions} of prompts of 8, 5 and 2 tokens edits {wanted}, found {found}"


def test_csreft_edit_replaces_coordinates_and_equals_the_naive_sum():
    (h, prompt), edits = prompts_of(8, 5), edits_of()
    gates = torch.tensor([[1.0, 0.0, 1.0], [0.3, 0.9, 0.0]], dtype=torch.float64, requires_grad=True)
    edit = lambda gates: edits.edit(1, h, Context(prompt, memory={"gates": gates}))
    same(edit(0 * gates), h, "with α = 0 the hidden state stays as it is")
    got = edit(gates)
    R, W, b = edits.R[1], edits.W[1], edits.b[1]
    for n in (0, 2):  # open for the first prompt; with --ortho joint no other subspace has a part in R_i h
        same(got[0] @ R[n].T, h[0] @ W[n].T + b[n], "with α_i = 1 the coordinates R_i h' are W_i h + b_i")
    same(got[0] @ R[1].T, h[0] @ R[1].T, "with α_i = 0 the coordinates R_i h' are R_i h")
    wanted = naive_edit(edits, 1, h, gates)
    same(got, wanted, "h' = h + sum_i α_i R_i^T (W_i h + b_i - R_i h)")
    same_gradients(got, wanted, {"R": edits.R, "W": edits.W, "b": edits.b, "the gates": gates}, "the edit's gradients")


def test_csreft_edit_leaves_other_positions_and_with_positions_all_generated_tokens():
    h, prompt = prompts_of(8, 5)
    for positions in ("all", "f2+l1"):
        edits, edited = edits_of(positions=positions), torch.rand(2, 8) < 0.5
        gates = torch.rand(2, 3, dtype=torch.float64)
        memory = {"gates": gates} | ({} if positions == "all" else {"edited": edited})
        wanted = naive_edit(edits, 0, h, gates, None if positions == "all" else edited)
        same(edits.edit(0, h, Context(prompt, memory=memory)), wanted, f"--positions {positions}: the marked tokens")
        decoding = edits.edit(0, h, Context(cache=SimpleNamespace(memory=memory)))
        same(decoding, naive_edit(edits, 0, h, gates) if positions == "all" else h,
             f"--positions {positions}: generated tokens are {'edited' if positions == 'all' else 'left alone'}")


@pytest.mark.parametrize("positions", ["all", "f2+l2"])
@torch.no_grad()
def test_csreft_attach_routes_on_the_embeddings_and_edits_after_the_chosen_layers(positions):
    """Two models with equal weights: in one the hooks edit, in the other the test does, layer by layer."""
    ours, plain = (tiny(torch.float64, num_hidden_layers=4) for _ in range(2))
    adapter = csreft.attach(ours, csreft_config(layers="1,3", positions=positions))
    perturb(ours, 0.5)
    adapter.after_step()
    ids, ctx = random_ids(ours, 3, 12), Context(torch.arange(12) < torch.tensor([12, 4, 7])[:, None])
    got = ours(ids, ctx=ctx)
    gates = naive_gates(adapter.edits, adapter.edits.read(ours.model.embed_tokens(ids), ctx.prompt_mask))
    same(ctx.memory["gates"], gates, "the router reads the input embeddings, whichever layers are edited")
    for i, number in enumerate((1, 3)):
        plain.model.layers[number].register_forward_hook(
            lambda m, a, h, i=i: naive_edit(adapter.edits, i, h, gates, ctx.memory.get("edited")))
    same(got, plain(ids), "--layers 1,3: the outputs of layers 1 and 3 (0-based) are edited, by the edits 0 and 1")


def test_csreft_attach_freezes_the_base_and_refuses_more_rows_than_the_width():
    model = tiny()
    csreft.attach(model, csreft_config())
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    wanted = ["R", "W", "b", "router.0.bias", "router.0.weight", "router.2.bias", "router.2.weight"]
    assert trained == [f"csreft.{name}" for name in wanted], f"beside a frozen base {wanted} are trained: {trained}"
    assert not model.csreft.training, "attached to a model in evaluation, the edits are in evaluation too"
    for ortho, rank, fits in (("joint", 10, True), ("joint", 11, False), ("separate", 32, True),
                              ("separate", 33, False)):
        with nullcontext() if fits else pytest.raises(UserError, match=f"--rank {rank} .* --ortho {ortho} .* width 32"):
            csreft.attach(tiny(), csreft_config(rank=rank, ortho=ortho))


def test_csreft_param_groups_have_the_routers_rate_and_no_decay_on_R_and_biases():
    for given, rate in ((0.5, 0.5), (None, 0.4)):
        model = tiny()
        for name, found in rates(model, csreft.attach(model, csreft_config(router_lr=given))).items():
            wanted = (rate if "router" in name else 1.0, 0.1 if name == "csreft.W" or name.endswith("weight") else 0.0)
            assert found == wanted, (
                f"{name} has (rate, decay) = {wanted} of --lr 1, --router-lr {given} and 0.1, found {found}")


def test_csreft_penalty_is_the_mean_gate():
    adapter = csreft.attach(tiny(), csreft_config(sparsity=0.5))
    gates = torch.tensor([[0.1, 0.2, 0.9], [0.4, 0.5, 0.6]], requires_grad=True)
    got = adapter.penalty(Context(memory={"gates": gates}))
    same(got, 0.5 * 2.7 / 6, "the penalty is λ mean(α), here 0.5 * 0.45", atol=1e-6)
    same_gradients(got, 0.5 * sum(sum(row) for row in gates) / 6, {"the gates": gates}, "the penalty's gradients")
    assert csreft.attach(tiny(), csreft_config()).penalty(Context()) == 0, "without --sparsity there is no penalty"


def test_csreft_orthonormality_error_in_report_is_the_largest_and_after_step_ends_it():
    for ortho, wanted in (("joint", 0.3), ("separate", 0.2)):
        adapter = csreft.attach(tiny(torch.float64), csreft_config(ortho=ortho))
        edits = adapter.edits
        edits.R.data = torch.eye(32, dtype=torch.float64)[:6].view(1, 3, 2, 32).repeat(2, 1, 1, 1)
        edits.R.data[1, 2, 1, 4] = 0.2  # within R_3, whose rows are the axes 4 and 5
        edits.R.data[0, 2, 0, 0] = -0.3  # between R_3 and R_1
        edits.R.data[0, 2, 0, 4] = math.sqrt(1 - 0.3**2)
        found = adapter.report()
        same(found["orthonormality_error"], wanted, f"the largest of |R_i R_i^T - I| with --ortho {ortho}")
        perturb(edits)
        adapter.after_step()
        rows = edits.R.flatten(1, 2) if ortho == "joint" else edits.R
        same(rows @ rows.mT, torch.eye(rows.shape[-2]).expand(*rows.shape[:-1], -1), "after_step() ends it")
    assert found["edit_parameters"] == 2 * 3 * 2 * (32 + 32 + 1), "numbers in R, W and b"
    assert found["router_parameters"] == 16 * 32 + 16 + 3 * 16 + 3, "numbers in V_1, c_1, V_2 and c_2"


@torch.no_grad()
def test_csreft_loreft_equals_its_equation_and_pyreft():
    model = tiny()
    adapter = csreft.attach(model, replace(csreft.PRESETS["loreft"], rank=4))
    perturb(model, 0.5)
    adapter.after_step()
    edits, h = adapter.edits, torch.randn(2, 5, 32)
    ctx = Context()
    edits.route(h, ctx)
    got = edits.edit(1, h, ctx)
    same(got, naive_edit(edits, 1, h, torch.ones(2, 1)), "LoReFT: h' = h + R^T (W h + b - R h)", atol=1e-5)
    pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed; the written-out equation above was checked")
    theirs = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4, dtype=torch.float32)
    theirs.rotate_layer.parametrizations.weight[0].base.copy_(torch.eye(32))
    theirs.rotate_layer.weight = edits.R[1, 0].T
    theirs.learned_source.weight.copy_(edits.W[1, 0])
    theirs.learned_source.bias.copy_(edits.b[1, 0])
    same(got, theirs.eval()(h), "the edit of --method loreft and of pyreft", atol=1e-5)


@pytest.mark.parametrize("route_on", ["prompt_mean", "first_token"])
def test_csreft_prepare_says_that_the_first_token_cannot_tell_tasks_apart(capsys, route_on):
    """Behind one BOS and one template the first token is always the same, so the gates end at one value for both."""
    model, adapter = trained_on_builtin(csreft, csreft_config(route_on=route_on), steps=8)
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --route-on")]
    constant = route_on == "first_token"
    assert len(note) == constant == adapter.report()["constant_gates"], (
        f"--route-on {route_on}: whether a note says that the gates are constant, found {note}")
    tokenizer, examples = builtin_examples()
    tests = {task: [e for e in examples if e.task == task][:20] for task in {e.task for e in examples}}
    one, other = gates_by_task(model, adapter, tests, tokenizer.pad_id).values()
    apart = max(abs(a - b) for a, b in zip(one, other))
    assert apart == 0 if constant else apart > 0.1, f"--route-on {route_on}: two tasks' gates are {apart:.2g} apart"


@torch.no_grad()
def test_csreft_gates_of_a_talk_in_training_are_those_of_a_chat():
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
def test_csreft_generation_in_a_batch_equals_one_by_one_and_no_cache(positions):
    model = tiny(torch.float64)
    csreft.attach(model, csreft_config(positions=positions))
    perturb(model, 0.5)
    prompts = [random_ids(model, 1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6)]
    wanted = [greedy_without_cache(model, p, 10) for p in prompts]
    assert model.generate(prompts, 10) == wanted == [model.generate([p], 10)[0] for p in prompts]
    assert wanted != tiny(torch.float64).generate(prompts, 10), "the edits changed nothing: the test shows nothing"


# ---------------------------------------------------------------------------------------------- CoFiTune


def cofitune_config(**changes):
    chosen = {"layers": "all", "modules": "q_proj,v_proj,up_proj,down_proj"}
    return cofitune.Config(**{**chosen, "importance_batches": 2, **changes})


def batches(model, count=2, batch=3):
    """Made-up training batches, the second with fewer labels; a step that prepares a method is a list of them, here of
    one."""
    for i in range(count):
        ids = random_ids(model, batch, 9, seed=10 + i)
        labels = ids.clone()
        labels[:, : 4 + 2 * i] = -100
        yield data.Batch(ids, labels, Context(labels == -100, torch.zeros(batch, dtype=torch.long)))


def test_cofitune_config_and_parse_shares_are_as_the_docstring_says():
    found = cofitune.Config()
    wanted = replace(found, layers="search", mask_on="update", mask_source="importance", shares="")
    assert found == wanted, f"what the docstring says of --layers, --mask-on, ...: {wanted}, found {found}"
    sft = cofitune.PRESETS["sft"]
    assert (sft.layers, sft.modules, sft.mask_on) == ("all", "all", "none"), "SFT trains everything, without a mask"
    assert cofitune.parse_shares("1,0.25,0.5,") == [0.25, 0.5, 1.0], "shares are in order"


def test_cofitune_harmonic_is_the_harmonic_mean_with_its_error():
    """Oracle: the reciprocals' mean, and how far H moves where S and V move by their errors, one after the other."""
    mean = lambda S, V: 2 / (1 / S + 1 / V)
    for S, V, errors in ((30.0, 60.0, (2.0, 3.0)), (0.5, 99.0, (0.1, 4.0)), (50.0, 50.0, (1.0, 0.0))):
        H, error = cofitune.harmonic({"speciality": S, "versatility": V, "errors": errors})
        by_S, by_V = ((mean(S + 1e-6, V) - mean(S, V)) / 1e-6, (mean(S, V + 1e-6) - mean(S, V)) / 1e-6)
        assert H == pytest.approx(mean(S, V)), f"H = 2 S V / (S + V) of {S} and {V} is {mean(S, V):.4g}, found {H:.4g}"
        wanted = math.hypot(by_S * errors[0], by_V * errors[1])
        assert error == pytest.approx(wanted, rel=1e-4), (
            f"the error of H is sqrt((dH/dS e_S)^2 + (dH/dV e_V)^2) = {wanted:.4g}, found {error:.4g}")
    for V in (0.0, 90.0):
        found = cofitune.harmonic({"speciality": 0.0, "versatility": V, "errors": (0.0, 1.0)})
        assert found == (0.0, 0.0), f"H of 0 and {V} is 0, without error, found {found}"


def searched(count, landscape):
    """(the settled Config, [(layers, modules)] in the order of their trials) of plan() for a model of `count` layers.
    landscape(layers, modules, a=share) is a node's (speciality, versatility)."""
    asked = {}

    def trial(name, config, steps, lr):
        assert config.mask_on == "none", "nodes of the search are trained without a mask"
        assert (steps, lr) == (7, 0.5), "a node has --search-steps and --search-lr"
        assert name not in asked and parse_layers(config.layers, count)
        shares, wanted = cofitune.parse_shares(config.shares), [0.25, 0.5, 0.75, 1.0]
        assert shares == ([0.0] if not asked else []) + wanted, "a node is scored at each a, the first one at 0 as well"
        asked[name] = config.layers, config.modules
        points = [(share, *landscape(*asked[name], a=share)) for share in shares]
        return {"seconds": 1.0, "points": [{"share": share, "speciality": S, "versatility": V, "errors": (1.0, 1.0)}
                                           for share, S, V in points]}

    given = cofitune.Config(search_steps=7, search_lr=0.5, mask_on="grad")
    chosen = cofitune.plan(given, LlamaConfig(96, 32, 48, count, 4), trial)
    assert chosen == replace(given, layers=chosen.layers, modules=chosen.modules), (
        "plan() settles layers and modules, everything else stays as it was asked for")
    return (chosen.layers, chosen.modules), list(asked.values())


MHA, FFN = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
LEVEL_1 = [("all", "all"), *product(("0%-50%", "25%-75%", "50%-100%"), (MHA, FFN))]


@pytest.mark.parametrize("layers, kind, quarter, parts, best", [
    ("25%-75%", FFN, ("25%-50%", "50%-75%"), ("up_proj", "down_proj", "up_proj,down_proj", "gate_proj,up_proj"), 2),
    ("50%-100%", MHA, ("75%-100%", "50%-75%"), ("q_proj", "k_proj", "v_proj", "o_proj", "q_proj,k_proj,v_proj"), 1)],
    ids=["the MLP wins", "attention wins"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_cofitune_plan_walks_to_the_best_node_each_at_its_best_share(layers, kind, quarter, parts, best, share):
    """By the harmonic mean. The sum would choose any other node, and any other share."""
    good = {(layers, kind): (30, 50), (quarter[0], kind): (40, 50), (quarter[0], parts[best]): (40, 55)}
    chosen, asked = searched(8, lambda *node, a: good.get(node, (1, 99)) if a == share else (0, 100))
    wanted = [*LEVEL_1, *((part, kind) for part in sorted(quarter)), *((quarter[0], part) for part in parts)]
    assert asked[:7] == wanted[:7], f"level 1 trains everything, then three ranges with MHA and FFN, found {asked[:7]}"
    assert asked[7:9] == wanted[7:9], f"level 2 are the quarters of {layers} with the winner's modules: {asked[7:9]}"
    assert asked[9:] == wanted[9:], f"level 3 are the modules inside {kind} in {quarter[0]}, found {asked[9:]}"
    assert chosen == (quarter[0], parts[best]), f"the best H at a = {share} decides, found {chosen}"


def test_cofitune_plan_keeps_the_wider_node_unless_one_inside_it_is_better():
    for inside, wanted in ((49, ("25%-75%", FFN)), (50, ("25%-75%", FFN)), (51, ("25%-50%", "up_proj"))):
        values = {("25%-75%", FFN): 50, ("25%-50%", FFN): inside, ("25%-50%", "up_proj"): inside + 1}
        chosen, _ = searched(8, lambda *node, a: (values.get(node, 20),) * 2)
        assert chosen == wanted, f"H is 50 for the wider node, {inside} for its quarter: chosen is {chosen}"


def test_cofitune_plan_and_draw_tree_show_sums_and_harmonic_means(capsys):
    """The base is a = 0 of the node that trains everything, and no candidate."""
    points = {("all", "all", 0.0): (4, 99), ("all", "all", 0.5): (80, 90), ("25%-75%", FFN, 0.75): (30, 60),
              ("50%-100%", FFN, 1.0): (30, 59)}
    searched(8, lambda *node, a: points.get((*node, a), (10, 10)))
    said = capsys.readouterr().out
    rows = {" ".join(words[1:-5]): words[-5:] for words in map(str.split, said.splitlines()) if "±" in words[-1]}
    for name, wanted in {"base": "0 4.0±1.0 99.0±1.0 103.0 7.7±1.8", "SFT": "0.5 80.0±1.0 90.0±1.0 170.0 84.7±0.7",
                         "25%-75% FFN *": "0.75 30.0±1.0 60.0±1.0 90.0 40.0±0.9"}.items():
        assert rows.get(name) == wanted.split(), f"{name}: a, S, V, Uni = S + V, H are {wanted}, found {rows.get(name)}"
    assert "standard error of the chosen one: 1\n" in said, "one rival, 50%-100%: its H of 39.8 is above 40.0 - 0.9"
    assert "chosen: --layers 25%-75% --modules gate_proj,up_proj,down_proj" in said


def test_cofitune_plan_skips_the_empty_quarters_of_two_layers_and_what_is_settled():
    order = []
    chosen, asked = searched(2, lambda *node, a: order.append(node) or (len(order), len(order)))
    assert ("75%-100%", FFN) in asked and "50%-75%" not in dict(asked), "50%-75% of two layers holds none of them"
    assert chosen == asked[-1]
    fixed = cofitune.Config(layers="3,9")
    assert cofitune.plan(fixed, None, None) is fixed, "layers that are named are not searched"


def test_cofitune_units_are_heads_of_q_k_v_and_single_outputs_of_the_others():
    model = tiny(num_key_value_heads=2, intermediate_size=40)  # 4 heads of width 8
    found = {name.rsplit(".", 1)[1]: cofitune.units(linear, name, model.config)
             for name, linear in find_linears(model, cofitune.LINEARS).items()}
    wanted = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 32, "gate_proj": 40, "up_proj": 40, "down_proj": 32}
    assert found == wanted, f"units of each module: {wanted}, found {found}"


def test_cofitune_two_pass_kl_is_of_the_second_pass_against_the_first():
    model, (_, batch) = tiny(torch.float64), list(batches(tiny()))
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.3))

    def passes():
        torch.manual_seed(3)
        return [model(batch.ids)[:, :-1].log_softmax(-1)[batch.labels[:, 1:] != -100] for _ in range(2)]

    log_p1, log_p2 = passes()
    torch.manual_seed(3)
    got, wanted = cofitune.two_pass_kl(model, batch), (log_p2.exp() * (log_p2 - log_p1)).sum()
    same(got, wanted, "KL(p_2 || p_1) = sum p_2 (log p_2 - log p_1), summed over the labelled tokens")
    same_gradients(got, wanted, {"the head": model.lm_head.weight}, "the KL's gradients, through both passes")


def squashed(raw):
    """|tanh(zscore)| of a list of numbers, with the standard deviation that divides by their number."""
    mean = sum(raw) / len(raw)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in raw) / len(raw))
    return [abs(math.tanh((value - mean) / deviation)) for value in raw]


@pytest.mark.parametrize("words, steps", [
    ("I = |tanh(zscore(I_raw))|, zscore with the standard deviation over n", [[(5, 1)]]),
    ("I_raw is the mean over batches of |dL/dg|, each by itself", [[(5, 1)], [(-4, 1)], [(7, 1)]]),
    ("the gradients of a step's micro-batches add up before |.|", [[(5, 1), (-4, 1)]]),
    ("L is a mean over the labelled tokens of a step's micro-batches", [[(5, 1)], [(4, 3), (-1, 2)]]),
], ids=["z", "batches", "micro-batches", "labels"])
def test_cofitune_importance_of_known_gradients(monkeypatch, words, steps):
    """Of two linear layers alone, with a sum of c times their outputs for the KL, so that a unit's dL/dg is the sum of
    c times its outputs. A micro-batch of a step: (seed and sign of its x, number of labels)."""
    named = {"q_proj": torch.nn.Linear(3, 12).double(), "up_proj": torch.nn.Linear(3, 5).double()}
    c = torch.arange(1.0, 13.0).double()
    monkeypatch.setattr(cofitune, "two_pass_kl", lambda model, batch: sum(
        (linear(batch.x) * c[: linear.out_features]).sum() for linear in named.values()))
    x = lambda seed: torch.randn(3, generator=torch.Generator().manual_seed(seed**2)).double() * math.copysign(1, seed)
    steps = [[SimpleNamespace(x=x(seed), labels=torch.tensor([[7] + [1] * count + [-100]])) for seed, count in step]
             for step in steps]  # nothing predicts the first token, so its label does not count
    model = SimpleNamespace(config=SimpleNamespace(head_dim=4), model=SimpleNamespace(layers=[]))
    got = cofitune.importance(model, named, iter(steps), 0.1)
    for name, linear in named.items():
        raw = 0.0
        for step in steps:
            labels = sum(len(batch.labels[0]) - 2 for batch in step)
            slope = sum(c[: linear.out_features] * linear(batch.x) for batch in step) / labels
            raw += slope.view(-1, 4 if name == "q_proj" else 1).sum(1).abs() / len(steps)
        same(got[name], squashed(raw.tolist()), f"{name}: {words}")
    torch.nn.utils.vector_to_parameters(torch.zeros(20).double(), named["up_proj"].parameters())
    got = cofitune.importance(model, named, iter(steps), 0.1)
    same(got["up_proj"], torch.zeros(5), "where all units of a module have the same score, I is zero")


def test_cofitune_importance_is_the_derivative_by_a_factor_on_a_units_rows():
    """Oracle: a mask on a unit's output is a factor on its rows of weight and bias, so dL/dg is the sum of p dL/dp over
    those rows; with the same dropout drawn again."""
    model = tiny(torch.float64, num_key_value_heads=2, attention_bias=True)
    linears, ids = find_linears(model, cofitune.LINEARS), random_ids(tiny())
    before = model(ids)
    torch.manual_seed(3)
    got = cofitune.importance(model, linears, ([batch] for batch in batches(model)), 0.2)
    assert torch.equal(model(ids), before), "importance() takes its masks and its dropout out of the model"

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda block, args, output: torch.nn.functional.dropout(output, 0.2))
    torch.manual_seed(3)
    raw = dict.fromkeys(linears, 0.0)
    for batch in batches(model):
        model.zero_grad()
        log_p1, log_p2 = (model(batch.ids)[:, :-1].log_softmax(-1)[batch.labels[:, 1:] != -100] for _ in range(2))
        ((log_p2.exp() * (log_p2 - log_p1)).sum() / len(log_p1)).backward()
        for name, linear in linears.items():
            rows = 8 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1
            raw[name] += sum((p * p.grad).view(len(p) // rows, -1).sum(1) for p in linear.parameters()).abs()
    for name, values in raw.items():
        same(got[name], squashed(values.tolist()), f"{name}: I, with dropout on the outputs of attention and MLP")


def prepared(monkeypatch, **changes):
    """(adapter of a model with biases, {module name: I}) after prepare(), with random numbers as the importance."""
    model, scores = tiny(torch.float64, num_key_value_heads=2, attention_bias=True, mlp_bias=True), {}

    def importance(model, linears, steps, dropout):
        generator = torch.Generator().manual_seed(0)
        scores.update({name: torch.rand(cofitune.units(linear, name, model.config), dtype=torch.float64,
                                        generator=generator) for name, linear in linears.items()})
        return dict(scores)

    monkeypatch.setattr(cofitune, "importance", importance)
    adapter = cofitune.attach(model, cofitune_config(**changes))
    torch.manual_seed(0)
    adapter.prepare([])
    return adapter, scores


def test_cofitune_prepare_makes_the_mask_1_minus_I_or_shuffles_it(monkeypatch):
    adapter, scores = prepared(monkeypatch)
    assert adapter.masks.keys() == scores.keys() and len(scores) == 8, "each chosen linear module has a mask"
    for name, mask in adapter.masks.items():
        same(mask, 1 - scores[name], "the mask is 1 - I: important units rest, the others move")
    assert adapter.prepare_steps == 2, "prepare() wants the data of --importance-batches steps"
    adapter, scores = prepared(monkeypatch, mask_on="none")
    assert not adapter.masks and not scores and adapter.prepare_steps == 0, "--mask-on none measures no importance"
    adapter, scores = prepared(monkeypatch, mask_source="random")
    for name, mask in adapter.masks.items():
        same(mask.sort().values, (1 - scores[name]).sort().values, "--mask-source random: the same values as 1 - I")
        moved = not torch.equal(mask, 1 - scores[name])
        assert moved or name.endswith("v_proj"), "--mask-source random: on other units"  # 2 heads may stay in order


@pytest.mark.parametrize("mask_on", ["update", "grad"])
def test_cofitune_masked_rows_move_by_1_minus_I_in_before_step_or_after_step(monkeypatch, mask_on):
    """Plain gradient descent with weight decay (`update`: without it for `grad`) on non-square weights, biases and
    grouped queries. The mask is 1 - I."""
    moves, grads = {}, {}
    for on in ("none", mask_on):
        adapter, scores = prepared(monkeypatch, mask_on=on, modules="q_proj,k_proj,v_proj,up_proj,down_proj")
        model, old = adapter.model, {name: p.detach().clone() for name, p in adapter.trained.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.0 if mask_on == "grad" else 0.3)
        for batch in batches(model):
            model(batch.ids, batch.labels).backward()
        adapter.before_step()
        grads[on] = {name: p.grad.clone() for name, p in adapter.trained.items()}
        optimizer.step()
        adapter.after_step()
        moves[on] = {name: p.detach() - old[name] for name, p in adapter.trained.items()}
    assert len(moves["none"]) == 20, "weights and biases of the five modules of two layers are trained"
    for name, move in moves[mask_on].items():
        module, key = name.rsplit(".", 1)
        rows = 8 if module.endswith(("q_proj", "k_proj", "v_proj")) else 1
        spread = torch.stack([1 - scores[module][row // rows] for row in range(len(move))])
        wanted = spread.view(-1, *[1] * (move.dim() - 1)) * moves["none"][name]
        what = f"--mask-on {mask_on}: each row of a unit u of {module.rsplit('.', 1)[1]}.{key}"
        same(move, wanted, f"{what} moves by 1 - I_u of its free step", atol=1e-12)
        if mask_on == "update":
            same(grads["update"][name], grads["none"][name], "--mask-on update leaves the gradient as it is")
        assert moves["none"][name].abs().max() > 0, name


def test_cofitune_tensors_and_load_tensors_keep_the_importance_of_a_continued_run(monkeypatch):
    adapter, scores = prepared(monkeypatch)
    saved = {name: t.clone() for name, t in adapter.tensors().items()}
    assert saved.keys() == adapter.trained.keys() | {f"importance.{name}" for name in scores}, "what is saved"
    for name, score in scores.items():
        same(saved[f"importance.{name}"], score, f"importance.{name} is I, not 1 - I")
    for source in ("importance", "random"):  # the second one has drawn another mask, as a continued run does
        again, _ = prepared(monkeypatch, mask_source=source)
        perturb(again.model)
        again.load_tensors(saved)
        for name, mask in adapter.masks.items():
            same(again.masks.get(name, []), mask, "load_tensors() restores the mask", atol=1e-12)
        assert all(torch.equal(p, saved[name]) for name, p in again.trained.items()), "load_tensors() restores weights"
    again, _ = prepared(monkeypatch, mask_on="none")
    again.load_tensors(saved)
    assert again.masks.keys() == scores.keys(), "a model that is only loaded, and has prepared nothing, has the mask"


def test_cofitune_merge_goes_back_to_the_bases_dtype():
    model = tiny(torch.bfloat16)
    adapter = train.start_adapter(model, cofitune, cofitune_config())
    assert all(p.dtype == torch.float32 for p in adapter.model.parameters() if p.requires_grad)
    adapter.merge()
    found = {p.dtype for p in model.parameters()}
    assert found == {torch.bfloat16}, f"merged, all weights have the base's bfloat16, found {found}"


def test_cofitune_scored_interpolates_from_the_base_and_returns_to_the_end():
    """Wise-FT. A "score" is here the mean of a weight, which a suite takes for all figures."""
    name, calls = "model.layers.1.mlp.up_proj.weight", []
    suite = SimpleNamespace(means=lambda found: (found, -found), errors=lambda found: (abs(found), 0.0))
    for shares, wanted in (("1,0.25", [0.25, 1.0]), ("0.5,0", [0.0, 0.5])):
        model = tiny()
        adapter, base = cofitune.attach(model, cofitune_config(shares=shares)), model.get_parameter(name).clone()
        perturb(model)
        end = model.get_parameter(name).clone()
        score = lambda: calls.append(1) or model.get_parameter(name).mean().item()
        points = adapter.scored(7.0, score, suite)["points"]
        assert [point["share"] for point in points] == wanted, "one point for each of --shares, in order"
        for point in points:
            S = 7.0 if point["share"] == 1 else (base + point["share"] * (end - base)).mean().item()
            found = [point["speciality"], point["versatility"], *point["errors"]]
            same(found, [S, -S, abs(S), 0.0], "S, V and their errors at θ_0 + a (θ - θ_0)", atol=1e-6)
        assert torch.equal(model.get_parameter(name), end), "afterwards the weights are back"
    assert len(calls) == 3, "the scores at a = 1 are given, and not made again"
    assert cofitune.attach(tiny(), cofitune_config()).scored({}, score, suite) == {}, "without --shares no points"


def test_cofitune_report_has_the_mean_mask_over_all_trained_numbers(monkeypatch):
    adapter, scores = prepared(monkeypatch, modules="v_proj,up_proj")
    total = sum((1 - scores[name.rsplit(".", 1)[0]]).mean() * p.numel() for name, p in adapter.trained.items())
    wanted = total / sum(p.numel() for p in adapter.trained.values())
    same(adapter.report()["mean_mask"], wanted, "mean(1 - I), where each number of a unit counts")
    assert prepared(monkeypatch, mask_on="none")[0].report()["mean_mask"] == 1.0


@pytest.mark.parametrize("layers, modules, wanted", [
    ("1", "up_proj, q_proj", r"model\.layers\.1\.(mlp\.up|self_attn\.q)_proj\.(weight|bias)"),
    ("0%-25%", "down_proj", r"model\.layers\.[012]\.mlp\.down_proj\.(weight|bias)"),
    ("1,3", "all", r"model\.layers\.[13]\..*"), ("all", "all", ".*")], ids=["layer 1", "range", "layers", "everything"])
def test_cofitune_choose_and_attach_train_the_chosen_weights_and_biases_alone(layers, modules, wanted):
    """Of 12 layers: layer 1 is not layer 11."""
    model = tiny(num_hidden_layers=12, attention_bias=True, mlp_bias=True)
    adapter = cofitune.attach(model, cofitune_config(layers=layers, modules=modules, mask_on="none"))
    wanted = {name for name, _ in model.named_parameters() if re.fullmatch(wanted, name)}
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == wanted, f"trained with --layers {layers} --modules {modules}, wrong: {sorted(found ^ wanted)}"
    assert adapter.tensors().keys() == adapter.trained.keys() == wanted and adapter.penalty(Context()) == 0


# ---------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", [multilora, csreft, cofitune], ids=lambda method: method.__name__)
def test_the_worked_example_holds(method):
    failed, tried = doctest.testmod(method)
    assert tried >= 4 and not failed, f"the docstring's example fails: python -m doctest {method.__name__}.py shows it"


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_every_method_starts_at_the_base(name):
    """Bit for bit; CS-ReFT too, since W_i = R_i and b_i = 0 make its update exactly zero."""
    model = Llama.from_pretrained(BASE)
    ids = random_ids(model)
    with torch.no_grad():
        before = model(ids)
        method, config = settled(name)
        train.start_adapter(model, method, config)
        assert torch.equal(model(ids), before), "before training the model is the base, bit for bit"
        perturb(model)
        assert not torch.equal(model(ids), before), "what is trained has no part in the model"


@pytest.mark.parametrize("name", sorted(train.find_methods()))
def test_an_adapters_whole_life(tmp_path, name):
    """Attached, trained, frozen weights untouched, saved, reloaded bit for bit, merged where it can be."""
    method, config = settled(name)
    model, adapter = trained_on_builtin(method, config, lr=1e-3)
    base, after, tensors = load_file(BASE / "model.safetensors"), model.state_dict(), adapter.tensors()
    assert any(not torch.equal(t, base[key]) if key in base else True for key, t in tensors.items()), "nothing moved"
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
        assert torch.equal(again(ids), trained), "tensors() and load_tensors() do not restore the whole method"
        if after.keys() != plain:  # the method has tensors that a checkpoint has no place for
            with pytest.raises(UserError, match="merge"):
                model.save_pretrained(tmp_path)
        try:
            adapter.merge()
        except UserError as error:
            assert "cannot be merged" in str(error) and torch.equal(model(ids), trained)
            return
        assert model.state_dict().keys() == plain, "merge() takes the method out of the model, or raises a UserError"
        same(model(ids), trained, "merge() leaves what the model computes as it is", atol=1e-4)
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
    for key, p in model.named_parameters():
        wanted = torch.float32 if p.requires_grad else torch.bfloat16
        assert p.dtype == wanted, f"{key}, trained: {p.requires_grad}, is {wanted}, found {p.dtype}"
    assert all(t.isfinite().all() for t in adapter.tensors().values())
    tokenizer, _ = builtin_examples()
    tests = {"add": data.encode(builtin.generate("add", "test")[:5], tokenizer, ["add"])}
    suite = data.Suite([], [], tests, {"add": "general"}, {"add": "reasoning"}, {"add": data.exact})
    assert 0 <= data.evaluate(model, suite, tokenizer)["add"]["exact match"] <= 100


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
    first, *_, last = json_lines(project / "out" / "gains" / "metrics.jsonl")
    assert last["loss"] < first["loss"]
    said = cli("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gains or test_house", cwd=project).stdout
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10, said


ALONE = """
import importlib
import sys
from types import SimpleNamespace
import torch
from model import Context, Llama, LlamaConfig

SETTINGS = {"multilora": {}, "csreft": {"subspaces": 2, "rank": 3, "sparsity": 0.1}, "cofitune": {"layers": "all"}}
for name, settings in SETTINGS.items():
    method = importlib.import_module(name)
    torch.manual_seed(0)
    model, ids = Llama(LlamaConfig(64, 32, 48, 2, 4)), torch.randint(0, 64, (4, 9))
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1), 0.1)
    batch = SimpleNamespace(ids=ids, labels=ids, ctx=Context(torch.arange(9).expand(4, 9) < 3))
    adapter = method.attach(model, method.Config(**settings))
    adapter.prepare([[batch]])
    optimizer, losses = adapter.optimizer(0.01, 0.0), []
    for _ in range(3):
        loss = adapter.loss(batch) + adapter.penalty(batch.ctx)
        loss.backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    del sys.modules[name]
    print(*sorted(set(sys.modules) & {"data", "train", "engine", "formats", "base", "tests", *SETTINGS}))
"""


def test_a_method_works_in_another_project_with_model_py_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for file in ("model.py", "multilora.py", "csreft.py", "cofitune.py"):
        shutil.copy(HERE / file, tmp_path / file)
    assert cli("-c", ALONE, cwd=tmp_path).stdout == "\n" * 3, "other modules of the project were imported"
