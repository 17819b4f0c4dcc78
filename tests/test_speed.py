"""What is done for speed changes no number: each short cut against the plain way, in float64."""

import os
import shutil
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import model as llama
import train
from engine.compiled import compile_model
from model import Context, UserError, attend
from tests.helpers import QUICK, here, perturb, random_ids, settled, tiny

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("name, checkpointing", [("multilora", True), ("csreft", False), ("cofitune", False)])
def test_compiled_layers_train_as_plain_ones_do(name, checkpointing):
    """Hooks of a method included; groups of other lengths do not compile again; evaluation is left as it is."""
    from torch._dynamo.utils import counters
    losses = []
    for compiled in (False, True):
        model = tiny(num_hidden_layers=4 if name == "cofitune" else 2)
        perturb(model)
        method, config = settled(name)
        torch.manual_seed(0)
        adapter = train.start_adapter(model, method, config)
        model.model.checkpointing = checkpointing
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            compile_model(model)
        model.train()
        optimizer, row = torch.optim.SGD(adapter.param_groups(0.1, 0.0)), []
        for lengths in ((9, 5, 12), (7, 8), (11, 4, 6), (8, 13, 10, 9)):
            batch = batch_of(model, lengths)
            loss = model(batch.ids, batch.labels, batch.ctx)
            loss.backward()
            optimizer.step()
            adapter.after_step() if name == "csreft" else None
            optimizer.zero_grad()
            row.append(loss.item())
        losses.append(row)
    assert len(set(losses[0])) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = counters["stats"]["unique_graphs"]
    assert 1 <= before <= 4 and not counters["graph_break"]
    model.eval()(batch.ids)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["multilora", "csreft"])
def test_compiled_generation_gives_the_same_answers(name):
    """One step of code for batches and prompts of any size, hooks and gates included; short answers do without it."""
    from torch._dynamo.utils import counters
    model = tiny()
    torch.manual_seed(0)
    train.start_adapter(model, *settled(name))
    perturb(model)
    sizes = ((9, 5, 12), (7, 8), (3, 6, 4, 10))
    prompts = [[random_ids(model, 1, n, seed=n)[0].tolist() for n in lengths] for lengths in sizes]
    plain = [model.generate(batch, llama.LONG) for batch in prompts]
    torch._dynamo.reset()
    counters.clear()
    compile_model(model)
    model.generate(prompts[0], llama.LONG - 1)
    assert not counters["stats"]
    assert [model.generate(batch, llama.LONG) for batch in prompts] == plain and len(set(plain[0][0])) > 5
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


@pytest.mark.parametrize("command", [("--method", "sft", *QUICK), ("--eval-only", "--eval-limit", "1")])
def test_the_flag_is_not_ignored_where_nothing_is_trained_either(command, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("engine.compiled.compile_model", seen.append)
    here("train.py", *command, "--compile", "--out", tmp_path / "run")
    assert len(seen) == 1
    here("train.py", *command, "--out", tmp_path / "plain")
    assert len(seen) == 1


def test_without_a_compiler_compile_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not here"):
        compile_model(tiny())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_written_out_equals_the_fused_kernel_and_a_loop(kv_heads):
    B, T, hd = 3, 7, 6
    q, k, v = (torch.randn(B, heads, T, hd, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    written, fused, loop = attend(q, k, v, mask), attend(q, k, v), torch.zeros_like(q)
    for b in range(B):
        for h in range(4):
            for t in range(T):
                g = h // (4 // kv_heads)
                scores = torch.stack([q[b, h, t] @ k[b, g, s] / hd**0.5 for s in range(t + 1)])
                loop[b, h, t] = scores.softmax(0) @ v[b, g, : t + 1]
    torch.testing.assert_close(written, loop)
    torch.testing.assert_close(fused, loop)


def loss_and_gradients(model, batch, ctx):
    model.zero_grad()
    loss = model(batch.ids, batch.labels, ctx)
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


def batch_of(model, lengths):
    """A Batch whose examples have labels on their last third."""
    ids = [random_ids(model, 1, n)[0].tolist() for n in lengths]
    cut = [2 * n // 3 for n in lengths]
    return data.collate([data.Encoded(i, [-100] * c + i[c:], c, 0) for i, c in zip(ids, cut)], 0)


def test_the_last_layer_at_labelled_positions_alone_gives_the_same_gradients():
    model = tiny().double()
    batch = batch_of(model, (9, 5, 12))
    quick = loss_and_gradients(model, batch, batch.ctx)
    logits = model(batch.ids, ctx=Context(batch.ctx.prompt_mask, batch.ctx.tasks))  # every layer at every position
    model.zero_grad()
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    plain.backward()
    torch.testing.assert_close(quick, (plain, [p.grad for p in model.parameters()]))


def test_a_loss_in_pieces_is_the_loss(monkeypatch):
    model = tiny().double()
    batch = batch_of(model, (9, 5, 12))
    whole = loss_and_gradients(model, batch, batch.ctx)
    widest, head = [], model.lm_head.register_forward_hook(lambda m, args, logits: widest.append(len(logits)))
    monkeypatch.setattr(llama, "LOGITS", 4 * model.config.vocab_size)
    parts = loss_and_gradients(model, batch, Context(batch.ctx.prompt_mask, batch.ctx.tasks))
    head.remove()
    torch.testing.assert_close(parts, whole)
    assert max(widest) == 4 and sum(widest) == 2 * len(batch.ctx.labelled)  # each piece is made again for its gradient


def test_a_group_is_cut_into_micro_batches_with_little_padding(suite):
    examples, tokenizer = suite
    real = computed = 0
    for group in islice(data.draw(examples, 48, seed=0), 40):
        parts = data.micro_batches(group, 24, CPU)
        assert sorted(map(id, sum(parts, []))) == sorted(map(id, group))
        assert max(map(len, parts)) <= 24
        whole = data.micro_batches(group, 48, CPU)
        real += sum(len(e.ids) for e in group)
        computed += sum(len(part) * max(len(e.ids) for e in part) for part in whole)
    assert 1 - real / computed < 0.08  # 0.16 in one piece
    alike = [SimpleNamespace(ids=[0] * 10)] * 48
    assert data.micro_batches(alike, 48, CPU) == [alike]


@pytest.fixture(scope="module")
def suite():
    loaded, tokenizer = train.load_data(train.Config(method="lora", eval_limit=1))
    return loaded.train, tokenizer
