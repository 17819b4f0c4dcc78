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
from model import Context
from tests.helpers import perturb, random_ids, settled, tiny

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
            train.compile_layers(model.model)
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


def test_the_loss_at_labelled_positions_has_the_gradients_of_all_logits():
    model = tiny().double()
    batch = batch_of(model, (9, 5, 12))
    quick = loss_and_gradients(model, batch, batch.ctx)
    logits = model(batch.ids, ctx=Context(batch.ctx.prompt_mask, batch.ctx.tasks))
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
    same = [SimpleNamespace(ids=[0] * 10)] * 48
    assert data.micro_batches(same, 48, CPU) == [same]


@pytest.fixture(scope="module")
def suite():
    loaded, tokenizer, _ = train.load_data(train.Config(method="lora", eval_limit=1))
    return loaded.train, tokenizer
