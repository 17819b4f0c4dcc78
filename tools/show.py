"""What data look like, and what is trained on: of files, or of the built-in suite.

    python -m tools.show                                    # the built-in suite, 2,000 examples of each task
    python -m tools.show BoolQ/val.jsonl gsm8k/train.jsonl  # any file that train.py --data takes
    python -m tools.show --formats                          # what records of such files may hold
"""

import json
from pathlib import Path

from base import suite
from data import Tokenizer, encode, exact
from engine.flags import Parser, command_line
from formats import FORMATS, TEMPLATES, choose, read_files
from model import UserError


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


def show_table(tasks, tokenizer, longest):
    """Prints a row for each task of {name: (kind, score, [Example])}."""
    line = "{:<23} {:<12}{:<8}{:>7}{:>8}{:>8}{:>8}{:>7}  {}".format
    print("\n" + line("task", "kind", "scored", "rows", "tokens", "longest", "trained", f">{longest:,}", "the first"))
    for name, (kind, score, examples) in tasks.items():
        encoded = encode(examples, tokenizer, [name])
        tokens = [len(e.ids) for e in encoded]
        trained = sum(label != -100 for e in encoded for label in e.labels)
        said = " -> ".join(s.text for s in examples[0].segments if s.role)
        print(line(name, kind, score.name, len(tokens), f"{sum(tokens) / len(tokens):.1f}", max(tokens),
                   f"{trained / len(tokens):.1f}", sum(n > longest for n in tokens), repr(said)[1:-1][:80]))


def show_formats():
    """The table of formats, in the order in which they are tried, with a record of each."""
    print("| format | its records hold | scored by | for example |\n|---|---|---|---|")
    for name, kind in FORMATS.items():
        print(f"| `{name}` | {kind.fields} | {kind.score.name} | `{json.dumps(kind.sample)}` |")
    print("\nFiles are JSON arrays, JSON lines or CSV, in UTF-8 or UTF-16, packed by gzip or not.\nTemplates: "
          + ", ".join(TEMPLATES))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="[NAME=]FILE", help="any file that train.py --data takes")
    parser.add_argument("--formats", action="store_true", help="list what records may hold")
    parser.add_argument("--base", default="base", help="checkpoint folder whose tokenizer counts (%(default)s)")
    parser.add_argument("--template", default="auto", help="as in train.py")
    parser.add_argument("--max-length", type=int, default=512, help="count examples of more tokens (%(default)s)")
    args = parser.parse_args()
    if args.formats:
        return show_formats()
    tokenizer = Tokenizer.from_pretrained(args.base)
    template, source = choose(args.template, tokenizer, Path(args.base))
    print(f"template: {source}")
    if args.files:
        tasks = {name: (kind, FORMATS[kind].score, rows) for name, (kind, rows) in read_files(args.files).items()}
    else:
        tasks = {name: (kind, exact, suite.generate(name, "train")[:2000]) for name, (kind, _) in suite.TASKS.items()}
    tasks = {name: (kind, score, [one for row in rows for one in template.answers(row)])
             for name, (kind, score, rows) in tasks.items()}
    if untrained := [name for name, (*_, examples) in tasks.items() if not examples]:
        raise UserError(f"no answer of {untrained[0]} is to be trained on: all rows have weight 0, train false or "
                        "another such mark")
    show_table(tasks, tokenizer, args.max_length)
    print("\nThe first example of each task: what is said, then token by token; [brackets] mark what is trained on.")
    for name, (_, _, (first, *_)) in tasks.items():
        print(f"\n  {name}\n{as_text(first)}\n\n    {as_tokens(encode([first], tokenizer, [name])[0], tokenizer)}")


if __name__ == "__main__":
    command_line(main)
