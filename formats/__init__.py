"""From files to examples: `load(files, ...)` gives the Suite of a run.

`files.py` reads records, `known.py` knows what a record means and how its task is scored, `templates.py` puts a prompt
template around it.
"""

import re
from dataclasses import replace
from pathlib import Path

from data import Suite
from formats.files import read_records
from formats.known import FORMATS
from formats.templates import TEMPLATES, named
from model import UserError

__all__ = ["FORMATS", "TEMPLATES", "load", "name_and_file", "named", "read_files", "read_records", "task_name"]


def task_name(file):
    """A task's name from its file: without train, val, dev or test, or the folder's where nothing else is left."""
    split = "train|val|validation|dev|test"
    stem = re.sub(rf"[-_.]({split})$", "", Path(file).stem)
    return Path(file).resolve().parent.name if re.match(rf"({split})\b", stem.replace("_", "-")) else stem


def name_and_file(entry):
    """(task name, file) of FILE or NAME=FILE."""
    name, _, file = entry.partition("=") if "=" in entry and not Path(entry).exists() else ("", "", entry)
    return name or task_name(file), file


def read_files(files, skip_bad=False):
    """{task: (format name, [Example])} of files given as FILE or NAME=FILE; says what was recognised.

    Raises UserError, naming file and line, for a record that its format does not take, unless skip_bad counts it.
    """
    tasks = {}
    for entry in files:
        (name, file), rows, bad = name_and_file(entry), [], []
        records = list(read_records(file))
        bad += [(line, error) for line, _, error in records if error]
        bad += [(line, "no object with named fields") for line, r, error in records
                if not error and type(r) is not dict]
        good = [(line, r) for line, r, error in records if not error and type(r) is dict]
        if not good and not bad:
            raise UserError(f"{file} holds no records")
        kind = next((k for k, f in FORMATS.items() if good and f.recognises([r for _, r in good])), None)
        if good and kind is None:
            raise UserError(f"{file}: the fields {', '.join(map(str, good[0][1]))} match no format; known: "
                             f"{', '.join(FORMATS)} (README, \"Use your own checkpoint and data\")")
        for line, record in good:
            try:
                rows.append(replace(FORMATS[kind].read(record), task=name, source=f"{file}:{line}"))
            except UserError as error:
                bad.append((line, str(error)))
        if bad and not skip_bad:
            line, error = min(bad)
            raise UserError(f"{file}:{line}: {error}; --skip-bad-rows leaves such rows out ({len(bad)} here)")
        if not rows:
            raise UserError(f"{file} holds no record that its format takes; line {min(bad)[0]}: {min(bad)[1]}")
        print(f"{name}: {len(rows):,} records of format {kind} in {file}, scored by {FORMATS[kind].score.__name__}"
              + (f"; {len(bad)} bad rows skipped" if bad else ""))
        if tasks.setdefault(name, (kind, []))[0] != kind:
            raise UserError(f"two files of task {name!r} have the formats {tasks[name][0]} and {kind}: "
                             "name them apart with NAME=FILE")
        tasks[name][1].extend(rows)
    return tasks


def with_shots(row, shots):
    """The Example with solved ones of its task in front of its question."""
    said = lambda e: (next((s.text for s in e.segments if s.role == role), "") for role in ("user", "assistant"))
    solved = "".join("{} {}\n\n".format(*said(shot)) for shot in shots)
    first = next((i for i, s in enumerate(row.segments) if s.role == "user"), None)
    if first is None:
        raise UserError(f"task {row.task!r} is plain text: it has no question to put --shots in front of")
    segments = [replace(s, text=solved + s.text) if i == first else s for i, s in enumerate(row.segments)]
    return replace(row, segments=segments)


def hold_out(rows, place):
    """(the rows that are left, every 20th row from this place on; at least the last one of several)"""
    out = set(range(place, len(rows), 20)) or ({len(rows) - 1} if len(rows) > 1 else set())
    return [r for i, r in enumerate(rows) if i not in out], [rows[i] for i in sorted(out)]


def load(files, eval_files=(), general_files=(), shot_files=(), shots=0, split="test", limit=0, template="plain",
         mix="proportional", skip_bad=False):
    """Suite of user files. Without eval_files every 20th row is held out as test data; every 20th of the others is
    validation data, for choosing. Neither is ever trained on, whatever the split. General files are only scored: their
    even rows are validation data and their odd rows test data.

    mix "equal" repeats the smaller tasks' examples until each task has as many as the largest.
    """
    apply, rows = named(template).apply, read_files(files, skip_bad)
    held = read_files(eval_files, skip_bad)
    general = read_files(general_files, skip_bad)
    solved = read_files(shot_files, skip_bad) if shots else {}
    if both := (rows.keys() | held.keys()) & general.keys():
        raise UserError(f"task {min(both)!r} is both general and to be learned: name it apart with NAME=FILE")
    train, tests, kinds = {}, {}, {}
    for name, (kind, left) in rows.items():
        if not held:
            left, tests[name] = hold_out(left, 19)
            print(f"{name}: every 20th row ({len(tests[name])} of {len(rows[name][1]):,}) is held out and never "
                  "trained on; --eval-data names other data")
        left, validation = hold_out(left, 9)
        if split == "validation":
            tests[name] = validation
        if not left or not tests.get(name, True):
            raise UserError(f"task {name!r} has too few rows ({len(rows[name][1])}) to hold some out; "
                             "give --eval-data")
        train[name], kinds[name] = [apply(row) for row in left], kind
    if held and split == "test":
        tests = {name: every for name, (_, every) in held.items()}
    kinds.update({name: kind for name, (kind, _) in (held | general).items()})
    tests.update({name: every[split == "test" :: 2] for name, (_, every) in general.items()})
    if absent := [name for name in tests if shots and len(solved.get(name, ("", ()))[1]) < shots]:
        raise UserError(f"--shots {shots}: --shot-data has fewer rows for task {absent[0]!r}")
    tests = {name: [apply(with_shots(row, solved[name][1][:shots]) if shots else row)
                    for row in every[: limit or None]] for name, every in tests.items() if every}
    if mix == "equal":
        most = max(map(len, train.values()), default=0)
        train = {name: [every[i % len(every)] for i in range(most)] for name, every in train.items()}
    return Suite(list(train), [e for every in train.values() for e in every], tests,
                 {name: "general" if name in general else "new" for name in tests},
                 {name: kinds[name] for name in tests}, {name: FORMATS[kinds[name]].score for name in tests})
