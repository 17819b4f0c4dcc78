"""Malformed input: exit code 2, one line of at most 300 characters, no traceback, and nothing half written. Files of
records: see test_formats.py."""

import json
import os
import shutil

import pytest

import train
from data import Tokenizer
from model import Llama, UserError
from tests.helpers import BASE, HERE, cli, here, one_line_error, posix, refused, tiny, tokenizer_folder, written

RUN = ("--method", "multilora", "--tasks", "currency", "--steps", "1", "--batch-size", "2", "--eval-limit", "1",
       "--samples", "0")


@pytest.mark.parametrize("key, value, words", [
    *(("hidden_size", value, "hidden_size is") for value in (-1, 0, "8", 1.5, True, [8], None)),
    ("num_hidden_layers", 1_000_000, "num_hidden_layers"), ("num_hidden_layers", 1, "model.layers.1."),
    ("num_key_value_heads", 3, "num_key_value_heads is 3"), ("num_key_value_heads", "x", ""), ("head_dim", [8], ""),
    ("head_dim", 2**39, ""), ("hidden_size", 2**31, "shape"), ("rms_norm_eps", "1", ""), ("attention_bias", 1, "bias"),
    ("max_position_embeddings", -1, "max_position_embeddings is -1"), ("rope_scaling", 7, ""),
    ("rope_scaling", {"rope_type": 3}, "RoPE type"), ("rope_scaling", {"rope_type": "linear", "factor": "4"}, ""),
    ("rope_parameters", {"rope_theta": [1]}, ""), ("model_type", "gpt2", "model_type is 'gpt2', expected 'llama'"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"), ("quantization_config", {"bits": 4}, "quantization_config"),
    *((None, text, "config.json") for text in ("[" * 10**5, '{"a":' * 10**5, "\x00", "NaN", "null", '"text"', "{]")),
], ids=lambda value: str(value)[:40])
def test_a_wrong_config_json_is_one_line_that_names_the_key(tmp_path, key, value, words):
    tiny().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}) if key else value)
    refused(Llama.from_pretrained, tmp_path, words)


def test_mistrals_length_is_its_own_where_config_json_names_none(tmp_path):
    tiny().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": None}
    del raw["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = Llama.from_pretrained(tmp_path).config.max_position_embeddings
    assert found == pytest.importorskip("transformers").MistralConfig().max_position_embeddings == 131072


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/hostname", "a/b.safetensors", ""])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, place):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    refused(Llama.from_pretrained, tmp_path, "index.json")


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config", {"eos_token": 3}, "config"), ("tokenizer_config", {"eos_token": ["x"]}, "config"),
    ("tokenizer_config", {"eos_token": "<end>"}, "eos_token '<end>' is not in the vocabulary"),
    ("tokenizer_config", {"bos_token": "<go>", "eos_token": "</s>"}, "bos_token '<go>' is not in the vocabulary"),
    ("config", {"vocab_size": 600, "eos_token_id": 550}, "eos_token_id is 550, expected the id of a token"),
    ("generation_config", {"eos_token_id": 512}, "512"), ("generation_config", {"eos_token_id": [2, -1]}, ""),
    ("generation_config", {"eos_token_id": "2"}, ""), ("generation_config", {"eos_token_id": [[2]]}, "")])
def test_a_wrong_value_in_a_tokenizers_settings_is_named(tmp_path, name, content, words):
    refused(Tokenizer.from_pretrained, tokenizer_folder(tmp_path / "x", **{name: content}), words)


@pytest.mark.parametrize("part, key, value, words", [
    (None, "method", "nothing", "unknown method 'nothing'"), (None, "method", [1], "config.json"),
    (None, "asked", None, "config.json"), ("settled", "rank", "4", "config.json"),
    ("settled", "rank", -1, "config.json"), ("settled", "colour", "red", "colour"),
    ("settled", "targets", 7, "config.json"),
    ("asked", "settings", {"steps": 1, "epochs": 2}, "one of --steps and --epochs")])
def test_a_wrong_value_in_a_runs_config_json_is_one_line(runs, tmp_path, part, key, value, words):
    shutil.copytree(runs(*RUN), tmp_path / "run")
    raw = json.loads((tmp_path / "run" / "config.json").read_text())
    (raw[part] if part else raw)[key] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        train.load_run(tmp_path / "run")


@posix
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", tmp_path):
        assert str(file) in one_line_error("train.py", "--method", "lora", "--data", file, "--out", tmp_path / "out")
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    os.mkfifo(tmp_path / "base" / "config.json")
    refused(Llama.from_pretrained, tmp_path / "base", "no regular file")


@pytest.mark.parametrize("args", [
    ["--device", "meta"], ["--device", ""], ["--device", "cpu:x"], ["--seed", "-1"], ["--seed", "1" * 30],
    ["--seed", "x\ny"], ["--lr", "inf"], ["--lr", "0"], ["--warmup", "1"], ["--clip", "-1"], ["--steps", "1e3"],
    ["--batch-size", "0"], ["--eval-limit", "-3"], ["--max-length", "1"], ["--tasks", ""], ["--weight-decay", "-0.1"],
    ["--save-every", "-1"], ["--max-new-tokens", "0"], ["--dtype", "int8"], ["--tasks", "currency,,tool"],
    ["--tasks", "x" * 5000], ["--" + "x" * 5000], ["--targets", "a\nb"], ["--base", ""], ["--base", "/dev/null"],
    ["--rank", "2.5"], ["--dropout", "1"], ["--alpha", "0"], ["extra"], ["--data"], ["--rank", "9" * 19],
    ["--modules", "1" * 30], ["--rank", "1000000000", "--modules", "1000000000"], ["--steps", "9" * 20],
    ["--method", "nothing"]], ids=lambda args: " ".join(args)[:30])
def test_a_wrong_flag_is_one_line(tmp_path, args):
    message = one_line_error("train.py", "--method", "multilora", *args, "--out", tmp_path / "run")
    assert len(message) <= 300 and not list(tmp_path.rglob("*.*"))


def test_legal_but_odd_input_works(tmp_path):
    """One row with --eval-data, an empty answer there, prompts of special tokens alone, a batch larger than the data,
    --max-length 2, a folder with spaces, another working directory."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    written(folder / "one.jsonl", [{"prompt": "<s></s>", "completion": "Ho"}])
    written(folder / "test.jsonl", [{"prompt": "Hi", "completion": ""}, {"prompt": "</s>", "completion": "<s>"}])
    common = (HERE / "train.py", "--method", "lora", "--base", BASE, "--data", "one.jsonl", "--steps", "2")
    here(*common, "--eval-data", "one=test.jsonl", "--batch-size", "100", cwd=folder)
    assert json.loads((folder / "out" / "lora" / "results.json").read_text())["tasks"]["one"]["after"] >= 0
    here(*common, "--eval-data", "one=test.jsonl", "--max-length", "2", "--out", "short", cwd=folder)


@pytest.mark.slow
def test_mutated_input_ends_in_success_or_one_line():
    text = cli("-m", "tests.fuzz", "--cases", "2000").stdout
    assert len(text.splitlines()) == 5 and all("refused" in line for line in text.splitlines())
