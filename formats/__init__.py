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
from formats.known import FORMATS, is_trained, multiple_choice
from formats.templates import TEMPLATES, chat_template, choose, dress, solved
from model import UserError

__all__ = ["FORMATS", "TEMPLATES", "chat_template", "choose", "dress", "load", "name_and_file", "read_files",
           "read_records", "task_name"]


def task_name(file):
    """A task's name from its file: without train, val, dev or test, or the folder's where nothing else is left."""
    split = "train|val|validation|dev|test"
    stem = re.sub(rf"[-_.]({split})$", "", Path(str(file).removesuffix(".gz")).stem)
    return Path(file).absolute().parent.name if re.match(rf"({split})\b", stem.replace("_", "-")) else stem


def name_and_file(entry):
    """(task name, file) of FILE or NAME=FILE."""
    name, _, file = entry.partition("=") if "=" in entry and not Path(entry).exists() else ("", "", entry)
    return name or task_name(file), file


class Fields(dict):
    """A record that adds the names of its fields that are read to a set."""

    def __init__(self, record, read):
        super().__init__(record)
        self.read = read

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default


def recognised(records):
    """The name of the first format that takes a third of the records, else of that which takes most; None where none
    takes any. Null and empty fields count as absent. Formats overlap: all of Alpaca's rows may have a text, too."""
    filled = [{key: value for key, value in record.items() if value not in (None, "", [], {})} for record in records]
    counts = {kind: sum(map(bool, map(known.recognises, filled))) for kind, known in FORMATS.items()}
    kind = max(counts, key=lambda kind: min(3 * counts[kind], len(records)))
    return kind if counts[kind] else None


def read_files(files, choices="text"):
    """{task: (format name, [Example])} of files given as FILE or NAME=FILE. Prints what was recognised, what is wrong
    with rows that are left out, and which fields are not read. choices: "letter" ranks letters where a format has both.

    Raises UserError, naming file and line, where more than one row in a hundred of a file is bad.
    """
    tasks = {}
    for name, file in map(name_and_file, files):
        records = list(read_records(file))
        whole = [record for _, record, wrong in records if isinstance(record, dict) and not wrong]
        kind = recognised(whole)
        if whole and not kind:
            raise UserError(f"{file}: the fields {', '.join(whole[0]):.80} match no format; known: "
                            f"{', '.join(FORMATS)} (tools.show --formats)")
        rows, bad, read = [], [], set()
        for line, record, wrong in records:
            try:
                if wrong or not isinstance(record, dict):
                    raise UserError(wrong or "no object with named fields")
                record = Fields({key: value for key, value in record.items() if value is not None}, read)
                found = FORMATS[kind].read(record)
                found = multiple_choice(*found, choices == "letter") if isinstance(found, tuple) else found
                found, trained = found if isinstance(found, list) else [found], is_trained(record)
                rows += [replace(one, task=name, source=f"{file}:{line}", segments=[
                    replace(s, trained=s.trained and trained) for s in one.segments]) for one in found]
            except Exception as error:  # a reader checks nothing that fails by itself
                fault = f"no field {error}" if type(error) is KeyError else f"{type(error).__name__}: {error}"
                known = isinstance(error, UserError)
                bad.append((line, str(error) if known else f"does not fit the format {kind}: {fault}"))
        if 100 * len(bad) > len(records):
            line, wrong = bad[0]
            raise UserError(f"{file}:{line}: {wrong} ({len(bad):,} of {len(records):,} rows are bad)")
        if not rows:
            raise UserError(f"{file} holds no records")
        print(f"{name}: {len(records) - len(bad):,} records of format {kind} in {file}, scored by "
              f"{FORMATS[kind].score.name}" + f"; {len(rows):,} examples" * (len(rows) != len(records) - len(bad)))
        if bad:
            print(f"{name}: {len(bad):,} bad rows are left out; the first, {file}:{bad[0][0]}: {bad[0][1]:.120}")
        fields = dict.fromkeys(field for record in whole for field in record if record[field] is not None)
        if unread := [field for field in fields if field not in read]:
            print(f"{name}: fields that are not read: {', '.join(unread):.200}")
        if tasks.setdefault(name, (kind, []))[0] != kind:
            raise UserError(f"two files of task {name!r} have the formats {tasks[name][0]} and {kind}: "
                             "name them apart with NAME=FILE")
        tasks[name][1].extend(rows)
    return tasks


def with_shots(row, ahead):
    """The Example with this text, solved ones of its task, in front of its first question."""
    asked = [s for s in row.segments if s.role == "user"]
    if not asked:
        raise UserError(f"task {row.task!r} is plain text: it has no question to put --shots in front of")
    return replace(row, segments=[replace(s, text=ahead + s.text) if s is asked[0] else s for s in row.segments])


def drawn(rows):
    """The rows in a random order that is the same for every --seed."""
    return random.Random("held out").sample(rows, len(rows))


def hold_out(rows):
    """(the rows that are left, in their order; a twentieth of all, from all over them, at least one of several)"""
    out = dict.fromkeys(drawn(range(len(rows)))[: len(rows) // 20 or int(len(rows) > 1)])
    return [r for i, r in enumerate(rows) if i not in out], [rows[i] for i in out]


def load(files, eval_files=(), general_files=(), split="test", limit=0, shots=0, shot_files=(), choices="text"):
    """Suite of user files. Without eval_files a twentieth of the rows, drawn from all over the file, is held out as
    test data; a twentieth of the others is validation data. Neither is ever trained on, whatever the split. General
    files are only scored: half of their rows are validation data, the others test data. limit takes rows from all over
    a file, too. shots: solved rows of shot_files in front of each scored question, none of which is scored itself.
    """
    rows, held, general, shown = (read_files(part, choices) for part in (
        files, eval_files, general_files, shot_files))
    if both := (rows.keys() | held.keys()) & general.keys():
        raise UserError(f"task {min(both)!r} is both general and to be learned: name it apart with NAME=FILE")
    train, tests, validation = [], {}, []
    unseen = [row for part in (held, general) for _, every in part.values() for row in every]
    for name, (_, left) in rows.items():
        count = len(left)
        if not held:
            left, tests[name] = hold_out(left)
            unseen += tests[name]
            print(f"{name}: a twentieth of the rows ({len(tests[name])} of {count:,}), drawn from all over them, is "
                  "held out and never trained on; --eval-data names other data")
        learned, choosing = hold_out(left)
        train += learned
        validation += choosing
        if split == "validation":
            tests[name] = choosing
        if not learned or not tests.get(name, True):
            raise UserError(f"task {name!r} has too few rows ({count}) to hold some out; give --eval-data")
    if held and split == "test":
        tests = {name: drawn(every) if limit else every for name, (_, every) in held.items()}
    for name, (_, every) in general.items():
        tests[name] = drawn(every)[split == "test" :: 2] or every  # a single row is in both halves
    said = lambda row: tuple((s.role, s.text) for s in row.segments)
    known = set(map(said, train))
    held_out = {said(row) for row in (*unseen, *validation)}
    for name, every in tests.items():
        every = every[: limit or None]
        ahead = [row for row in shown.get(name, ("", ()))[1] if said(row) not in held_out][:shots]
        if twice := sum(said(row) in known for row in every):
            print(f"{name}: {twice:,} of the {len(every):,} rows that are scored are the same as rows trained on")
        if len(ahead) < shots:
            raise UserError(f"--shots {shots}: --shot-data has fewer rows for task {name!r} that are not scored")
        ahead = "".join(solved(row) + "\n\n" for row in ahead)
        tests[name] = [with_shots(row, ahead) if shots else row for row in every]
    kinds = {name: kind for name, (kind, _) in (rows | held | general).items() if name in tests}
    return Suite(list(rows), train, tests, {name: "general" if name in general else "new" for name in tests}, kinds,
                 {name: FORMATS[kind].score for name, kind in kinds.items()}, validation)
