"""Scores a base model or a finished run, and trains nothing.

    python -m tools.score out/multilora                                        # a run, on the data of its table
    python -m tools.score CHECKPOINT --eval-data piqa.jsonl gsm8k/test.jsonl   # a base, on files
    python -m tools.score out/multilora --eval-data mmlu/test/*.csv --shot-data mmlu/dev/*.csv --shots 5
"""

import time
from dataclasses import replace
from pathlib import Path

import data
from engine import devices
from engine.flags import Parser, add_flags, check, command_line
from engine.folder import peak_memory
from engine.table import print_table, summary
from model import UserError, read_json, reading, write_json
from train import Config, device_and_dtype, load_data, load_run

OF_TRAIN = ("choices", "template", "max_length", "max_new_tokens", "tasks", "batch_size", "device", "dtype",
            "eval_split", "eval_limit", "shard")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="BASE_OR_RUN", help="checkpoint or finished run folder")
    parser.add_argument("--eval-data", nargs="+", default=[], metavar="FILE",
                        help="files to score on; default: a run's own test data, else the built-in suite")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of each question (%(default)s)")
    parser.add_argument("--shot-data", nargs="+", default=[], metavar="FILE",
                        help="files of solved examples, matched to tasks by name")
    parser.add_argument("--base", help="where the run's base lies now; default: where it was")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    like_train = parser.add_argument_group("as in train.py; None: as the run has it")
    add_flags(like_train, Config(), OF_TRAIN)
    like_train.set_defaults(**dict.fromkeys(OF_TRAIN))
    devices.init()
    args = parser.parse_args()
    if args.shots < 0 or bool(args.shots) != bool(args.shot_data) or args.shots and not args.eval_data:
        raise UserError("--shots N, --shot-data and --eval-data go together")

    settings, file = {"base": str(args.model)}, args.model / "config.json"
    run = read_json(file)
    with reading(file):
        if is_run := "asked" in run:
            settings = run["asked"]["settings"] | ({"base": args.base} if args.base else {})
        if args.eval_data:
            settings |= {"data": [], "eval_data": args.eval_data, "general_data": [], "mix": "proportional",
                         "tasks": "all", "eval_split": "test", "eval_every": 0,
                         "template": run["template"] if is_run else "auto"}
        config = Config(**settings)
    config = replace(config, **{name: getattr(args, name) for name in OF_TRAIN if getattr(args, name) is not None})
    check(config)
    device, dtype = device_and_dtype(config)
    if is_run:
        model = load_run(args.model, device, dtype, args.base, config.shard)[0]
    else:
        model = devices.load(args.model, device, dtype, config.shard)
    suite, tokenizer, _ = load_data(config, train=False, shots=args.shots, shot_files=args.shot_data)
    start = time.perf_counter()
    scores = data.evaluate(model, suite, tokenizer, config.batch_size, config.max_new_tokens)
    results = {"model": str(args.model), "eval_split": config.eval_split, **summary(suite, scores, scores),
               "seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(device)}
    print_table(results)
    if args.json and devices.is_main():
        write_json(args.json, results)
    devices.end()


if __name__ == "__main__":
    command_line(main)
