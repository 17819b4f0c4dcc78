"""tools.gguf: what gguf's own writer made is read back, and real files as transformers reads them."""

import json
import math
import sys
import zipfile

import numpy as np
import pytest
import torch

from data import Tokenizer
from model import Llama
from tests.helpers import BASE, TINY, here, needs_real, one_line_error, tiny
from tools.gguf import NAMES, tokenizer_of

TEXTS = ["Hello  world, 1234 don't", "\n\n x é ☃ 𝛼", "a  b\tc ", " HE'LL say: <s>"]
SPECIAL = {"unknown": 2, "control": 3}


def vocabulary(folder):
    """The metadata by which GGUF describes a tokenizer.json."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    special = {token["content"] for token in raw["added_tokens"]}
    types = [2 if token == "<unk>" else 3 if token in special else 6 if token.startswith("<0x") else 1
             for token in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
    return tokens, types, merges


def write(file, model, kind=None, architecture="llama", **changes):
    """A model as llama.cpp's converter writes it, its matrices quantised as `kind` (None: float32), with the built-in
    tokenizer. Returns the state dict that the file's numbers stand for."""
    gguf = pytest.importorskip("gguf")
    writer, c = gguf.GGUFWriter(file, architecture), model.config
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_context_length(c.max_position_embeddings)
    tokens, types, merges = vocabulary(BASE)
    for add, value in ((writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
                       (writer.add_token_list, tokens), (writer.add_token_types, types),
                       (writer.add_token_merges, merges), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
                       (writer.add_pad_token_id, 0), (writer.add_add_bos_token, True),
                       (writer.add_chat_template, "{{ messages[0].content }}")):
        add(value)
    for key, value in changes.items():
        writer.add_uint32(key.replace("__", "."), value)
    names, state = {value: key for key, value in NAMES.items()}, {}
    for name, tensor in model.state_dict().items():
        *layer, part, _ = name.removeprefix("model.layers.").split(".") if "layers" in name else ("", name[:-7], "")
        theirs = f"blk.{layer[0]}.{names['.'.join((*layer[1:], part))]}" if layer[0] else names[part]
        data = tensor.numpy()
        if kind and tensor.dim() == 2:
            data = gguf.quants.quantize(data, kind)
            state[name] = torch.from_numpy(gguf.dequantize(data, kind).copy())
        else:
            state[name] = tensor
        if theirs.endswith(("attn_q", "attn_k")):  # whole rows change places, so quantised ones may, too
            heads = c.num_attention_heads if theirs.endswith("q") else c.num_key_value_heads
            data = np.concatenate([head[[i // 2 + i % 2 * c.head_dim // 2 for i in range(c.head_dim)]]
                                   for head in np.split(data, heads)])
        writer.add_tensor(f"{theirs}.weight", data, raw_dtype=kind if kind and tensor.dim() == 2 else None)
    if c.rope_scaling:  # Llama 3.1's rule, wave by wave, as llama.cpp keeps it
        low, high, factor = (c.rope_scaling[f"{key}factor"] for key in ("low_freq_", "high_freq_", ""))
        divisors = []
        for i in range(0, c.head_dim, 2):
            turns = 8192 / (2 * math.pi * c.rope_theta ** (i / c.head_dim))
            smooth = (turns - low) / (high - low)
            divisors.append(factor if turns < low else 1.0 if turns > high else 1 / ((1 - smooth) / factor + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def model_of(**changes):
    return tiny(vocab_size=512, hidden_size=64, intermediate_size=96, num_key_value_heads=2, rope_theta=5e4,
                rms_norm_eps=1e-5, **changes)


@pytest.mark.parametrize("kind", [None, "Q8_0", "Q4_1"])
def test_a_random_llama_is_read_back(tmp_path, kind):
    gguf, model = pytest.importorskip("gguf"), model_of()
    expected = write(tmp_path / "a.gguf", model, kind and gguf.GGMLQuantizationType[kind])
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.write(tmp_path / "a.gguf", "package/a.gguf")
    assert "2 layers of width 64" in here("-m", "tools.gguf", tmp_path / "a.whl", tmp_path / "out").stdout
    found = Llama.from_pretrained(tmp_path / "out")
    assert found.config == model.config.__class__(**{**vars(model.config), "bos_token_id": 1, "eos_token_id": 2,
                                                     "pad_token_id": 0})
    torch.testing.assert_close(dict(found.state_dict()), expected, rtol=0, atol=0)
    ours, original = (Tokenizer.from_pretrained(folder) for folder in (tmp_path / "out", BASE))
    assert [ours.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == [original.decode(original.encode(text))
                                                                  for text in TEXTS]
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["chat_template"] == "{{ messages[0].content }}" and told["eos_token"] == "</s>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_31s_rope_is_found_in_its_divisors(tmp_path, dtype):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    write(tmp_path / "a.gguf", model_of(rope_scaling=rope))
    here("-m", "tools.gguf", tmp_path / "a.gguf", tmp_path / "out", "--dtype", dtype)
    found = Llama.from_pretrained(tmp_path / "out", dtype=None)
    assert found.config.rope_scaling == rope and found.lm_head.weight.dtype == getattr(torch, dtype)


def test_transformers_reads_the_file_as_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "a.gguf", model_of())
    here("-m", "tools.gguf", tmp_path / "a.gguf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(ids), theirs(ids).logits)


@needs_real
def test_sentencepiece_is_rebuilt_from_its_scores():
    """A SentencePiece BPE gives a piece the negative of its rank, in which tokenizer.json lists the merges."""
    tokens, types, merges = vocabulary(TINY)
    rank = {pair.replace(" ", ""): -i for i, pair in reversed(list(enumerate(merges)))}
    fast = tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in {
        "model": "llama", "tokens": tokens, "token_type": types, "scores": [rank.get(t, -1e9) for t in tokens],
        "unknown_token_id": 0, "bos_token_id": 1}.items()})
    original = Tokenizer.from_pretrained(TINY)
    for text in [*TEXTS, "Once upon a time, there was a little girl."]:
        assert fast.encode(text).ids == original.fast.encode(text).ids
    assert fast.decode(fast.encode(text).ids[1:]) == text


def test_llama_3_splits_digits_by_threes_and_contractions():
    letters = [chr(i) for i in range(33, 127)] + ["Ġ"]
    words = ["123", "12", "'ll", "Ġwe", "we", "Ġw", "we'll"]
    fast = tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in {
        "model": "gpt2", "pre": "llama-bpe", "tokens": letters + words, "token_type": [1] * len(letters + words),
        "merges": ["1 2", "12 3", "Ġ w", "Ġw e", "w e"]}.items()})
    assert fast.encode("1234 we'll").tokens == ["123", "4", "Ġwe", "'ll"]


def test_what_is_no_llama_is_refused_in_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert "pip install gguf" in one_line_error("-m", "tools.gguf", tmp_path / "a.gguf", tmp_path / "out")
    pytest.importorskip("gguf")
    refused = lambda file: one_line_error("-m", "tools.gguf", file, tmp_path / "out")
    assert "does not exist" in refused(tmp_path / "none.gguf") or "No such file" in refused(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    assert "text.gguf cannot be read" in refused(tmp_path / "text.gguf")
    write(tmp_path / "qwen.gguf", model_of(), architecture="qwen2")
    assert "architecture 'qwen2'" in refused(tmp_path / "qwen.gguf")
    write(tmp_path / "part.gguf", model_of(), split__count=3)
    assert "one of 3 split files" in refused(tmp_path / "part.gguf")
    write(tmp_path / "moe.gguf", model_of(), llama__expert_count=8)
    assert "with experts" in refused(tmp_path / "moe.gguf")
    (tmp_path / "out").mkdir()
    assert "exists: choose another folder" in refused(tmp_path / "part.gguf")
