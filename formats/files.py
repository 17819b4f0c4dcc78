"""Records of a file: JSON arrays, JSON lines, or CSV, by what the file holds, whatever its ending."""

import csv
import io
import json
import re
from pathlib import Path

from formats.known import MMLU
from model import UserError


def read_records(file):
    """Yields (line number, record, error or None) of a JSON array, of JSON lines, or of CSV with a header (MMLU's is
    known without one): by what the file holds, whatever its ending. Raises UserError where it cannot be read on."""
    if Path(file).exists() and not Path(file).is_file():  # a pipe or a device may never end
        raise UserError(f"{file} is no regular file")
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if re.match(r"\s*\[\s*[\]{]", content):
        yield from read_array(file, content)
    elif re.match(r'\s*\{\s*["}]', content):
        for line, piece in enumerate(content.split("\n"), 1):
            if piece.strip():
                try:
                    yield line, json.loads(piece), None
                except (ValueError, RecursionError) as error:
                    yield line, None, f"not valid JSON: {error}"
    else:
        rows = csv.reader(io.StringIO(content, newline=""))
        try:
            names = next(rows, [])
            if len(names) == len(MMLU) and names[-1].strip() in list("ABCD0123"):
                yield rows.line_num, dict(zip(MMLU, names)), None
                names = MMLU
            for row in rows:
                wrong = None if len(row) == len(names) else f"{len(row)} columns, expected {len(names)}"
                if row:
                    yield rows.line_num, dict(zip(names, row)), wrong
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not valid CSV: {error}") from None


def read_array(file, content):
    """The records of a JSON array one by one, so that each has a line number."""
    decoder, place, line, seen = json.JSONDecoder(), content.index("[") + 1, 1, 0
    while True:
        place = re.compile(r"[\s,]*").match(content, place).end()
        line, seen = line + content.count("\n", seen, place), place
        if content[place : place + 1] == "]":
            return
        try:
            record, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{line}: not valid JSON: {error}") from None
        yield line, record, None
