"""The programs for the papers: spectra, gates, the tree, counts, Wise-FT, the comparison and its statistics, tables and
pictures; and those of bench/."""

import csv
import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import cofitune
import data
import multilora
import train
from base import suite as builtin
from model import LINEARS, LlamaConfig
from reproduce import compare, importance, table
from reproduce.count import SHAPES
from reproduce.spectra import similarity
from tests.helpers import BASE, HERE, QUICK, SEARCH, cli, here, one_line_error, start

STORED = json.loads(compare.STORED.read_text())

# ---------------------------------------------------------------------------------------------- what runs learned


def test_spectrum_of_a_known_matrix():
    u, _ = torch.linalg.qr(torch.randn(20, 20))
    v, _ = torch.linalg.qr(torch.randn(16, 16))
    delta = u[:, :4] @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])) @ v[:4]
    values = multilora.singular_values(delta, 4)
    torch.testing.assert_close(values, torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), atol=1e-6, rtol=0)
    share, rank = multilora.spread(values)
    assert share == pytest.approx(0.5, abs=1e-6)
    assert rank == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 3), abs=1e-4)  # the entropy in bits, by hand
    assert multilora.spread(torch.full((5,), 0.2))[1] == pytest.approx(5, abs=1e-6)
    assert similarity(delta, 3 * delta, 4) == pytest.approx(1, abs=1e-5)
    assert similarity(delta, u[:, 4:8] @ v[:4], 4) == pytest.approx(0, abs=1e-5)


def test_spectra_of_a_run(runs):
    out = runs("--method", "multilora", *QUICK)
    text = here("-m", "reproduce.spectra", out).stdout
    for kind in LINEARS:
        assert re.search(rf"^{kind} +0\.\d+ +\d+\.\d+", text, re.M), text
    assert "first share" in text and "eff. rank" in text and "similarity" not in text
    results = json.loads((out / "results.json").read_text())["report"]
    assert float(text.splitlines()[9].split()[1]) == pytest.approx(results["first_value_share"], abs=6e-4)


@pytest.mark.slow
def test_spectra_of_a_run_beside_another(runs):
    """Any method that changes weights: SFT's update is the saved weight minus the base's. CS-ReFT has none."""
    sft = runs("--method", "sft", *WISE)
    text, own = here("-m", "reproduce.spectra", sft, "--against", sft, "--rank", "3").stdout.split("\n\nvalues\n")
    lines = text.splitlines()
    assert [row.split()[0] for row in own.splitlines()] == [*LINEARS] and len(own.splitlines()[0].split()) == 4
    assert "similarity" in lines[1] and [row.split()[0] for row in lines[2:]] == [*LINEARS, "mean"]
    for row in lines[2:]:
        _, share, rank, other_share, other_rank, alike, *_ = row.split()
        assert (share, rank, alike) == (other_share, other_rank, "1.000"), row
    before, after = load_file(BASE / "model.safetensors"), load_file(sft / "adapter.safetensors")
    names = [name for name in after if name.endswith("v_proj.weight")]
    values = [torch.linalg.svdvals(after[name] - before[name]) for name in names]
    wanted = statistics.mean((v[0] / v[:3].sum()).item() for v in values)
    assert len(names) == 8 and float(lines[4].split()[1]) == pytest.approx(wanted, abs=6e-4)
    assert "changes no weight matrix" in one_line_error("-m", "reproduce.spectra", runs("--method", "csreft", *QUICK))


def test_gates_of_a_run(runs, monkeypatch):
    """`test_methods.py` looks at the gates themselves."""
    out, scored, real = runs("--method", "csreft", *QUICK), [], data.evaluate
    monkeypatch.setattr(data, "evaluate", lambda model, *args: scored.append(
        (model.csreft.off, model.csreft.config.gate)) or real(model, *args))
    text = here("-m", "reproduce.gates", out, "--eval-limit", "3").stdout
    gates, switched, hard = re.split(r"\n\n", text.strip())[:3]
    assert [row.split()[0] for row in gates.splitlines()[2:]] == [
        *json.loads((out / "results.json").read_text())["tasks"]]
    assert scored == [(off, "soft") for off in (None, 0, 1, 2, 3)] + [(None, "hard")]
    for part, columns in ((switched, 5), (hard, 3)):
        rows = [row.split() for row in part.splitlines()[2:4]]
        assert [row[0] for row in rows] == ["currency", "cipher"] and {len(row) for row in rows} == {columns + 1}
    assert re.search(r"router +8,516 parameters", text) and re.search(r"edits +41,120 parameters", text)
    assert "expected csreft or loreft" in one_line_error("-m", "reproduce.gates", runs("--method", "multilora", *QUICK))


def drawn(text):
    return text[text.index("tree search, validation data"):]


def test_the_tree_of_a_finished_search_is_drawn_again(runs, tmp_path, capsys):
    """A search whose trials are made up, and left as a run leaves them."""
    config, rng = cofitune.Config(search_steps=3), random.Random(0)

    def trial(name, config, shares, **settings):
        points = [{"share": a, "speciality": rng.uniform(0, 50), "versatility": rng.uniform(50, 99), "errors": [1, 2]}
                  for a in shares]
        (tmp_path / "search" / name).mkdir(parents=True)
        (tmp_path / "search" / name / "results.json").write_text(json.dumps({"points": points, "seconds": 1.0}))
        return {"points": points, "seconds": 1.0}

    settled = cofitune.plan(config, LlamaConfig.from_pretrained(BASE), trial)
    printed = capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({
        "method": "cofitune", "settled": asdict(settled),
        "asked": {"settings": {"base": "base"}, "method_settings": asdict(config)}}))
    tree = drawn(here("-m", "reproduce.tree", tmp_path).stdout)
    assert tree == drawn(printed) and tree.count("─ ") >= 12 and " *" in tree
    assert f"chosen: --layers {settled.layers} --modules {settled.modules}" in tree
    assert "holds no finished search" in one_line_error("-m", "reproduce.tree", runs("--method", "multilora", *QUICK))


WISE = ("--tasks", "tool", "--steps", "30", "--batch-size", "8", "--eval-limit", "20")


@pytest.mark.slow
def test_wise_ft_runs_from_the_base_to_sft(runs, tmp_path):
    """Weight 0 scores as the base does and weight 1 as the run does."""
    source, out = runs("--method", "sft", *WISE), tmp_path / "sft"
    shutil.copytree(source, out)
    here("-m", "reproduce.wise", out, "--weights", "0", "0.5", "1")
    points = json.loads((out / "wise.json").read_text())["points"]
    assert [p["weight"] for p in points] == [0, 0.5, 1]
    results = json.loads((source / "results.json").read_text())
    before = [s["before"] for s in results["tasks"].values() if s["group"] == "general"]
    assert points[0]["versatility"] == pytest.approx(statistics.mean(before))
    assert points[2]["versatility"] == pytest.approx(results["versatility"])
    assert results["versatility"] < points[1]["versatility"] <= points[0]["versatility"]
    assert "expected sft or cofitune" in one_line_error("-m", "reproduce.wise", runs("--method", "multilora", *QUICK))


@pytest.mark.slow
def test_every_program_runs_in_a_process_of_its_own(runs, tmp_path):
    multilora, csreft, search = (runs(*args) for args in (
        ("--method", "multilora", *QUICK), ("--method", "csreft", *QUICK), SEARCH))
    shutil.copytree(runs("--method", "sft", *WISE), tmp_path / "sft")
    for args, text in ((("spectra", multilora), "eff. rank"), (("gates", csreft, "--eval-limit", "1"), "mean gate"),
                       (("tree", search), "chosen: --layers"), (("count", "lora", "llama-2-7b"), "6,738,415,616"),
                       (("wise", tmp_path / "sft", "--weights", "0.5"), "weight 0.5: speciality")):
        assert text in cli("-m", f"reproduce.{args[0]}", *args[1:]).stdout, args
    printed = (search.parent / "printed.txt").read_text()
    assert drawn(printed).startswith(drawn(here("-m", "reproduce.tree", search).stdout))
    for program in ("spectra", "gates", "tree", "wise"):
        assert "base" in one_line_error("-m", f"reproduce.{program}", "base", run=cli)


# ---------------------------------------------------------------------------------------------- counts


def test_parameters_at_published_sizes():
    text = here("-m", "reproduce.count", "csreft", "llama-2-7b").stdout
    assert "6,738,415,616" in text and "8,398,852" in text and "0.1246 %" in text and "0.0098 %" in text
    text = here("-m", "reproduce.count", "loreft", "llama-2-7b").stdout
    assert "262,176" in text and "0.0039 %" in text
    text = here("-m", "reproduce.count", "multilora", "llama-2-7b", "--modules", "2").stdout
    numbers, shares = zip(*re.findall(r"^ +[AB] +([\d,]+) +([\d.]+) %", text, re.M))
    assert sum(int(number.replace(",", "")) for number in numbers) == 159_907_840  # 32 (4 x 8,192 + 3 x 15,104) n r
    assert sum(map(float, shares)) == pytest.approx(2.37, abs=0.005)
    assert f"{159_907_840 + 2 * 1_359_872:,}" in text and "2.4134 %" in text
    assert "llama-2-7b" in one_line_error("-m", "reproduce.count", "multilora", "llama")


def test_counts_at_published_sizes():
    for name, billions in (("llama-2-7b", 0.72), ("llama-2-13b", 1.42), ("llama-33b", 3.58)):
        text = here("-m", "reproduce.count", "cofitune", name).stdout
        number = int(re.search(r"together +([\d,]+)", text).group(1).replace(",", ""))
        assert number / 1e9 == pytest.approx(billions, abs=0.005), text


@pytest.mark.slow
def test_memory_and_traffic_of_devices():
    """Copies: 13.5 GB of bfloat16 weights, and a ring that sends 2 (N - 1) / N of 4 bytes for each trained number.
    Split: an eighth of the weights, all of which come twice from the 7 others."""
    gigabytes = lambda text, what: float(re.search(rf"^  {what} +([\d.]+)$", text, re.M)[1])
    text = here("-m", "reproduce.count", "multilora", "llama-2-7b", "--devices", "8").stdout
    assert gigabytes(text, "frozen weights") == 13.5 and gigabytes(text, "optimiser, two moments") == 2.0
    assert gigabytes(text, "sent in a step") == round(2 * 7 / 8 * 4 * 0.243941376, 1)
    text = here("-m", "reproduce.count", "multilora", "llama-2-7b", "--devices", "8", "--shard").stdout
    assert gigabytes(text, "frozen weights") == round(13.4768 / 8, 1) and gigabytes(text, "trained tensors") == 1.0
    assert gigabytes(text, "sent in a step") == round(2 * 7 / 8 * (13.4768 + 4 * 0.243941376), 1)
    assert gigabytes(text, "with --grad-checkpointing") < gigabytes(text, "kept for the backward pass") / 4


# ---------------------------------------------------------------------------------------------- the comparison


def test_the_sign_test_equals_counting_all_outcomes():
    """Oracle: of all patterns of wins and losses, the share with at least as many wins. Ties are left out."""
    for differences in ([1.0] * 5, [1, -2, 3, 4, 5], [0.0, 1, -1, 2], [-1.0, -2, -3, -4, -5, -6], [0.0, 0.0]):
        kept = [d for d in differences if d]
        patterns = list(itertools.product((1, -1), repeat=len(kept)))
        share = lambda sign: sum(p.count(sign) >= sum(d * sign > 0 for d in kept) for p in patterns) / len(patterns)
        assert compare.sign_test(differences) == (share(1), share(-1))
    assert compare.sign_test([1.0] * 5)[0] == 1 / 32
    for ours, verdict in (([2] * 5, "holds"), ([0] * 5, "does not hold"), ([2, 2, 2, 2, 0], "undecided")):
        assert compare.judge("", range(5), ours, [1] * 5)["verdict"] == verdict
    for lower, verdict in ((98.0, "holds"), (97.9, "undecided")):  # more than two points below is not about equal
        claim = compare.judge("", range(5), [2] * 5, [1] * 5, "points", [[lower] * 5, [100.0] * 5])
        assert claim["verdict"] == verdict
        claim = compare.judge("", range(5), [1] * 5, [2] * 5, "points", [[100.0] * 5, [lower] * 5])
        assert claim["verdict"] == verdict.replace("holds", "does not hold")
    assert compare.band([1.0, 2.0, 3.0]) == [0.0, 4.0] and compare.band([5.0]) == [5.0, 5.0]


def test_published_verdicts_and_tables_follow_from_the_stored_figures():
    """No verdict and no table is typed by hand."""
    for name in [key for key in STORED if key.startswith(tuple(compare.CLAIMS))]:
        section = STORED[name]
        assert len(section["claims"][0]["seeds"]) >= 5 and section["tried"] == compare.TRIED[name]
        assert not {STORED["tune"]["seed"], compare.CHOSEN_WITH} & set(section["claims"][0]["seeds"])
        for claim in section["claims"]:
            given = (claim[key] for key in ("statement", "seeds", "ours", "theirs", "unit", "speciality"))
            assert compare.judge(*given) == claim
    for section in ("compare", "quick"):
        for row in STORED[section]["rows"].values():
            for figure in ("speciality", "versatility"):
                values = [results[figure] for results in row["seeds"].values()]
                assert len(values) >= 5 and row[figure] == [statistics.mean(values), statistics.stdev(values)]
                assert row["band"][figure] == compare.band(values)
    with open(compare.STORED.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["" if cell is None else str(cell) for cell in row]
                                          for row in compare.leaves(STORED)]
    for name, row in STORED["tune"]["grid"].items():
        assert STORED["tune"]["best"][name] == compare.best_rate(row)
    readme = table.README.read_text(encoding="utf-8")
    assert set(table.TABLES) == set(re.findall(r"<!-- table: ([\w-]+) -->", readme))
    assert table.rewritten(readme, STORED) == readme, "run python -m reproduce.table"


def copied(folder):
    """A copy of what the programs of reproduce/ that only read figures need."""
    for name in ("reproduce", "engine"):
        shutil.copytree(HERE / name, folder / name)
    shutil.copy(HERE / "model.py", folder / "model.py")
    return folder / "reproduce"


@pytest.mark.slow
def test_tables_are_rewritten_between_their_marks(tmp_path):
    reproduce = copied(tmp_path)
    before = table.README.read_text(encoding="utf-8")
    (reproduce / "README.md").write_text(re.sub(r"(?m)^\| .*\n", "", before), encoding="utf-8")
    cli("-m", "reproduce.table", cwd=tmp_path)
    rows = lambda text: [line for line in text.splitlines() if line.startswith("| ")]
    after = (reproduce / "README.md").read_text(encoding="utf-8")
    between = lambda text: "".join(m[0] for m in table.MARK.finditer(text))
    assert between(after) == between(before) and len(rows(between(after))) > 20
    stored = json.loads((reproduce / "results" / "compare.json").read_text())
    del stored["tune"]
    (reproduce / "results" / "compare.json").write_text(json.dumps(stored))
    assert "has no 'tune'" in one_line_error("-m", "reproduce.table", cwd=tmp_path, run=cli)
    assert (reproduce / "README.md").read_text(encoding="utf-8") == after


def test_the_pictures_are_drawn_from_the_stored_figures(tmp_path):
    pytest.importorskip("matplotlib")
    reproduce = copied(tmp_path)
    for picture in (reproduce / "results").glob("*.png"):
        picture.unlink()
    cli("-m", "reproduce.figures", cwd=tmp_path)
    drawn = {picture.name for picture in (reproduce / "results").glob("*.png")}
    assert len(drawn) == 10 and drawn == {picture.name for picture in (HERE / "reproduce" / "results").glob("*.png")}
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "reproduce/README.md"))
    assert all(f"results/{name}" in text for name in drawn)


@pytest.mark.slow
def test_a_quick_comparison_survives_a_kill_lands_in_its_published_band_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the band is a CPU's
    command = ["-m", "reproduce.compare", "multilora", "--seeds", "1", "--quick", "--jobs", "1", "--out", tmp_path]
    folder = tmp_path / "quick-multilora-test-11"
    process = start(*command, stdout=subprocess.DEVNULL)
    for _ in range(3000):
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1)
    size = (folder / "metrics.jsonl").stat().st_size
    time.sleep(3)
    assert (folder / "metrics.jsonl").stat().st_size == size, "the run goes on without its parent"
    assert not (folder / "results.json").exists()

    assert "1 of 1 runs to make" in cli(*command).stdout
    row = json.loads((tmp_path / "compare.json").read_text())["quick"]["rows"]["multilora"]
    band = STORED["quick"]["rows"]["multilora"]["band"]
    for figure in ("speciality", "versatility"):
        assert band[figure][0] <= row[figure][0] <= band[figure][1], figure
    assert f",{row['speciality'][0]}" in (tmp_path / "compare.csv").read_text()
    written = (folder / "results.json").stat().st_mtime_ns
    assert "to make" not in cli(*command).stdout and (folder / "results.json").stat().st_mtime_ns == written
    saved = json.loads((folder / "config.json").read_text())
    saved["asked"]["code"]["multilora.py"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(saved))
    assert "1 finished runs were made by other code" in cli(*command).stdout
    saved["asked"]["settings"]["steps"] += 1
    (folder / "config.json").write_text(json.dumps(saved))
    assert "holds another run: --steps was 151, and is now 150" in one_line_error(*command, run=cli)


def test_a_plan_is_filled_in_its_own_shape_and_what_fails_is_none_or_an_error(tmp_path, monkeypatch, capsys):
    """Processes are stood in for: each leaves its seed as its score, and the one at seed 2 fails."""
    class Process:
        def __init__(self, target, args, daemon):
            self.command, self.exitcode = args[0], None

        def start(self):
            *argv, _, out = self.command[1:]
            config, method_config, _ = train.parse(argv)
            self.exitcode = 3 * (config.seed == 2)
            if not self.exitcode:
                (tmp_path / out).mkdir()
                asked = train.identity(config, method_config, *train.place(config))
                (tmp_path / out / "config.json").write_text(json.dumps({"asked": asked}))
                scores = {"speciality": config.seed, "versatility": 1, "seconds": 1}
                (tmp_path / out / "results.json").write_text(json.dumps(scores))

        def join(self):
            pass

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Process))
    runs = [compare.Run("sft", "--method sft", seed) for seed in range(4)]
    plan, args = {"all": runs, "one": {"again": runs[3]}}, SimpleNamespace(out=tmp_path, jobs=2, threads=1)
    results = compare.work(plan, args, "four", may_fail=True)
    assert [found and found["speciality"] for found in results["all"]] == [0, 1, None, 3]
    assert results["one"] == {"again": results["all"][3]} and results["all"][0]["folder"] == tmp_path / "sft-test-0"
    printed = capsys.readouterr().out
    assert "four: 4 of 4 runs to make" in printed and f"{tmp_path / 'sft-test-2'} ended with code 3" in printed
    saved = json.loads((tmp_path / "sft-test-1" / "config.json").read_text())
    del saved["asked"]["settings"]["samples"], saved["asked"]["method_settings"]["l2_to_base"]  # code that lacked them
    (tmp_path / "sft-test-1" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(compare.UserError, match="ended with code 3"):
        compare.work(plan, args, "again")
    assert "again: 1 of 4 runs to make" in capsys.readouterr().out


def test_importance_is_like_itself_and_its_histogram_holds_every_unit():
    z = {"a": torch.tensor([-3.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0]), "b": torch.arange(8.0) - 5}
    assert importance.alike(z, z) == pytest.approx({"z": 1, "importance": 1, "quarter": 1})
    turned = {name: -values for name, values in z.items()}  # I = |tanh z| does not see a sign
    assert importance.alike(z, turned) == pytest.approx({"z": -1, "importance": 1, "quarter": 1})
    other = {"a": z["a"].flip(0), "b": z["b"]}
    assert importance.alike(z, other)["quarter"] < 1 and importance.alike(z, other)["z"] < 1


@pytest.mark.slow
def test_importance_of_the_region_by_two_estimates():
    flags = "--importance-batches 2 --batch-size 8 --layers 0 --modules up_proj"
    found = importance.measure(flags.split())
    low, share, mask = zip(*found["histogram"])
    assert found["units"] == LlamaConfig.from_pretrained(BASE).intermediate_size and sum(share) == pytest.approx(100)
    for edge, left in zip(low, mask):  # a bin is half wide, the outer ones open
        near, far = sorted((abs(edge), abs(edge + 0.5)))
        least = 0 if edge in (-3, 3) else 1 - math.tanh(far)
        assert least - 1e-6 <= left <= 1 - math.tanh(near) + 1e-6, edge
    assert len(found["alike"]) == 3
    for figures in found["alike"].values():
        assert -1 <= figures["z"] < 1 and 0 <= figures["quarter"] <= 1
    assert "how alike" in importance.shown(found)


@pytest.fixture
def two_tasks(monkeypatch):
    monkeypatch.setattr(builtin, "NEW", {task: builtin.NEW[task] for task in ("tool", "cipher")})


ALONE = ("--method", "loreft", "--steps", "40", "--batch-size", "24", "--eval-limit", "20")


def test_a_task_alone_sees_as_many_of_its_examples(two_tasks):
    together = compare.Run("loreft", " ".join(ALONE), 3)
    for task in ("tool", "cipher"):
        run = compare.alone(together, task)
        config, _, _ = train.parse([*ALONE, "--seed", "3", "--tasks", task, "--steps", "20"])
        assert train.parse(run.argv)[0] == config and run.identity != together.identity
    assert len({together.folder, *(compare.alone(together, task).folder for task in builtin.NEW)}) == 3


@pytest.mark.slow
def test_a_task_alone_is_a_run_on_that_task(runs, tmp_path, two_tasks, monkeypatch):
    """Oracle: the command line with --tasks and as many steps as the task's share of the run on all of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together = compare.Run("loreft", " ".join(ALONE), 0)
    made = {task: compare.alone(together, task) for task in builtin.NEW}
    results = compare.work(made, SimpleNamespace(out=tmp_path, jobs=1, threads=1), "alone")
    for task in made:
        one = runs("--method", "loreft", "--tasks", task, "--steps", "20", "--batch-size", "24", "--eval-limit", "20")
        one = json.loads((one / "results.json").read_text())["tasks"][task]
        assert one["after"] == results[task]["tasks"][task]["after"]


@pytest.mark.parametrize("program", sorted(
    f"{room}.{file.stem}" for room in ("reproduce", "tools", "bench") for file in (HERE / room).glob("[a-z]*.py")))
def test_every_program_explains_its_flags(program):
    if program == "reproduce.figures":
        pytest.importorskip("matplotlib")
    assert here("-m", program, "--help").stdout.startswith(f"usage: {program} [-h]")


@pytest.mark.parametrize("program, args, names", [
    ("reproduce.compare", ["multilroa"], ["'multilroa'", "multilora"]),
    ("reproduce.compare", ["--claim", "multilora", "--seeds", "3"], ["--seeds is 3", "from 5 to 20"]),
    ("reproduce.compare", ["--tune", "--claim", "multilora"], ["one of --tune"]),
    ("reproduce.compare", ["--suite", "hard", "--claim", "csreft"], ["--suite hard", "--claim multilora"]),
    ("reproduce.compare", ["--jobs", "0"], ["--jobs", "at least 1"]),
    ("reproduce.count", ["multilora", "llama-2-9b"], ["llama-2-9b", "llama-2-7b"]),
    ("reproduce.count", ["multilora", "llama-2-7b", "--rank", "0"], ["--rank is 0"]),
    ("reproduce.count", ["csreft", "llama-2-7b", "--layers", "40"], ["layers '40'", "0 to 31"]),
    ("reproduce.importance", ["--mask-on", "none"], ["--mask-on none has no importance"]),
    ("reproduce.importance", ["--layers", "9-12"], ["layers '9-12'", "25%-50%"]),
    ("reproduce.spectra", ["base"], ["no adapter.safetensors"]),
    ("reproduce.gates", ["base"], ["no adapter.safetensors"]),
    ("reproduce.wise", ["base"], ["no adapter.safetensors"]),
    ("reproduce.tree", ["base"], ["base holds no finished search"]),
    ("reproduce.table", ["x"], ["unknown argument 'x'"]),
    ("bench.gpu", ["--shape", "llama"], ["llama-2-7b"]),
    ("bench.load", ["--steps"], ["unknown argument '--steps'"]),
])
def test_a_mistake_is_one_clear_line(tmp_path, program, args, names):
    (tmp_path / "base").symlink_to(BASE)
    message = one_line_error("-m", program, *args, cwd=tmp_path)
    assert all(name in message for name in names), message
    assert [file.name for file in tmp_path.iterdir()] == ["base"], "a refused command must leave nothing behind"


# ---------------------------------------------------------------------------------------------- bench


@pytest.mark.slow
def test_the_gpus_benchmark_trains_with_every_method(monkeypatch):
    """On a processor, and on a shape that it can train."""
    monkeypatch.setitem(SHAPES, "llama-2-7b", LlamaConfig(512, 64, 128, 4, 4))
    try:
        text = here("-m", "bench.gpu", "--layers", "1", "--device", "cpu", "--steps", "1").stdout
    finally:
        torch.set_default_dtype(torch.float32)  # a process of its own would end with its bfloat16
    for method in ("multilora", "csreft", "cofitune"):
        assert re.search(rf"^{method} +[\d,]+ trained +[\d,]+ tokens/s +\d+\.\d GiB$", text, re.M), text


@pytest.mark.slow
def test_the_loaders_benchmark_measures_both_loaders():
    pytest.importorskip("transformers")
    text = cli("-m", "bench.load").stdout
    rows = re.findall(r"^(float32|bfloat16) +(ours|transformers) +\d+\.\d+ +(\d+\.\d+) ", text, re.M)
    assert [(file, who) for file, who, _ in rows] == [
        (file, who) for file in ("float32", "bfloat16") for who in ("ours", "transformers")]
    assert all(float(memory) <= 1.15 for _, who, memory in rows if who == "ours"), text
