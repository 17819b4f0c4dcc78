"""The programs for the papers: runs over seeds and their verdicts, spectra, gates, counts, committed figures, README's
tables and pictures."""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file

import train
from base import suite as builtin
from model import LINEARS, UserError
from reproduce import compare, real, runner, spectra
from reproduce.claims import cofitune, csreft, multilora
from tests.helpers import BASE, HERE, QUICK, cli, here, one_line_error, start

CLAIMS = {"multilora": multilora, "csreft": csreft, "cofitune": cofitune}
STORED = json.loads(runner.STORED.read_text(encoding="utf-8"))
README = (HERE / "reproduce" / "README.md").read_text(encoding="utf-8")

# ---------------------------------------------------------------------------------------------- statistics and figures


def test_the_sign_test_equals_counting_all_outcomes():
    """Oracle: of all patterns of wins and losses, the share with at least as many wins. Ties are left out."""
    for differences in ([1.0] * 5, [1, -2, 3, 4, 5], [0.0, 1, -1, 2], [-1.0, -2, -3, -4, -5, -6], [0.0, 0.0]):
        kept = [d for d in differences if d]
        patterns = list(itertools.product((1, -1), repeat=len(kept)))
        share = lambda sign: sum(p.count(sign) >= sum(d * sign > 0 for d in kept) for p in patterns) / len(patterns)
        assert runner.sign_test(differences) == (share(1), share(-1))
    for ours, p, verdict in (([2] * 5, 1 / 32, "holds"), ([0] * 5, 1, "does not hold"), ([2] * 4, 1 / 16, "undecided"),
                             ([2, 2, 2, 2, 0], 6 / 32, "undecided"), ([1] * 5, 1, "undecided")):
        claim = runner.judge("", range(len(ours)), ours, [1] * len(ours))
        assert (claim["p"], claim["verdict"]) == (p, verdict)
    points = [{"speciality": s, "versatility": v} for s, v in ((90.0, 9.0), (97.0, 8.0), (98.0, 7.0), (99.0, 1.0))]
    assert [runner.best_rate(points, within)["versatility"] for within in (0, 1, 2, 9)] == [1, 7, 8, 9]
    assert runner.best_rate(points, 0, 98.0)["versatility"] == 7


def test_committed_verdicts_follow_from_the_committed_figures():
    assert {"tune", "compare", "real", "real_alone", "rates", *CLAIMS} == STORED.keys()
    assert sum(len(STORED[name]["claims"]) for name in CLAIMS) <= 12
    for name, program in {**CLAIMS, "real": real}.items():
        claims, seeds = STORED[name]["claims"], STORED[name]["claims"][0]["seeds"]
        assert program.judged(STORED[name], seeds) == claims
        assert len(seeds) >= 5 and set(seeds) <= set(runner.SEEDS) - {runner.CHOSEN_WITH}
    alone = STORED["real_alone"]
    assert csreft.interfering(alone["interference"], seeds) == alone["claims"]


def test_committed_figures_agree_with_each_other():
    seeds = {name: list(row["seeds"].values()) for name, row in STORED["compare"].items()}
    for name, accuracy in (STORED["multilora"]["accuracy"] | STORED["csreft"]["accuracy"]).items():
        assert name not in seeds or accuracy == runner.column(seeds[name], "speciality")
    assert multilora.untrained(11) == pytest.approx(STORED["multilora"]["spectra"]["untrained"][0], rel=1e-5)
    real_accuracy = {name: runner.column(STORED["real"][name], "speciality") for name in csreft.RUNS}
    for section, accuracy in (("csreft", STORED["csreft"]["accuracy"]), ("real_alone", real_accuracy)):
        for name, row in STORED[section]["interference"].items():
            together = [[pair[1] for pair in tasks.values()] for tasks in row]
            assert accuracy[name] == pytest.approx(list(map(statistics.mean, together)))
    for row in itertools.chain(*STORED["csreft"]["gates"].values(), STORED["real"]["gates"]):
        assert row["spread"] == max(max(gate) - min(gate) for gate in zip(*row["gates"].values()))


def test_commands_have_the_rates_that_were_chosen():
    """And programs that call a run by the same name have the same command for it, so they share it."""
    for name, (_, rate, rates) in compare.GRID.items():
        assert runner.column(STORED["tune"][name], "lr") == list(map(float, rates))
        assert runner.best_rate(STORED["tune"][name], compare.TIE)["lr"] == float(rate)
    commands = {name: "{} --lr {}".format(*row) for name, row in compare.GRID.items()}
    assert all(row["flags"] == commands[name] for name, row in STORED["compare"].items())
    assert all(flags == f"{commands[name]} {runner.ALL}" for name, flags in multilora.RUNS.items())
    assert all(flags == commands[name] for name, flags in {**csreft.RUNS, **csreft.FIRST_TOKEN}.items())
    best, runs = cofitune.best(STORED["cofitune"]), cofitune.RUNS
    for flags, row in ((runs["all"]["sft"], "SFT, all tasks"), (runs["facts"]["random-mask"], "cofitune"),
                       *((runs["facts"][name], name) for name in ("sft", "coarse", "cofitune"))):
        assert float(re.search(r"--lr (\S+)", flags)[1]) == best[row]["lr"]


def test_readmes_tables_are_what_the_programs_make():
    made = [compare.compared(STORED["compare"]), compare.tuned(STORED["tune"]),
            *(program.tables(STORED[name]) for name, program in CLAIMS.items())]
    real_md = (HERE / "reproduce" / "real.md").read_text(encoding="utf-8")
    real_made = [*real.compared(STORED["real"]).split("\n\n"), real.tuned(STORED["rates"]),
                 *csreft.tables(STORED["real_alone"]).split("\n\n")]
    assert len(real_made) == 5 and all(f"\n{table}\n" in real_md for table in real_made)
    tables = [table for text in made for table in text.split("\n\n")]
    assert len(tables) == 10 and [table for table in tables if f"\n{table}\n" not in README] == []
    assert README.count("| claim | verdict |") == len(CLAIMS)


def test_the_pictures_are_drawn_from_the_committed_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "STORED", tmp_path / "compare.json")
    here("-m", "reproduce.figures", HERE / "reproduce/results/compare.json")
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == {picture.name for picture in (HERE / "reproduce" / "results").glob("*.png")}
    texts = README + (HERE / "reproduce" / "real.md").read_text(encoding="utf-8")
    assert drawn == set(re.findall(r"\]\(results/(\w+\.png)\)", texts))


def test_pictures_for_a_lecture_have_the_shapes_of_the_defaults(tmp_path):
    pytest.importorskip("matplotlib")
    names = here("-m", "reproduce.lecture", "--out", tmp_path).stdout.split(": ")[1].split(", as")[0].split(", ")
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    text = {name: (tmp_path / f"{name}.svg").read_text(encoding="utf-8") for name in names}
    assert "A3  (4, 128)" in text["multilora_layer"] and "B3  (352, 4)" in text["multilora_layer"]
    assert "A4" not in text["multilora_layer"] and "α (4,)" in text["csreft_layer"]
    assert text["cofitune_layers"].count(": attention") == 8 and len(names) == 6


# ---------------------------------------------------------------------------------------------- the runner


def test_runs_are_made_once_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """In the place of train.py: a run leaves its seed as its score, and seed 12 fails. At most two at a time."""
    script = ("import json, pathlib, sys; folder = pathlib.Path(sys.argv[2]); folder.mkdir(); seed = int(sys.argv[1]);"
              "(folder / 'config.json').write_text(json.dumps({'command': sys.argv[3]}));"
              "sys.exit(3) if seed == 12 else (folder / 'results.json').write_text(json.dumps("
              "{'speciality': seed, 'versatility': 1, 'seconds': 1}))")
    made, most = [], []

    def fake(flags, folder, args):
        command = f"python train.py {flags} {args.train_flags} --out x"
        made.append(subprocess.Popen([sys.executable, "-E", "-c", script, flags.split()[-1], str(folder), command]))
        most.append(sum(process.poll() is None for process in made))
        return made[-1]

    monkeypatch.setattr(runner, "start", fake)
    rows, args = {"a": "--method sft", "b": "--method lora --layers 50%-100%"}, SimpleNamespace(
        out=tmp_path / "out", jobs=2, threads=1, seeds=[11, 12, 13], train_flags="--eval-limit 1")
    with pytest.raises(UserError, match="failed: 2; .*seed-12.log says why"):
        runner.over_seeds(rows, args)
    printed = capsys.readouterr().out
    assert "6 of 6 runs to make" in printed and printed.count("failed, and") == 2 and printed.count("ETA") == 4
    args.seeds = [13, 11]
    results = runner.over_seeds(rows, args)
    assert len(made) == 6 and max(most) == 2 and capsys.readouterr().out == ""
    assert [run["speciality"] for run in results["b"]] == [13, 11]
    assert results["b"][0]["folder"] == tmp_path / "out" / "method-lora_layers-50%-100%_seed-13"
    args.train_flags = ""
    with pytest.raises(UserError, match="sft_seed-13 holds a run with other --train-flags"):
        runner.over_seeds(rows, args)


@pytest.mark.slow
def test_an_interrupted_comparison_ends_its_runs_and_continues_them(tmp_path):
    flags = "--method lora --tasks tool --steps 100 --batch-size 8 --eval-limit 2 --samples 0"
    code = f"""if True:
        from argparse import Namespace
        from pathlib import Path
        from engine.flags import command_line
        from reproduce.runner import finish
        command_line(lambda: finish([{flags!r}], Namespace(
            out=Path({str(tmp_path)!r}), jobs=1, threads=1, train_flags="")))"""
    process = start("-c", code, start_new_session=True)
    while not any(file.stat().st_size for file in tmp_path.glob("*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal does
    assert process.wait() == 130
    [log] = tmp_path.glob("*.log")
    assert "stopped after step" in log.read_text() and log.with_suffix("").joinpath("checkpoint.safetensors").exists()
    assert "1 of 1 runs to make" in cli("-c", code).stdout and "going on from step" in log.read_text()


def shape(value):
    """What a section holds: of lists the first entry, of tasks and seeds those of the test below."""
    if isinstance(value, dict):
        other = {"cipher", "descending", "largest", "story", "12", "13", "14", "15"}
        return {key: shape(part) for key, part in value.items() if key not in other}
    return [shape(value[0])] if isinstance(value, list) else "text" if isinstance(value, str) else "number"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLAIMS, "compare", "tune", "real", "real_alone"])
def test_every_comparison_measures_what_the_committed_figures_hold(tmp_path, monkeypatch, name):
    """From very short runs in this process, at one seed and one rate, of two tasks."""
    def tiny(flags, folder, threads):
        assert ("--seed 0" in flags) == ("--eval-split" in flags), "rates are chosen with seed 0, and nothing else is"
        flags = re.sub(r"--steps \d+ --batch-size \d+", "--steps 2 --batch-size 4 --eval-limit 2 --samples 0", flags)
        here("train.py", *flags.split(), "--out", folder)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(runner, "start", tiny)
    monkeypatch.setattr(builtin, "NEW", {task: builtin.NEW[task] for task in ("currency", "tool")})
    monkeypatch.setattr(cofitune, "SFT_RATES", ("1e-4",))
    for program, grid in ((cofitune, "FRONT"), (compare, "GRID")):
        rows = {row: (*rest, rates[:1]) for row, (*rest, rates) in getattr(program, grid).items()}
        monkeypatch.setattr(program, grid, rows)
    switch = {"tune": ["--tune"], "real_alone": ["--alone"]}.get(name, [])
    monkeypatch.setattr(sys, "argv", ["", *switch, "--seeds", "1", "--out", str(tmp_path)])
    if name in CLAIMS:
        runner.claim("", name, CLAIMS[name].measure, CLAIMS[name].judged, CLAIMS[name].tables)
    else:
        (real if name.startswith("real") else compare).main()
    stored = json.loads(runner.STORED.read_text(encoding="utf-8"))
    found, stored = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))[name], stored[name]
    if name == "real":
        assert found["claims"] == []
        found["claims"] = real.judged(found, [11])
        for run in (run for section in (found, stored) for row in real.RUNS for run in section[row]):
            del run["tasks"], run["loss"]  # another base has other general tasks
    assert shape(found) == shape(stored)


# ---------------------------------------------------------------------------------------------- what runs learned


def test_spectrum_of_a_known_matrix():
    u, _ = torch.linalg.qr(torch.randn(20, 20))
    v, _ = torch.linalg.qr(torch.randn(16, 16))
    delta = u[:, :4] @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])) @ v[:4]
    found = spectra.figures({"a": delta, "b": 3 * delta}, 4, {"b": delta})
    assert found["values"] == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=1e-6)
    assert found["effective_rank"] == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 3), abs=1e-4)  # entropy in bits
    assert (found["first_value_share"], found["similarity_to_sft"]) == pytest.approx((0.5, 1), abs=1e-5)
    assert spectra.similarity(delta, u[:, 4:8] @ v[:4], 4) == pytest.approx(0, abs=1e-5)
    assert spectra.similarity(delta, torch.cat((u[:, :1], u[:, 4:7]), 1) @ v[:4], 4) == pytest.approx(1 / 4, abs=1e-5)


def test_spectra_of_a_run(runs):
    """Any method that changes weights: SFT's update is the saved weight minus the base's. CS-ReFT has none."""
    sft = runs("--method", "sft", *QUICK)
    lines = here("-m", "reproduce.spectra", sft, "--against", sft).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:10]] == [*LINEARS, "mean"]
    for _, share, rank, other_share, other_rank, shared in map(str.split, lines[2:10]):
        assert (share, rank, shared) == (other_share, other_rank, "1.000")
    before, after = load_file(BASE / "model.safetensors"), load_file(sft / "adapter.safetensors")
    values = [numpy.linalg.svd((after[name] - before[name]).numpy(), compute_uv=False)[:12] for name in after
              if name.endswith("v_proj.weight")]
    assert len(values) == 8
    assert float(lines[4].split()[1]) == pytest.approx(statistics.mean(v[0] / v.sum() for v in values), abs=6e-4)
    assert "changes no weight matrix" in one_line_error("-m", "reproduce.spectra", runs("--method", "csreft", *QUICK))


def test_gates_of_a_run(runs):
    """Oracle: the router's equation on one prompt after the other."""
    out = runs("--method", "csreft", *QUICK)
    found = csreft.gates({"folder": out})
    model, adapter, saved = train.load_run(out)
    suite, _, _ = train.load_data(train.Config(**saved["asked"]["settings"]), train=False)
    first, _, second = adapter.edits.router
    for task in ("currency", "cipher"):
        means = []
        for example in suite.tests[task]:
            prompt = [token for token, label in zip(example.ids, example.labels) if label == -100]
            x = model.model.embed_tokens(torch.tensor(prompt)).mean(0)
            x = x / x.square().mean().sqrt()
            means.append(1 / (1 + (-(second.weight @ (first.weight @ x + first.bias).relu() + second.bias)).exp()))
        assert found["gates"][task] == pytest.approx(torch.stack(means).mean(0).tolist(), abs=1e-4)
    apart = max(abs(a - b) for a, b in zip(*found["gates"].values()))
    assert found["spread"] == pytest.approx(apart) != found["untrained_spread"]
    text = here("-m", "reproduce.gates", out, "--eval-limit", "2").stdout
    tables = [[row.split() for row in table.splitlines()[2:]] for table in text.strip("\n").split("\n\n")]
    assert [row[0] for row in tables[0]] == [*json.loads((out / "results.json").read_text())["tasks"]]
    assert [len(row) for table in tables[1:3] for row in table] == [6, 6, 4, 4]
    assert "expected csreft or loreft" in one_line_error("-m", "reproduce.gates", runs("--method", "multilora", *QUICK))


# ---------------------------------------------------------------------------------------------- counts and programs


@pytest.mark.parametrize("args, numbers", [
    ("csreft llama-2-7b", ["6,738,415,616", "8,398,852", "0.1246 %", "524,352", "0.0078 %"]),
    ("loreft llama-2-7b", ["262,176", "0.0039 %"]), ("cofitune llama-33b", ["3,578,265,600", "11.0003 %"]),
    ("lora llama-2-7b --rank 64", ["159,907,840", "2.3731 %", "weights 13.5", "moments 2.6"]),
    ("multilora llama-2-7b --modules 2", ["162,627,584", "2.4134 %"]),
    ("sft llama-2-70b --devices 64", ["68,976,648,192", "weights 0.0", "moments 17.2"])])
def test_counts_at_published_sizes(args, numbers):
    """At total rank 64: 32 layers x (4 x 8,192 + 3 x 15,104) x 64 = 159,907,840, and MultiLoRA's 2,719,744 scales.
    Memory is 2 bytes for a frozen number, 4 + 4 + 8 for a trained one."""
    text = here("-m", "reproduce.count", *args.split()).stdout
    assert all(number in text for number in numbers), text


@pytest.mark.parametrize("program, args, text", [
    ("compare", "--jobs 0", "--jobs and --threads at least 1"), ("claims.multilora", "--seeds 21", "from 1 to 20"),
    ("count", "multilora llama-2-9b", "llama-2-9b"), ("count", "multilora llama-2-7b --rank 0", "--rank is 0"),
    ("count", "csreft llama-2-7b --layers 40", "layers '40'"), ("spectra", ".", "no adapter.safetensors"),
    ("gates", ".", "no adapter.safetensors")])
def test_a_mistake_is_one_clear_line(tmp_path, program, args, text):
    assert text in one_line_error("-m", f"reproduce.{program}", *args.split(), cwd=tmp_path)
    assert not [*tmp_path.iterdir()], "a refused command must leave nothing behind"
