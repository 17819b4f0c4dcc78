"""What is done for speed changes no number; and the benchmark runs."""

import os
import re
import shutil
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import data
import model as llama
import train
from tests.helpers import QUICK, cli, one_line_error, perturb, random_ids, settled, tiny

CPU = torch.device("cpu")


def batch_of(model, lengths):
    """A Batch whose examples have labels on their last third."""
    ids = [random_ids(model, 1, n)[0].tolist() for n in lengths]
    cut = [2 * n // 3 for n in lengths]
    return data.collate([data.Encoded(i, [-100] * c + i[c:], c, 0) for i, c in zip(ids, cut)], 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("name, layers, checkpointing", [
    ("multilora", None, True), ("csreft", "all", False), ("csreft", "1,3", False), ("cofitune", "25%-50%", False)])
def test_compiled_layers_train_as_plain_ones_do(name, layers, checkpointing):
    """Hooks of a method included; groups of other lengths do not compile again; evaluation is left as it is."""
    from torch._dynamo.utils import counters
    losses = []
    for compiled in (False, True):
        model = tiny(num_hidden_layers=2 if layers in (None, "all") else 4)
        perturb(model)
        torch.manual_seed(0)
        method, config = settled(name)
        adapter = train.start_adapter(model, method, replace(config, layers=layers) if layers else config)
        model.model.checkpointing = checkpointing
        if compiled:
            counters.clear()
            train.compile_layers(model.model)
        model.train()
        optimizer, row = torch.optim.SGD(adapter.param_groups(0.1, 0.0)), []
        for lengths in ((9, 5, 12), (7, 8), (11, 4, 6), (8, 13, 10, 9)):
            batch = batch_of(model, lengths)
            loss = model(batch.ids, batch.labels, batch.ctx)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            row.append(loss.item())
        losses.append(row)
    assert len(set(losses[0])) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = counters["stats"]["unique_graphs"]
    assert 1 <= before <= 4 and not counters["graph_break"]
    model.eval()(batch.ids)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_without_a_compiler_compile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nor what an earlier run has compiled
    command = ("train.py", "--method", "lora", *QUICK, "--compile", "--out", tmp_path / "run")
    assert "--compile failed, leave it out" in one_line_error(*command, run=cli)


def test_the_loss_is_the_mean_over_labelled_tokens_in_pieces_too(monkeypatch):
    model = tiny(torch.float64)
    batch = batch_of(model, (9, 5, 12))
    ids, ctx = batch.ids, batch.ctx
    labels = torch.where(batch.labels == -100, -100, random_ids(model, 3, 12, seed=3))  # not the tokens themselves
    labels[1, 0] = 7  # nothing predicts the very first token
    chances = model(ids).log_softmax(-1)
    terms = [-chances[b, t - 1, labels[b, t]] for b in range(3) for t in range(1, 12) if labels[b, t] != -100]
    sum(terms).backward()
    wanted, rows = [p.grad for p in model.parameters()], []
    model.lm_head.register_forward_hook(lambda head, args, logits: rows.append(len(logits)))
    for widest in (len(terms), 4):
        monkeypatch.setattr(llama, "LOGITS", widest * model.config.vocab_size)
        model.zero_grad()
        rows.clear()
        loss = model(ids, labels, ctx, reduction="sum")
        loss.backward()
        torch.testing.assert_close((loss, [p.grad for p in model.parameters()]), (sum(terms), wanted))
        assert max(rows) == widest and sum(rows) == len(terms)  # none are made twice
        for given in (ctx, None):
            assert model(ids, labels, given).item() == pytest.approx(sum(terms).item() / len(terms), abs=1e-12)


def test_a_group_is_cut_into_micro_batches_with_little_padding():
    examples = train.load_data(train.Config(method="lora", eval_limit=1))[0].train
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


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_method_and_for_generation():
    said = cli("-m", "bench.speed", "--rounds", "1", "--rows", "csreft", "generate").stdout
    assert re.search(r"^base, csreft .* ms .* GiB", said, re.M) and re.search(r"^base, generate .* ms", said, re.M)
