"""Records of a file: a JSON array, JSON lines or CSV, by what the file holds, whatever its ending."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

from formats.known import MMLU
from model import UserError, reading


def read_text(file):
    """The text of a file in UTF-8 or UTF-16, packed by gzip or not. Raises UserError where it is none."""
    if Path(file).exists() and not Path(file).is_file():  # a pipe or a device may never end
        raise UserError(f"{file} is no regular file")
    with reading(file):
        try:
            raw = Path(file).read_bytes()
            raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        if raw.startswith(b"PAR1"):
            raise UserError(f"{file} is Parquet, expected JSON or CSV: pandas.read_parquet(FILE).to_json("
                            "NEW, orient='records', lines=True) writes it so")
        return re.sub("\r\n?", "\n", raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"))


def read_records(file):
    """Yields (line, record, error or None): of a JSON array the record's number instead of a line. CSV has a header,
    but for MMLU's. Raises UserError where the file cannot be read on."""
    content = read_text(file)
    with reading(file):
        if re.match(r"\s*\[\s*[\[\]{]", content):
            for number, record in enumerate(json.loads(content), 1):
                yield f"record {number}", record, None
        elif re.match(r'\s*\{\s*["}]', content):
            for line, piece in enumerate(content.split("\n"), 1):
                if piece.strip():
                    try:
                        yield line, json.loads(piece), None
                    except (ValueError, RecursionError) as error:
                        yield line, None, f"not valid JSON (expected a whole object in each line, or an array): {error}"
        else:
            csv.field_size_limit(2**31 - 1)
            rows = csv.reader(io.StringIO(content, newline=""), strict=True)
            names = next(rows, [])
            if len(names) == 6 and names[-1].strip() in list("ABCD0123"):
                yield rows.line_num, dict(zip(MMLU.split(), names)), None
                names = MMLU.split()
            for row in filter(None, rows):
                wrong = None if len(row) == len(names) else f"{len(row)} columns, expected {len(names)}"
                yield rows.line_num, dict(zip(names, row)), wrong
