"""Talk to a checkpoint, with or without a run's adapter.

    python -m tools.chat base "What is 21 + 34?"                        # one answer
    python -m tools.chat base --adapter out/multilora                   # a conversation; an empty line ends it, /base
                                                                        # switches the adapter off, and on again
    python -m tools.chat LLAMA --prompts alpaca_eval.json --outputs model_outputs.json --max-new-tokens 512
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from data import Example, Segment, Tokenizer, encode
from engine.flags import Parser, command_line
from formats import TEMPLATES, choose, named, read_records
from formats.known import text_of
from model import Llama, UserError, write_json
from train import load_run, place


def answer_all(tokenizer, tokens, file, out, complete, room, generator, batch=32):
    """Answers the `instruction` of every record of a file; writes AlpacaEval's JSON, in the file's order.

    tokens(segments) -> prompt ids; complete(prompts) -> lists of new ids. Prompts of more than `room` tokens lose those
    behind their first one.
    """
    if out.exists():
        raise UserError(f"--outputs {out} is there already: name a new file")
    out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for line, record, error in read_records(file):
        try:
            if error or type(record) is not dict:
                raise UserError(error or "no object with named fields")
            for name in ("instruction", *(n for n in ("input", "dataset") if record.get(n))):
                text_of(record, name)
        except UserError as error:
            raise UserError(f"{file}:{line}: {error}") from None
        records.append(record)
    said = [[Segment(r["instruction"], "user"), *([Segment(r["input"], "input")] if r.get("input") else [])]
            for r in records]
    prompts = [tokens(segments) for segments in said]
    if long := sum(len(p) > room for p in prompts):
        print(f"{long} prompts are longer than {room} tokens: cut", file=sys.stderr)
    prompts = [p[:1] + p[1:][-(room - 1) :] for p in prompts]
    order, answers, start = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}, time.perf_counter()
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        answers.update(zip(part, complete([prompts[i] for i in part])))
        seconds = time.perf_counter() - start
        print(f"{len(answers)}/{len(order)} answers, ETA {seconds / len(answers) * (len(order) - len(answers)):.0f} s",
              file=sys.stderr)
    write_json(out, [{"dataset": r.get("dataset") or Path(file).stem, "instruction": r["instruction"],
                      "output": tokenizer.decode(answers[i]).strip(), "generator": generator}
                     for i, r in enumerate(records)])
    print(f"{out}: {len(records)} answers")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder in Hugging Face layout, such as base")
    parser.add_argument("prompt", nargs="?", help="default: a conversation")
    parser.add_argument("--adapter", metavar="RUN", help="finished run of train.py on this checkpoint")
    parser.add_argument("--prompts", metavar="FILE", help="answer the instruction of each record, AlpacaEval's say")
    parser.add_argument("--outputs", type=Path, default="model_outputs.json", help="where to (%(default)s)")
    parser.add_argument("--generator", help="name of the answerer in there; default: run folder or checkpoint")
    parser.add_argument("--template", choices=TEMPLATES, help="default: the run's, the checkpoint's or plain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="as in train.py, and so is --dtype")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    if args.prompt is not None and args.prompts:
        raise UserError('give one of "prompt" and --prompts FILE')
    if args.max_new_tokens < 1 or not (args.temperature == 0 or 0.01 <= args.temperature <= 100):
        raise UserError("--max-new-tokens must be at least 1, --temperature 0 or from 0.01 to 100")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed!r:.80}, expected from 0 to 9e18")

    text_of({"prompt": args.prompt or ""}, "prompt", empty=True)

    saved, (device, dtype) = {}, place(args)
    if args.adapter:
        model, _, _, saved = load_run(args.adapter, device, dtype, args.checkpoint)
    else:
        model = Llama.from_pretrained(args.checkpoint, device, dtype)
    speakers = [model]  # the first one answers
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    template = named(choose(args.template or saved.get("template", "auto"), tokenizer, args.checkpoint)[0])
    source = torch.Generator(device).manual_seed(args.seed)
    room = model.config.max_position_embeddings - args.max_new_tokens
    if room < 2:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt: this model has "
                        f"{model.config.max_position_embeddings} positions")

    def tokens(segments):
        return encode([template.apply(Example("", segments))], tokenizer, [""])[0].ids

    def complete(prompts):
        model = speakers[0]
        with model.autocast():
            return model.generate(prompts, args.max_new_tokens, tokenizer.stop_ids, args.temperature, source)

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
        return answer_all(tokenizer, tokens, args.prompts, args.outputs, complete, room,
                          args.generator or str(args.adapter or args.checkpoint))
    if args.prompt is not None:
        answer([Segment(args.prompt, "user")])
        return
    said = []
    with suppress(EOFError):
        while line := input("> ").strip():
            if line == "/base":
                if args.adapter and len(speakers) == 1:
                    speakers.append(Llama.from_pretrained(args.checkpoint, device, dtype))
                speakers.reverse()
                print("[with the adapter]" if args.adapter and speakers[0] is model else "[the base]")
                continue
            said.append(Segment(line, "user"))
            said.append(Segment(answer(said), "assistant", trained=True))


if __name__ == "__main__":
    command_line(main)
