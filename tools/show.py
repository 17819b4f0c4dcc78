"""What data look like, and what is trained on: of files, or of the built-in suite.

    python -m tools.show                                    # the built-in suite
    python -m tools.show BoolQ/val.jsonl gsm8k/train.jsonl  # any file that train.py --data takes
    python -m tools.show --formats                          # what records of such files may hold
"""

from pathlib import Path

from base import suite
from data import Tokenizer, encode
from engine.flags import Parser, command_line
from formats import FORMATS, SCORED, TEMPLATES, choose, named, read_files


def as_text(example):
    """One example without markup, a line for each thing said, and for its choices."""
    said = [(f"{s.role}:", s.text) for s in example.segments if s.role]
    said += [("choices:", " | ".join(map(str.strip, example.choices)))] if example.choices else []
    return "\n".join(f"    {who:<11}" + text.replace("\n", "\n" + " " * 15) for who, text in said)


def as_tokens(encoded, tokenizer):
    """One example, token by token: tokens in brackets are trained on. Tokens that are parts of one character stand
    together, with "+" and their number."""
    pieces, part = [], []
    for i, label in zip(encoded.ids, encoded.labels):
        part.append(i)
        text = tokenizer.fast.decode(part, skip_special_tokens=False)
        if "\ufffd" in text and len(part) < 4:  # not a whole character yet
            continue
        text = repr(text)[1:-1] + f"+{len(part)}" * (len(part) > 1)
        pieces, part = [*pieces, f"[{text}]" if label != -100 else text], []
    return " ".join(pieces)


def sizes(encoded):
    """(mean and largest number of tokens, mean number of trained ones)"""
    tokens = [len(e.ids) for e in encoded]
    trained = sum(label != -100 for e in encoded for label in e.labels)
    return f"{sum(tokens) / len(tokens):.1f}", max(tokens), f"{trained / len(tokens):.1f}"


def show_formats():
    """The table of formats, in the order in which they are tried."""
    print("| format | its records hold | scored by |\n|---|---|---|")
    for name, kind in FORMATS.items():
        print(f"| `{name}` | {kind.fields} | {SCORED[kind.score]} |")
    print("\nFiles are JSON arrays, JSON lines or CSV, in UTF-8 or UTF-16, packed by gzip or not.\nTemplates: "
          + ", ".join(f"`{name}`" for name in TEMPLATES))


def show_files(args, tokenizer):
    """Prints a row for each task; returns {task: its first Example}."""
    name, source = choose(args.template, tokenizer, Path(args.base))
    print(f"template {name}: {source}")
    template, shown = named(name), {}
    tasks = read_files(args.files, args.skip_bad_rows, args.ignore_fields)
    line = "{:<23} {:<9}{:<8}{:>7}{:>8}{:>8}{:>8}{:>7}".format
    print("\n" + line("task", "format", "scored", "rows", "tokens", "longest", "trained", f">{args.max_length:,}"))
    for name, (kind, rows) in tasks.items():
        examples = [template.apply(row) for row in rows]
        encoded = encode(examples, tokenizer, [name])
        print(line(name, kind, FORMATS[kind].score.__name__, len(rows), *sizes(encoded),
                   sum(len(e.ids) > args.max_length for e in encoded)))
        shown[name] = examples[0]
    return shown


def show_suite(tokenizer):
    """The same for the built-in tasks; lengths are those of the first 1,000 training examples."""
    line = "{:<12}{:<9}{:<13}{:>7}{:>7}{:>6}{:>8}{:>9}{:>9}   {}".format
    print(line("task", "group", "aspect", "train", "valid", "test", "tokens", "longest", "trained",
               "first training example"))
    for name, (aspect, _) in suite.TASKS.items():
        splits = {split: suite.generate(name, split) for split in suite.SPLITS}
        said = [s.text for s in splits["train"][0].segments if s.role]
        group = "general" if name in suite.GENERAL else "hard" if name in suite.HARD else "new"
        print(line(name, group, aspect, *map(len, splits.values()),
                   *sizes(encode(splits["train"][:1000], tokenizer, [name])), " -> ".join(said)))
    return {name: suite.generate(name, "train")[0] for name in (next(iter(suite.NEW)), next(iter(suite.GENERAL)))}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="[NAME=]FILE", help="any file that train.py --data takes")
    parser.add_argument("--formats", action="store_true", help="list what records may hold")
    parser.add_argument("--base", default="base", help="checkpoint folder whose tokenizer counts (%(default)s)")
    parser.add_argument("--template", choices=("auto", *TEMPLATES), default="auto", help="as in train.py")
    parser.add_argument("--skip-bad-rows", action="store_true", help="count rows that their format does not take")
    parser.add_argument("--ignore-fields", nargs="+", default=[], metavar="FIELD", help="as in train.py")
    parser.add_argument("--max-length", type=int, default=512, help="count examples of more tokens (%(default)s)")
    args = parser.parse_args()
    if args.formats:
        return show_formats()
    tokenizer = Tokenizer.from_pretrained(args.base)
    shown = show_files(args, tokenizer) if args.files else show_suite(tokenizer)
    print("\nThe first example of each task: what is said, then token by token; [brackets] mark what is trained on.")
    for name, example in shown.items():
        print(f"\n  {name}\n{as_text(example)}\n\n    {as_tokens(encode([example], tokenizer, [name])[0], tokenizer)}")


if __name__ == "__main__":
    command_line(main)
