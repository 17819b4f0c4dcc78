"""Turns a GGUF file of a Llama, as llama.cpp, Ollama and LM Studio have it, into a Hugging Face folder.

    pip install gguf && python -m tools.gguf FILE FOLDER

Quantised weights are read as the numbers that they stand for. FILE may also be a .whl or .zip that holds one .gguf.
"""

import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from engine.flags import Parser, command_line
from model import Llama, LlamaConfig, UserError, reading, rope_frequencies, write_json

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
UNKNOWN, CONTROL, ADDED = 2, 3, 4  # types of a token; the first two are special
# What splits a text before byte pairs are merged, by the name that GGUF gives it.
SPLITS = {"smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
          "llama-bpe": [pre_tokenizers.Split(Regex(
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]}


def unpacked(file, folder):
    """Path of the .gguf itself, which is put into the folder where a .whl or .zip holds it."""
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise UserError(f"{file} holds {len(inside)} .gguf files, expected one")
        return archive.extract(inside[0], folder)


def read(gguf, file, dtype):
    """({key: value} of the metadata, {name: tensor}) of a .gguf, read by the package gguf, and closed again. All but
    the RoPE's divisors, which are no weights, are of this dtype."""
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}, {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(
            torch.float32 if tensor.name == "rope_freqs.weight" else dtype) for tensor in reader.tensors}


def config_of(facts, tensors):
    """LlamaConfig from the metadata {key: value}. Raises ValueError for what is no plain Llama."""
    kind, of = facts["general.architecture"], lambda key, *default: facts.get(f"llama.{key}", *default)
    if kind != "llama" or of("expert_count", 0):
        raise ValueError(f"architecture {kind!r}{' with experts' * (kind == 'llama')}, expected a dense 'llama'")
    if facts.get("split.count", 0) > 1:
        raise ValueError(f"one of {facts['split.count']} split files: merge them with llama-gguf-split first")
    heads = of("attention.head_count")
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]), hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"), num_hidden_layers=of("block_count"), num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads), head_dim=of("attention.key_length", None),
        rms_norm_eps=float(f'{of("attention.layer_norm_rms_epsilon"):.6g}'), rope_theta=of("rope.freq_base", 10000.0),
        max_position_embeddings=of("context_length"), tie_word_embeddings="output.weight" not in tensors,
        **{f"{name}_token_id": facts.get(f"tokenizer.ggml.{key}_token_id")
           for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))})
    if of("rope.scaling.type", "none") == "linear":
        config.rope_scaling = {"rope_type": "linear", "factor": of("rope.scaling.factor")}
    elif of("rope.scaling.type", "none") != "none":
        raise ValueError(f"RoPE scaling {of('rope.scaling.type')!r}, expected none or linear")
    if "rope_freqs.weight" in tensors:  # Llama 3.1 and later; GGUF keeps what each frequency is divided by
        divisors, plain = tensors.pop("rope_freqs.weight"), rope_frequencies(config)
        config.rope_scaling = {"rope_type": "llama3", "factor": divisors.max().item(), "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if not torch.allclose(rope_frequencies(config), plain / divisors, rtol=1e-4):
            raise ValueError("rope_freqs.weight is not of Llama 3.1's rule")
    return config


def weight(name, tensor, config):
    """(Hugging Face's name, tensor). llama.cpp keeps the two channels of a rotary pair beside each other in q and k;
    here they are half a head apart."""
    *layer, kind, part = name.removeprefix("blk.").split(".")
    if kind in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        tensor = tensor.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return ".".join((*(f"model.layers.{i}" for i in layer), NAMES[kind], part)), tensor


def pairs(scores):
    """The merges of a SentencePiece vocabulary {piece: score}, in the order in which it makes them: the best piece
    first, from each two pieces that give it."""
    order = {piece: i for i, piece in enumerate(scores)}
    found = [(piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece))
             if piece[:i] in scores and piece[i:] in scores]
    return sorted(found, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1]), *map(order.get, pair)))


def tokenizer_of(facts):
    """The tokenizer that the metadata describe: byte-level BPE (kind `gpt2`) or SentencePiece BPE (kind `llama`)."""
    of = lambda key, *default: facts.get(f"tokenizer.ggml.{key}", *default)
    tokens, kind, split = of("tokens"), of("model"), of("pre", None)
    ids = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2" and split in SPLITS:
        fast = FastTokenizer(models.BPE(ids, [tuple(pair.split(" ")) for pair in of("merges")],
                                        ignore_merges=split == "llama-bpe"))
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(SPLITS[split]), decoders.ByteLevel()
    elif kind == "llama":
        fast = FastTokenizer(models.BPE(ids, pairs(dict(zip(tokens, of("scores")))), byte_fallback=True, fuse_unk=True,
                                        unk_token=tokens[of("unknown_token_id", 0)]))
        begin = [normalizers.Prepend("▁")] if of("add_space_prefix", True) else []
        fast.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                          *([decoders.Strip(" ", 1, 0)] if begin else [])])
    else:
        raise ValueError(f"tokenizer of kind {kind} {split or ''}, expected llama, or gpt2 with {' or '.join(SPLITS)}")
    found = lambda *types: [AddedToken(token, normalized=False)
                            for token, of_type in zip(tokens, of("token_type")) if of_type in types]
    fast.add_special_tokens(found(UNKNOWN, CONTROL))
    fast.add_tokens(found(ADDED))
    if of("add_bos_token", kind == "llama"):
        bos = tokens[of("bos_token_id")]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, of("bos_token_id"))])
    return fast


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help=".gguf, or a .whl or .zip that holds one")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="stored as (%(default)s)")
    args = parser.parse_args()
    import gguf
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: choose another folder")
    with tempfile.TemporaryDirectory() as folder, reading(args.file):
        facts, tensors = read(gguf, unpacked(args.file, folder), getattr(torch, args.dtype))
        config = config_of(facts, tensors)
        with torch.device("meta"):
            model = Llama(config)
        if absent := [name for name in tensors if name.split(".")[-2] not in NAMES]:
            raise ValueError(f"tensor {absent[0]!r} has no place in a Llama")
        state = dict(weight(*item, config) for item in tensors.items())
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        fast = tokenizer_of(facts)
        special = {f"{name}_token": fast.id_to_token(getattr(config, f"{name}_token_id"))
                   for name in ("bos", "eos", "pad") if getattr(config, f"{name}_token_id") is not None}
        template = facts.get("tokenizer.chat_template")
        model.save_pretrained(args.folder)
        fast.save(str(args.folder / "tokenizer.json"), pretty=False)
        write_json(args.folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special,
            **({"chat_template": template} if template else {})})
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.folder}: {size:,} parameters, {config.num_hidden_layers} layers of width {config.hidden_size}, "
          f"{config.vocab_size:,} tokens, {'with' if template else 'without'} a chat template")


if __name__ == "__main__":
    command_line(main)
