"""Makes the built-in base from nothing: a tokenizer, random weights, and the shared loop on the general tasks.

    python -m tools.pretrain --overwrite

It replaces the files of the model, of the tokenizer and in `base/pretraining/`; the tasks stay.
"""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from base import suite as builtin
from data import Tokenizer, encode_suite
from engine.flags import Parser, add_flags, check, command_line, program
from engine.folder import RunFolder, provenance
from formats.templates import Template, dress
from model import Adapter, Llama, LlamaConfig, UserError, write_json, written
from train import Config, device_and_dtype, learn

FLAGS = ("steps", "batch_size", "lr", "weight_decay", "seed", "device", "dtype", "eval_limit", "out", "overwrite")
DEFAULTS = Config(steps=3600, batch_size=96, lr=2e-3, weight_decay=0.1, samples=0, out="base")


def train_tokenizer(examples):
    """A byte-level BPE of 512 entries. Each digit stays a token of its own: merged digits would make arithmetic a
    different, much harder task."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        ("### Instruction:\n{}\n\n### Response:\n{}".format(*(s.text for s in e.segments)) for e in examples),
        trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(fast, bos_id=1, eos_id=2, pad_id=0, stop_ids={2},
                     names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})


def init_weights(model, seed):
    """Fresh weights: normal(0, 0.02), the two projections that write to the residual stream smaller by 1/sqrt(2 L)
    (GPT-2's rule), norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.constant_(p, float(name.endswith("norm.weight")))
        else:
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if out else 0.02
            nn.init.normal_(p, std=std, generator=generator)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser, DEFAULTS, FLAGS)
    config = replace(DEFAULTS, **vars(parser.parse_args()))
    check(config)
    device, dtype = device_and_dtype(config)
    out = Path(config.out)
    if (out / "config.json").exists() and not config.overwrite:
        raise UserError(f"{out} holds a checkpoint already: choose another --out, or add --overwrite to replace it")
    suite = builtin.load("general", config.eval_split, config.eval_limit)
    tokenizer = train_tokenizer(suite.train)
    model = Llama(LlamaConfig(
        vocab_size=tokenizer.size, hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
        rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id))
    init_weights(model, config.seed)
    model.to(device)
    model.dtype = dtype  # of the computation; what is trained stays float32
    record = out / "pretraining"  # beside the checkpoint, whose own config.json is Hugging Face's
    template = Template("short", tokenizer)
    suite = encode_suite(dress(suite, template), tokenizer, config.max_length)
    results = learn(config, model, Adapter(model), suite, tokenizer, RunFolder(record))
    model.save_pretrained(out)
    with written(out / "tokenizer.json") as part:
        part.write_text(tokenizer.fast.to_str(pretty=True), encoding="utf-8")
    write_json(out / "tokenizer_config.json", {  # as transformers reads it
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokenizer.names,
        "chat_template": template.exported()})
    write_json(record / "config.json", {"settings": asdict(config), "tasks": suite.names,
                                        **provenance(["-m", program(), *sys.argv[1:]])})
    write_json(record / "results.json", results)


if __name__ == "__main__":
    command_line(main)
