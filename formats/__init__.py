"""From files to examples: `load(files, ...)` gives the Suite of a run.

`files.py` reads records, `known.py` knows what a record means and how its task is scored, `templates.py` puts a prompt
template around it.
"""

import random
import re
from dataclasses import replace
from pathlib import Path

from data import Suite
from formats.files import read_records
from formats.known import FORMATS, SCORED, Record, names_in
from formats.templates import TEMPLATES, choose, named
from model import UserError

__all__ = ["FORMATS", "SCORED", "TEMPLATES", "choose", "load", "name_and_file", "named", "read_files", "read_records",
           "task_name"]


def task_name(file):
    """A task's name from its file: without train, val, dev or test, or the folder's where nothing else is left."""
    split = "train|val|validation|dev|test"
    stem = re.sub(rf"[-_.]({split})$", "", Path(str(file).removesuffix(".gz")).stem)
    return Path(file).resolve().parent.name if re.match(rf"({split})\b", stem.replace("_", "-")) else stem


# For the message of a file that none recognises: the common ones with their fields.
KNOWN = ("chat (messages), sharegpt (conversations), alpaca (instruction, output), pair (prompt, completion), choices "
         "(question, choices, answer), dpo, text; adapters, boolq, cb, copa, gsm8k, mmlu, multirc, rte, wic, wsc "
         "(tools.show --formats)")


def name_and_file(entry):
    """(task name, file) of FILE or NAME=FILE."""
    name, _, file = entry.partition("=") if "=" in entry and not Path(entry).exists() else ("", "", entry)
    return name or task_name(file), file


# Fields that say what a record is about: where a format does not read one of these, it may be the wrong format.
TELLING = {"label", "labels", "target", "targets", "history", "system", "system_prompt", "conversation",
           "conversations", "messages", "dialog", "dialogue", "turns", "answer", "answerKey", "choices"}


def read_files(files, skip_bad=False, ignore=()):
    """{task: (format name, [Example])} of files given as FILE or NAME=FILE; says what was recognised and left out.

    ignore: names of fields that are left out on purpose. Raises UserError, naming file and line, for a record that its
    format does not take, unless skip_bad counts it, and for a field that looks like a label or a conversation and is
    not read.
    """
    tasks = {}
    for entry in files:
        (name, file), rows, bad, good = name_and_file(entry), [], [], []
        for line, record, error in read_records(file):
            if error or type(record) is not dict:
                bad.append((line, error or "no object with named fields"))
            else:
                good.append((line, {key: value for key, value in record.items() if key not in ignore}))
        if not good and not bad:
            raise UserError(f"{file} holds no records")
        records = [record for _, record in good]
        kind = next((k for k, f in FORMATS.items() if good and f.recognises(records)), None)
        if good and kind is None:
            raise UserError(f"{file}: the fields {', '.join(records[0]):.80} match no format; known: {KNOWN}")
        used, whole = set(), len(good)
        for line, record in good:
            try:
                found = FORMATS[kind].read(Record(record, used=used))
                found = found if isinstance(found, list) else [found]
                rows += [replace(e, task=name, source=f"{file}:{line}") for e in found]
            except UserError as error:
                bad.append((line, str(error)))
                whole -= 1
        if bad and not skip_bad:
            line, error = min(bad)
            raise UserError(f"{file}:{line}: {error}; --skip-bad-rows leaves such rows out ({len(bad)} here)")
        if not rows:
            raise UserError(f"{file} holds no record that its format takes; line {min(bad)[0]}: {min(bad)[1]}")
        fields = {}  # {field: whether it holds anything in some record}
        for record in records:
            for field, filled in names_in(record, used=used):
                fields[field] = fields.get(field, False) or filled
        left = [field for field in fields if field not in used]
        if telling := [field for field in left if fields[field] and field.split(".")[-1] in TELLING]:
            raise UserError(f"{file}: the format {kind} does not read the field {telling[0]!r}, which may say what the "
                            f"answers are: --ignore-fields {telling[0]} leaves it out; other formats: tools.show "
                            "--formats")
        ignored = f"; ignored: {', '.join([*left, *ignore]):.200}" if left or ignore else ""
        print(f"{name}: {whole:,}{f' of {whole + len(bad):,}' if bad else ''} records of format {kind} in {file}, "
              f"scored by {FORMATS[kind].score.__name__}" + f"; {len(rows):,} examples" * (len(rows) != whole)
              + (f"; {len(bad)} bad rows skipped, the first in line {min(bad)[0]}: {min(bad)[1]:.120}" if bad else "")
              + ignored.encode(errors="replace").decode())
        if tasks.setdefault(name, (kind, []))[0] != kind:
            raise UserError(f"two files of task {name!r} have the formats {tasks[name][0]} and {kind}: "
                             "name them apart with NAME=FILE")
        tasks[name][1].extend(rows)
    return tasks


def with_shots(row, shots):
    """The Example with solved ones of its task in front of its question: all that each of their rows says, as the
    template plain has it."""
    solved = "".join("".join(text for text, _ in TEMPLATES["plain"].apply(shot).texts()) + "\n\n" for shot in shots)
    first = next((i for i, s in enumerate(row.segments) if s.role == "user"), None)
    if first is None:
        raise UserError(f"task {row.task!r} is plain text: it has no question to put --shots in front of")
    segments = [replace(s, text=solved + s.text) if i == first else s for i, s in enumerate(row.segments)]
    return replace(row, segments=segments)


def drawn(rows):
    """The rows in an order of their own, whatever --seed says: what is taken from its front comes from all over the
    file, and the rest is the same for every seed."""
    return random.Random("held out").sample(rows, len(rows))


def hold_out(rows):
    """(the rows that are left, in their order; a twentieth of all, drawn; at least one of several)"""
    out = dict.fromkeys(drawn(range(len(rows)))[: len(rows) // 20 or int(len(rows) > 1)])
    return [r for i, r in enumerate(rows) if i not in out], [rows[i] for i in out]


def load(files, eval_files=(), general_files=(), shot_files=(), shots=0, split="test", limit=0, template="plain",
         mix="proportional", skip_bad=False, ignore=()):
    """Suite of user files. Without eval_files a twentieth of the rows, drawn from all over the file, is held out as
    test data; a twentieth of the others is validation data, for choosing. Neither is ever trained on, whatever the
    split. General files are only scored: half of their rows are validation data, the others test data. limit takes rows
    from all over a file, too.

    mix "equal" repeats the smaller tasks' examples until each task has as many as the largest.
    """
    apply = named(template).apply
    rows, held, general, solved = (read_files(part, skip_bad, ignore) for part in (
        files, eval_files, general_files, shot_files if shots else ()))
    if both := (rows.keys() | held.keys()) & general.keys():
        raise UserError(f"task {min(both)!r} is both general and to be learned: name it apart with NAME=FILE")
    train, tests, kinds, choosing = {}, {}, {}, []
    for name, (kind, left) in rows.items():
        if not held:
            left, tests[name] = hold_out(left)
            print(f"{name}: a twentieth of the rows ({len(tests[name])} of {len(rows[name][1]):,}), drawn from all "
                  "over them, is held out and never trained on; --eval-data names other data")
        left, validation = hold_out(left)
        choosing += [apply(row) for row in validation]
        if split == "validation":
            tests[name] = validation
        if not left or not tests.get(name, True):
            raise UserError(f"task {name!r} has too few rows ({len(rows[name][1])}) to hold some out; "
                             "give --eval-data")
        train[name], kinds[name] = left, kind
    if held and split == "test":
        tests = {name: drawn(every) if limit else every for name, (_, every) in held.items()}
    kinds.update({name: kind for name, (kind, _) in (held | general).items()})
    tests.update({name: drawn(every)[split == "test" :: 2] for name, (_, every) in general.items()})
    if absent := [name for name in tests if shots and len(solved.get(name, ("", ()))[1]) < shots]:
        raise UserError(f"--shots {shots}: --shot-data has fewer rows for task {absent[0]!r}")
    tests = {name: every[: limit or None] for name, every in tests.items() if every}
    said = lambda row: tuple((s.role, s.text) for s in row.segments)
    known = {said(row) for every in train.values() for row in every}
    for name, every in tests.items():
        if twice := sum(said(row) in known for row in every):
            print(f"{name}: {twice:,} of the {len(every):,} rows that are scored are the same as rows trained on")
    tests = {name: [apply(with_shots(row, solved[name][1][:shots]) if shots else row) for row in every]
             for name, every in tests.items()}
    train = {name: [apply(row) for row in every] for name, every in train.items()}
    if mix == "equal":
        most = max(map(len, train.values()), default=0)
        train = {name: [every[i % len(every)] for i in range(most)] for name, every in train.items()}
    return Suite(list(train), [e for every in train.values() for e in every], tests,
                 {name: "general" if name in general else "new" for name in tests},
                 {name: kinds[name] for name in tests}, {name: FORMATS[kinds[name]].score for name in tests}, choosing)
