"""Talk to a checkpoint, with or without a run's adapter.

    python -m tools.chat base "What is 21 + 34?"                        # one answer
    python -m tools.chat base --adapter out/multilora                   # a conversation; an empty line ends it, /base
                                                                        # switches the adapter off, and on again
    python -m tools.chat LLAMA --prompts alpaca_eval.json --outputs model_outputs.json --max-new-tokens 512
"""

import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from data import Example, Segment, Tokenizer, in_batches
from engine.flags import Parser, command_line
from formats import choose, read_records
from model import Llama, UserError, reading, write_json
from train import device_and_dtype, load_run


def read_prompts(file):
    """[(record, its segments)] of a file of instructions, AlpacaEval's say."""
    found = []
    for line, record, error in read_records(file):
        with reading(f"{file}:{line}"):
            if error or not record["instruction"]:
                raise UserError(f"{file}:{line}: {error or 'the instruction is empty'}")
            said = Segment(record["instruction"], "user"), Segment(record.get("input") or "", "input")
            found.append((record, [s for s in said if s.text]))
    if not found:
        raise UserError(f"{file} holds no records")
    return found


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder in Hugging Face layout, such as base")
    parser.add_argument("prompt", nargs="?", help="default: a conversation")
    parser.add_argument("--adapter", metavar="RUN", help="finished run of train.py on this checkpoint")
    parser.add_argument("--prompts", metavar="FILE", help="answer the instruction of each record of a file")
    parser.add_argument("--outputs", type=Path, default="model_outputs.json", help="AlpacaEval's JSON (%(default)s)")
    parser.add_argument("--generator", help="name of the answerer in there; default: run folder or checkpoint")
    parser.add_argument("--template", help="as in train.py; default: the run's, the checkpoint's or plain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="as in train.py, and so is --dtype")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    warm = args.temperature == 0 or 0.01 <= args.temperature <= 100
    if args.max_new_tokens < 1 or not warm or not 0 <= args.seed < 2**63:
        raise UserError("expected --max-new-tokens from 1, --temperature 0 or from 0.01 to 100, --seed from 0 to 9e18")
    if args.prompt is not None and args.prompts:
        raise UserError('give one of "prompt" and --prompts FILE')
    if args.prompts and args.outputs.exists():
        raise UserError(f"--outputs {args.outputs} is there already: name a new file")

    device, dtype = device_and_dtype(args)
    base = cache(lambda: Llama.from_pretrained(args.checkpoint, device, dtype))
    model, _, saved = load_run(args.adapter, device, dtype, args.checkpoint) if args.adapter else (base(), None, {})
    speaker = model
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    template, _ = choose(args.template or saved.get("template", "auto"), tokenizer, args.checkpoint)
    source = torch.Generator(device).manual_seed(args.seed)
    room = model.config.max_position_embeddings - args.max_new_tokens
    if room < 2:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt: this model has "
                        f"{model.config.max_position_embeddings} positions")

    def tokens(segments):
        with reading("the prompt"):
            return tokenizer.encode_segments(template.apply(Example("", segments)).segments)[0]

    def complete(prompts):
        with speaker.autocast():
            return speaker.generate(prompts, args.max_new_tokens, tokenizer.stop_ids, args.temperature, source)

    def answer(segments):
        """Prints the answer to a conversation, and its speed; returns its text."""
        prompt, start = tokens(segments), time.perf_counter()
        if len(prompt) > room:
            raise UserError(f"the prompt has {len(prompt)} tokens, and there is room for {room} before the answer")
        new = complete([prompt])[0]
        text, seconds = tokenizer.decode(new), time.perf_counter() - start
        print(text)
        print(f"[{len(prompt)} prompt tokens, {len(new)} new tokens, {len(new) / seconds:.0f} tokens/s on {device}]")
        return text

    if args.prompts:
        records, asked = zip(*read_prompts(args.prompts))
        prompts = list(map(tokens, asked))
        if long := sum(len(prompt) > room for prompt in prompts):
            print(f"{long} prompts are longer than {room} tokens: cut behind their first token")
        prompts = [prompt[:1] + prompt[1:][-(room - 1) :] for prompt in prompts]
        answers = in_batches(complete, prompts, 32, len, "answers, batch")
        write_json(args.outputs, [{"dataset": r.get("dataset") or Path(args.prompts).stem,
                                   "instruction": r["instruction"], "output": tokenizer.decode(new).strip(),
                                   "generator": args.generator or str(args.adapter or args.checkpoint)}
                                  for r, new in zip(records, answers)])
        return print(f"{args.outputs}: {len(records)} answers")
    if args.prompt is not None:
        return answer([Segment(args.prompt, "user")])
    said = []
    with suppress(EOFError):
        while line := input("> ").strip():
            if line == "/base":
                speaker = base() if speaker is model else model
                print("[the base]" if speaker is base() else "[with the adapter]")
                continue
            said.append(Segment(line, "user"))
            said.append(Segment(answer(said), "assistant"))


if __name__ == "__main__":
    command_line(main)
