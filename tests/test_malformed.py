"""Malformed input: exit code 2, one line of at most 300 characters, no traceback, and nothing half written."""

import json
import os
import shutil

import pytest

import train
from data import Tokenizer
from model import Llama, UserError
from tests.helpers import BASE, HERE, SOURCES, cli, here, one_line_error, tiny, tokenizer_folder, written

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
CONFIGS = [
    *((key, value) for key in SIZES for value in (-1, 0, "8", 1.5, True, [8], 2**60)),
    *((key, value) for key in ("rms_norm_eps", "rope_theta") for value in (-1.0, 0, "1", True, float("nan"), [1.0])),
    *((key, value) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias") for value in (1, "true", [])),
    ("rope_scaling", []), ("rope_scaling", 7), ("rope_scaling", {"rope_type": 3}), ("rope_scaling", {"rope_type": []}),
    ("rope_scaling", {"rope_type": "linear", "factor": "4"}), ("rope_scaling", {"rope_type": "linear", "factor": True}),
    ("rope_scaling", {"rope_type": "linear", "factor": -2.0}), ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", {"rope_theta": [1]}), ("num_hidden_layers", 1_000_000), ("num_hidden_layers", 1),
    ("model_type", 3), ("model_type", "gpt2"), ("hidden_act", "gelu"), ("quantization_config", {"bits": 4}),
    ("eos_token_id", "x"), ("bos_token_id", 1.5), ("hidden_size", 2**31), ("head_dim", 2**39), ("head_dim", 2**35)]


@pytest.mark.parametrize("key, value", CONFIGS, ids=lambda value: str(value)[:40])
def test_a_wrong_value_in_config_json_is_named(tmp_path, key, value):
    tiny().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    if value == 2**60 and key in ("max_position_embeddings",):
        value = -(2**60)
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(UserError) as error:
        Llama.from_pretrained(tmp_path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300 and str(tmp_path) in text
    assert key in text or "RoPE" in text or "layers" in text or "shape" in text or "rope" in text


RUNS = [("steps", "ten"), ("steps", -1), ("steps", True), ("lr", "fast"), ("lr", 0), ("data", "builtin"), ("data", [1]),
        ("tasks", 7), ("template", "chatty"), ("seed", 1.5), ("eval_limit", None), ("skip_bad_rows", 1),
        ("max_length", 1), ("colour", "red"), ("mix", ["equal"])]
METHODS = [("rank", 0), ("rank", 2**63), ("rank", "4"), ("modules", 1.5), ("scaling", "matrix"), ("dropout", 1.0),
           ("dropout", "no"), ("targets", ["q_proj"]), ("alpha", float("nan")), ("alpha", True), ("shape", 3)]


@pytest.mark.parametrize("part, key, value", [*(("settings", *case) for case in RUNS),
                                              *(("method_settings", *case) for case in METHODS)],
                         ids=lambda value: str(value)[:40])
def test_a_wrong_value_in_a_runs_own_config_is_named(tmp_path, part, key, value):
    run = tmp_path / "run"
    shutil.copytree("tests/fixtures/first-build-multilora", run)
    raw = json.loads((run / "config.json").read_text())
    if part == "settings" and key in ("steps", "lr"):
        raw["settings"].pop("pretrain")
    raw[part][key] = value
    (run / "config.json").write_text(json.dumps(raw))
    if part == "method_settings" and key in train.RETIRED:
        return
    with pytest.raises(UserError) as error:
        train.read_run(run)
    assert key.replace("_", "-") in str(error.value).replace("_", "-") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config", {"eos_token": 3}, ["eos_token is 3"]),
    ("tokenizer_config", {"eos_token": ["x"]}, ["eos_token is ['x']"]),
    ("tokenizer_config", {"pad_token": {"content": 1}, "eos_token": "</s>"}, ["pad_token is 1"]),
    ("tokenizer_config", {"bos_token": True, "eos_token": "</s>"}, ["bos_token is True"]),
    ("tokenizer_config", {"eos_token": False}, ["eos_token is False"]),
    ("tokenizer_config", {"eos_token": {}}, ["eos_token is None"]),
    ("tokenizer_config", {"eos_token": "<end>"}, ["eos_token '<end>' is not in the vocabulary"]),
    ("tokenizer_config", {"bos_token": "<go>", "eos_token": "</s>"}, ["bos_token '<go>' is not in the vocabulary"]),
    ("generation_config", {"eos_token_id": 512}, ["eos_token_id is 512", "0 to 511"]),
    ("generation_config", {"eos_token_id": [2, -1]}, ["eos_token_id is -1"]),
    ("generation_config", {"eos_token_id": "2"}, ["eos_token_id is '2'"]),
    ("generation_config", {"eos_token_id": [2, True]}, ["eos_token_id is True"]),
    ("generation_config", {"eos_token_id": 2.0}, ["eos_token_id is 2.0"])])
def test_a_wrong_value_in_a_tokenizers_settings_is_named(tmp_path, name, content, words):
    folder = tokenizer_folder(tmp_path / "x", **{name: content})
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(folder)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/hostname", "a/b.safetensors", ""])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, place):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(UserError, match="own folder"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "\x00", "NaN", "null", '"text"', "{]"])
def test_json_that_is_deep_or_none_is_one_line(tmp_path, content):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        Llama.from_pretrained(tmp_path)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", tmp_path):
        assert str(file) in one_line_error("train.py", "--method", "lora", "--data", file)
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    os.mkfifo(tmp_path / "base" / "config.json")
    assert "no regular file" in one_line_error("train.py", "--method", "lora", "--base", tmp_path / "base")


@pytest.mark.parametrize("args", [
    ["--device", "meta"], ["--device", ""], ["--device", "cpu:x"], ["--seed", "-1"], ["--seed", "1" * 30],
    ["--seed", "x\ny"], ["--lr", "inf"], ["--lr", "0"], ["--warmup", "1"], ["--clip", "-1"], ["--steps", "1e3"],
    ["--batch-size", "0"], ["--eval-limit", "-3"], ["--max-length", "1"], ["--replay", "nan"], ["--tasks", ""],
    ["--weight-decay", "-0.1"], ["--log-every", "0"], ["--save-every", "-1"], ["--max-new-tokens", "0"],
    ["--dtype", "int8"], ["--tasks", "currency,,tool"], ["--tasks", "x" * 5000], ["--" + "x" * 5000],
    ["--targets", "a\nb"], ["--base", ""], ["--base", "/dev/null"], ["--rank", "2.5"], ["--dropout", "1"],
    ["--alpha", "0"], ["--train", "s", "--scaling", "none"], ["extra"], ["--eval-only"], ["--adapter", "x"],
    ["--data"], ["--rank", "9" * 19], ["--modules", "1" * 30], ["--rank", "1000000000", "--modules", "1000000000"],
    ["--steps", "9" * 20]], ids=lambda args: " ".join(args)[:30])
def test_a_wrong_flag_is_one_line(tmp_path, args):
    message = one_line_error("train.py", "--method", "multilora", *args, "--out", tmp_path / "run")
    assert len(message) <= 300 and not (tmp_path / "run").exists()


def test_legal_but_odd_input_works(tmp_path):
    """One row with --eval-data, an empty answer there, prompts of special tokens alone, a batch larger than the data,
    --max-length 2, a folder with spaces, another working directory."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    written(folder / "one.jsonl", [{"prompt": "<s></s>", "completion": "Ho"}])
    written(folder / "test.jsonl", [{"prompt": "Hi", "completion": ""}, {"prompt": "</s>", "completion": "<s>"}])
    common = ("--method", "lora", "--base", BASE, "--data", "one.jsonl", "--steps", "2")
    program = BASE.parent / "train.py"
    here(program, *common, "--eval-data", "one=test.jsonl", "--batch-size", "100", cwd=folder)
    assert json.loads((folder / "out" / "lora" / "results.json").read_text())["tasks"]["one"]["after"] >= 0
    here(program, *common, "--eval-data", "one=test.jsonl", "--max-length", "2", "--out", "short", cwd=folder)


@pytest.mark.slow
def test_a_checkout_in_a_folder_with_spaces_works(tmp_path):
    here = tmp_path / "my own checkout"
    here.mkdir()
    for name in (*SOURCES, "tools"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copyfile
        copy(HERE / name, here / name)
    command = ("train.py", "--method", "lora", "--tasks", "currency", "--steps", "1", "--eval-limit", "1")
    for said in ("Uni", "nothing was done"):
        assert said in cli(*command, cwd=here).stdout
    assert "tokens/s" in cli("-m", "tools.chat", "base", "Hi", "--adapter", "out/lora", cwd=here).stdout


def test_bad_rows_are_counted_not_listed(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": str(i)} for i in range(50)] + [{"prompt": 7, "completion": ""}] * 100_000
    written(tmp_path / "many.jsonl", rows)
    text = here("train.py", "--method", "lora", "--data", tmp_path / "many.jsonl", "--skip-bad-rows", "--steps", "1",
                "--batch-size", "2", "--out", tmp_path / "run").stdout
    assert "100000 bad rows skipped" in text.replace(",", "")


@pytest.mark.slow
def test_mutated_input_ends_in_success_or_one_line():
    text = cli("-m", "tests.fuzz", "--cases", "2000").stdout
    assert len(text.splitlines()) == 7 and all("refused" in line for line in text.splitlines())
