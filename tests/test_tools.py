"""The programs for a person, run as a person runs them: chat, plot, export, show, pretrain. For score see
test_train.py."""

import io
import json
import re
import shutil
import sys

import pytest
import torch

import data
import train
from base import suite as builtin
from formats import chat_template
from model import Llama
from tests.helpers import BASE, QUICK, cli, here, json_lines, one_line_error, random_ids, their_logits, written

ASKED = "Name the tool of Zegen."


def prompt_of(text):
    """A first turn, in the template that the base was trained with."""
    return f"### Instruction:\n{text}\n\n### Response:\n"


def chat(*args):
    """The answer that tools.chat prints, without its speed."""
    return here("-m", "tools.chat", "base", *args).stdout.rsplit("\n[", 1)[0]


# ---------------------------------------------------------------------------------------------- chat


def test_chat_answers_a_prompt_with_flags_before_or_behind_it():
    text = cli("-m", "tools.chat", "--max-new-tokens", "8", "base", "What is 21 + 34?", "--device", "cpu").stdout
    assert text.splitlines()[0] == "55" and "tokens/s" in text


def test_chat_with_an_adapter_samples_by_seed(runs):
    out = runs("--method", "csreft", *QUICK)
    said = [chat("Hi", "--adapter", out, "--temperature", "3", "--seed", seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    model, tokenizer = train.load_run(out, base=BASE)[0], data.Tokenizer.from_pretrained(BASE)
    wanted = tokenizer.decode(model.generate([tokenizer.encode(prompt_of(ASKED))], 64, tokenizer.stop_ids)[0])
    assert chat(ASKED) != chat(ASKED, "--adapter", out) == wanted


def test_a_conversation_goes_on_with_what_was_said(monkeypatch):
    """Oracle: the turns spelled out, an EOS behind each answer."""
    questions = ["What is 21 + 34?", "Write backwards: a b c d"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*questions, "", "never read"])))
    said = here("-m", "tools.chat", "base").stdout
    answers = [line.removeprefix("> ") for line in said.splitlines() if "tokens/s" not in line]
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    ids, wanted, lengths = [], [], []
    for question in questions:
        ids += tokenizer.encode("\n\n" * bool(ids) + prompt_of(question), start=not ids)
        answer = model.generate([ids], 64, tokenizer.stop_ids)[0]
        lengths.append(len(ids))
        wanted.append(tokenizer.decode(answer))
        ids += [*answer, tokenizer.eos_id]
    assert wanted[0] == "55" and [a for a in answers if a] == [a for a in wanted if a]
    assert [int(n) for n in re.findall(r"\[(\d+) prompt tokens", said)] == lengths


def test_base_switches_the_adapter_off_and_on_in_a_conversation(runs, monkeypatch):
    out = runs("--method", "csreft", *QUICK)
    tuned, plain = chat(ASKED, "--adapter", out), chat(ASKED)
    for lines, wanted in (([ASKED], [tuned]), (["/base", ASKED], ["[the base]", plain]),
                          (["/base", "/base", ASKED], ["[the base]", "[with the adapter]", tuned])):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, ""])))
        said = here("-m", "tools.chat", "base", "--adapter", out).stdout.replace("> ", "")
        assert re.sub(r"\n\[\d+ prompt tokens.*", "", said).strip() == "\n".join(wanted), lines


def test_chat_answers_a_file_in_alpaca_evals_form(tmp_path):
    orders = [{"instruction": "What is 21 + 34?", "dataset": "sums"}, {"instruction": "Reverse:", "input": "a b c"},
              {"instruction": "a b " * 700}]
    file, outputs = written(tmp_path / "orders.json", orders, "array"), tmp_path / "new" / "outputs.json"
    args = ("-m", "tools.chat", "base", "--prompts", file, "--outputs", outputs, "--max-new-tokens", "8")
    said = here(*args, "--generator", "ours").stdout
    assert "1 prompts are longer than" in said and "3 answers" in said
    found = json.loads(outputs.read_text())
    assert [o["dataset"] for o in found] == ["sums", "orders", "orders"]
    assert [(o["instruction"], o["generator"]) for o in found] == [(o["instruction"], "ours") for o in orders]
    model, tokenizer = Llama.from_pretrained(BASE), data.Tokenizer.from_pretrained(BASE)
    answer = model.generate([tokenizer.encode(prompt_of("Reverse:\n\na b c"))], 8, tokenizer.stop_ids)[0]
    assert found[0]["output"] == "55" and found[1]["output"] == tokenizer.decode(answer).strip()
    assert "is there already" in one_line_error(*args)
    written(file, [{"instruction": "fine"}, {"prompt": "none"}])
    message = one_line_error(*args[:-3], tmp_path / "other.json")
    assert ":2 cannot be read: 'instruction' is missing" in message and not (tmp_path / "other.json").exists()
    for content, words in (('[{"instruction": ""}]', "record 1: the instruction is empty"), ('["a"]', "no records")):
        file.write_text(content)
        assert words in one_line_error(*args[:-3], tmp_path / "other.json")


# ---------------------------------------------------------------------------------------------- plot


@pytest.mark.slow
def test_runs_are_drawn_and_matplotlib_is_asked_for_in_one_line(runs, tmp_path, monkeypatch):
    folders = [runs("--method", method, *QUICK) for method in ("multilora", "csreft")]
    png = tmp_path / "a.png"
    assert "results.json does not exist" in one_line_error("-m", "tools.plot", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in one_line_error("-m", "tools.plot", *folders, "--png", png)
    assert not png.exists()
    pytest.importorskip("matplotlib")
    assert "2 panels" in here("-m", "tools.plot", *folders, "--png", png).stdout
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------- export


def test_an_exported_checkpoint_has_the_runs_logits_and_the_bases_tokenizer(runs, tmp_path):
    out, merged = runs("--method", "multilora", *QUICK), tmp_path / "merged"
    here("-m", "tools.export", out, "--hf", merged)
    wanted = train.load_run(out, base=BASE)[0]
    ids = random_ids(wanted, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(merged)(ids), wanted(ids), atol=1e-4, rtol=0)
        assert (wanted(ids) - Llama.from_pretrained(BASE)(ids)).abs().max() > 1e-3
    tokenizers = [data.Tokenizer.from_pretrained(folder) for folder in (BASE, merged)]
    assert tokenizers[0].encode("Reverse: a b") == tokenizers[1].encode("Reverse: a b")
    config = json.loads((merged / "tokenizer_config.json").read_text())
    assert config == json.loads((BASE / "tokenizer_config.json").read_text()), "an export keeps the template"
    before = {file: file.read_bytes() for file in merged.iterdir()}
    assert "is there already" in one_line_error("-m", "tools.export", out, "--hf", merged)
    assert {file: file.read_bytes() for file in merged.iterdir()} == before
    here("-m", "tools.export", out, "--hf", tmp_path / "again", "--base", BASE, cwd=tmp_path)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before[merged / "model.safetensors"]
    torch.testing.assert_close(their_logits(merged, ids), wanted(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("asked", ["auto", "plain"])
def test_an_export_has_one_template_wherever_the_base_had_its_own(runs, tmp_path, asked):
    """transformers reads none from chat_template.json beside a tokenizer, and this project does."""
    base = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("pretraining", "*.py", "__pycache__"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.json").write_text(json.dumps({"chat_template": config.pop("chat_template")}))
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    out = runs("--method", "lora", *QUICK, "--base", base, "--template", asked)
    here("-m", "tools.export", out, "--hf", tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["chat_template"]
    wanted = json.loads((out / "config.json").read_text())["template"]
    assert wanted == "plain" or told == wanted
    assert chat_template(tmp_path / "merged") == told and ("###" in told) == (asked == "auto")


@pytest.mark.parametrize("method", ["multilora", "lora"])
def test_an_exported_peft_adapter_has_the_runs_logits_and_texts(runs, tmp_path, method):
    out = runs("--method", method, *QUICK)
    here("-m", "tools.export", out, "--peft", tmp_path / "peft")
    model = train.load_run(out, base=BASE)[0]
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    base.generation_config.eos_token_id = None
    theirs, ids = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval(), random_ids(model, 2, 20)
    texts = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)
        assert (model(ids) - Llama.from_pretrained(BASE)(ids)).abs().max() > 1e-3
    assert texts[:, 20:].tolist() == model.generate(ids.tolist(), 8)


def test_what_cannot_be_exported_says_why(runs, tmp_path):
    out = runs("--method", "csreft", *QUICK)
    assert "cannot be merged" in one_line_error("-m", "tools.export", out, "--hf", tmp_path / "merged")
    assert "only MultiLoRA and LoRA" in one_line_error("-m", "tools.export", out, "--peft", tmp_path / "peft")
    assert not list(tmp_path.iterdir()), "a refused export must leave nothing behind"


# ---------------------------------------------------------------------------------------------- show


def test_show_brackets_what_is_trained_on_and_spells_characters_of_several_tokens(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"prompt": "北京?", "completion": "é是"}] * 3)
    text = here("-m", "tools.show", f"work={file}", "--template", "plain").stdout
    assert re.search(r"^work +pair +exact +3 ", text, re.M)
    assert re.search(r"user: +北京\?\n +assistant: +é是\n", text)
    assert "北+3 京+3 ?" in text and "[é+2] [是+3] [</s>]" in text and "\ufffd" not in text
    written(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "A", "weight": 0}] * 3)
    assert "no answer of b is to be trained on" in one_line_error("-m", "tools.show", file, tmp_path / "b.jsonl")


def test_show_lists_the_built_in_suite(monkeypatch):
    monkeypatch.setattr(builtin, "SIZES", dict.fromkeys(builtin.SIZES, 5))
    text = here("-m", "tools.show").stdout
    assert all(re.search(rf"^{name} .* 5 ", text, re.M) for name in builtin.TASKS) and "[</s>]" in text


# ---------------------------------------------------------------------------------------------- pretrain


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pretraining_makes_a_base_and_replaces_one_only_when_told(tmp_path, monkeypatch, whole):
    """whole: with all examples, whose tokenizer is the built-in base's."""
    if not whole:
        monkeypatch.setitem(builtin.SIZES, "pretrain", 200)
    out = tmp_path / "base"
    args = ("-m", "tools.pretrain", "--steps", "2", "--eval-limit", "2", "--batch-size", "4", "--out", out)
    here(*args)
    model, tokenizer = Llama.from_pretrained(out), data.Tokenizer.from_pretrained(out)
    shapes = lambda model: [(name, t.shape) for name, t in model.state_dict().items()]
    assert shapes(model) == shapes(Llama.from_pretrained(BASE))
    assert len(model.generate([tokenizer.encode("Reverse: a b c")], 4)[0]) == 4
    assert tokenizer.decode(tokenizer.encode("What is 21 + 34?")[1:]) == "What is 21 + 34?"
    del model  # mapped from the file that is replaced below
    assert len(tokenizer.encode("1234", start=False)) == 4, "each digit is a token of its own"
    record = out / "pretraining"
    results = json.loads((record / "results.json").read_text())
    assert results["steps"] == 2 and results["tasks"].keys() == builtin.GENERAL.keys()
    assert json_lines(record / "metrics.jsonl")[-1]["step"] == 2
    assert "python -m tools.pretrain --steps 2 " in json.loads((record / "config.json").read_text())["command"]
    if whole:
        assert (out / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
        return

    own = [out / "suite.py", out / "notes.txt", record / "notes.txt"]
    for file in own:
        file.write_text("mine")
    files = lambda: {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    before = files()
    assert "holds a checkpoint already" in one_line_error(*args, "--seed", "1")
    assert files() == before
    here(*args, "--seed", "1", "--overwrite")
    after = files()
    assert after.keys() == before.keys() and all(after[file] == before[file] for file in [*own, out / "tokenizer.json"])
    assert after[out / "model.safetensors"] != before[out / "model.safetensors"]


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("program, args, names", [
    ("tools.chat", ["nowhere", "Hello"], ["nowhere", "does not exist"]),
    ("tools.chat", [], ["checkpoint"]),
    ("tools.chat", ["base", "Hello", "--adapter", "base"], ["no adapter.safetensors"]),
    ("tools.chat", ["base", "Hello", "--prompts", "x.json"], ["one of", "--prompts"]),
    ("tools.chat", ["base", "--prompts", "none.json"], ["none.json", "cannot be read"]),
    ("tools.chat", ["base", "Hello", "--max-new-tokens", "0"], ["--max-new-tokens from 1"]),
    ("tools.chat", ["base", "Hello", "--max-new-tokens", "1023"], ["--max-new-tokens 1023", "1024 positions"]),
    ("tools.chat", ["base", "a b " * 700], ["the prompt has", "room for 960"]),
    ("tools.chat", ["base", "Hello", "--template", "chatty"], ["chatty", "alpaca"]),
    ("tools.chat", ["base", "Hello", "--temperature", "nan"], ["--temperature 0 or from 0.01 to 100"]),
    ("tools.chat", ["base", "Hello", "--seed", "1" * 40], ["--seed from 0"]),
    ("tools.chat", ["base", "Hell\udcff"], ["the prompt cannot be read"]),
    ("tools.chat", ["base", "Hello", "--temprature", "1"], ["--temprature", "--help lists"]),
    ("tools.score", ["base", "--eval-data", "x", "--eval-split", "validation"], ["leave out --eval-split"]),
    ("tools.export", ["base", "--hf", "x"], ["no adapter.safetensors"]),
    ("tools.export", ["base"], ["one of --hf DIR and --peft DIR"]),
    ("tools.show", ["none.json"], ["none.json", "cannot be read"]),
    ("tools.pretrain", ["--steps", "0", "--out", "x"], ["--steps is 0"]),
    ("tools.pretrain", ["--method", "lora", "--out", "x"], ["--method", "--help lists"]),
])
def test_a_mistake_is_one_clear_line(tmp_path, program, args, names):
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("pretraining", "__pycache__"))
    message = one_line_error("-m", program, *args, cwd=tmp_path)
    assert all(name in message for name in names), message
    assert [file.name for file in tmp_path.iterdir()] == ["base"], "a refused command must leave nothing behind"
