"""A run as other programs read it.

    python -m tools.export out/multilora --hf merged        # a plain checkpoint for transformers
    python -m tools.export out/multilora --peft adapter     # MultiLoRA, LoRA: a PEFT LoRA adapter of rank n r
"""

import os
import shutil
from pathlib import Path

import torch

from data import Tokenizer
from engine.checkpoint import save_tensors
from engine.flags import Parser, command_line
from formats import choose
from formats.templates import chat_template
from model import UserError, checkpoint_files, read_json, read_tensor, tensor_files, write_json
from train import load_run


def save_merged(run, base, out):
    """A plain checkpoint with the adapter folded in, in the base's dtype, tokenizer files beside it. transformers
    chats with it in the template that the run was trained with, and stops where an answer ends."""
    model, adapter, saved = load_run(run, base=base)
    checkpoint = Path(base or saved["asked"]["settings"]["base"])
    adapter.merge()
    name, file = next(iter(tensor_files(checkpoint).items()))
    dtype = read_tensor(file, name).dtype
    model.to(dtype).save_pretrained(out)
    for file in checkpoint_files(checkpoint):
        # chat_template.json is not read by transformers beside a tokenizer
        if file.suffix != ".safetensors" and file.name not in ("config.json", "chat_template.json"):
            shutil.copyfile(file, out / file.name)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    template, source = choose(saved["template"], tokenizer, checkpoint)
    changes = {"generation_config.json": {"eos_token_id": sorted(tokenizer.stop_ids)}}
    if saved["template"] != chat_template(out):
        (out / "chat_template.jinja").unlink(missing_ok=True)
        changes["tokenizer_config.json"] = {"chat_template": template.exported()}
    for file, values in changes.items():
        write_json(out / file, {**(read_json(out / file) if (out / file).exists() else {}), **values})
    return f"a plain checkpoint, {str(dtype)[6:]}, with the chat template that it was trained with"


@torch.no_grad()
def save_peft(run, base, out):
    """A standard PEFT LoRA adapter: A_i stacked, (alpha / r) s_i * B_i side by side, and a scaling of one. Exact, since
    the n modules are one pair of matrix products anyway."""
    _, adapter, saved = load_run(run, base=base)
    if not hasattr(adapter, "deltas"):
        raise UserError(f"{run}: only MultiLoRA and LoRA are a LoRA adapter, and {saved['method']!r} is not")
    tensors = {}
    for name, linear in adapter.linears.items():
        down, up = linear.multilora.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    rank = len(down)
    save_tensors(out / "adapter_model.safetensors", tensors)
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base or saved["asked"]["settings"]["base"]), "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in adapter.linears})})
    return f"a PEFT LoRA adapter of rank {rank} for {len(adapter.linears)} layers"


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder, such as out/multilora")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="write a plain checkpoint")
    parser.add_argument("--peft", type=Path, metavar="DIR", help="write a PEFT LoRA adapter")
    parser.add_argument("--base", type=Path, help="where the run's base lies now; default: where it was")
    args = parser.parse_args()
    if bool(args.hf) + bool(args.peft) != 1:
        raise UserError("give one of --hf DIR and --peft DIR")
    out = args.hf or args.peft
    if out.exists():  # an empty folder, too, which Windows does not replace
        raise UserError(f"{out} is there already: name a new folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")  # becomes `out` when it is whole
    try:
        what = (save_merged if args.hf else save_peft)(args.run, args.base, part)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {what}")


if __name__ == "__main__":
    command_line(main)
