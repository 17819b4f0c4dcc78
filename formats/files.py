"""Records of a file: JSON arrays, JSON lines, or CSV, by what the file holds, whatever its ending."""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from formats.known import MMLU
from model import UserError


def read_text(file):
    """The text of a file, unpacked where it is packed by gzip. Raises UserError where it is none."""
    if Path(file).exists() and not Path(file).is_file():  # a pipe or a device may never end
        raise UserError(f"{file} is no regular file")
    try:
        raw = Path(file).read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        if raw.startswith(b"PAR1"):
            raise UserError(f"{file} is Parquet, expected JSON or CSV: pandas.read_parquet(FILE).to_json("
                            "NEW, orient='records', lines=True) writes it so")
        return re.sub("\r\n?", "\n", raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


class Decoder(json.JSONDecoder):
    """JSON in which no object names a key twice."""

    def __init__(self):
        super().__init__(object_pairs_hook=self.single)
        self.doubled = []  # keys, since the last look

    def single(self, pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled += [name for name in found if names.count(name) > 1]
        return found

    def wrong(self):
        """What to say of the value that was read last, or None."""
        doubled, self.doubled = self.doubled, []
        return f"the key {doubled[0]!r:.80} stands twice in one object" if doubled else None


def read_records(file):
    """Yields (line number, record, error or None) of a JSON array, of JSON lines, or of CSV with a header (MMLU's is
    known without one): by what the file holds, whatever its ending. Raises UserError where it cannot be read on."""
    content = read_text(file)
    if re.match(r"\s*\[\s*[\[\]{]", content):
        yield from read_array(file, content)
    elif re.match(r'\s*\{\s*["}]', content):
        decoder = Decoder()
        for line, piece in enumerate(content.split("\n"), 1):
            if piece.strip():
                try:
                    yield line, decoder.decode(piece), decoder.wrong()
                except (ValueError, RecursionError) as error:
                    yield line, None, f"not valid JSON (expected a whole object in each line, or an array): {error}"
    else:
        rows = csv.reader(io.StringIO(content, newline=""), strict=True)
        try:
            names = next(rows, [])
            if len(names) == len(MMLU) and names[-1].strip() in list("ABCD0123"):
                yield rows.line_num, dict(zip(MMLU, names)), None
                names = MMLU
            if doubled := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{file}:{rows.line_num}: the header names the column {doubled[0]!r:.80} twice")
            for row in rows:
                wrong = None if len(row) == len(names) else f"{len(row)} columns, expected {len(names)}"
                if row:
                    yield rows.line_num, dict(zip(names, row)), wrong
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not valid CSV: {error}") from None


def read_array(file, content):
    """The records of a JSON array one by one, so that each has a line number; those of arrays in it as well."""
    decoder, place, line, seen, depth = Decoder(), 0, 1, 0, 0
    after = ""  # the mark or the value that stands in front: "[", "," or "value"
    while True:
        place = re.compile(r"\s*").match(content, place).end()
        line, seen = line + content.count("\n", seen, place), place
        mark, wanted = content[place : place + 1], "a comma or ]" if after == "value" else "a record"
        if after == "value" and depth == 0:
            if mark:
                raise UserError(f"{file}:{line}: text behind the array: {content[place : place + 40]!r}")
            return
        if mark == "[" and after != "value":
            depth, place, after = depth + 1, place + 1, "["
        elif mark == "]" and after in ("[", "value"):
            depth, place, after = depth - 1, place + 1, "value"
        elif mark == "," and after == "value":
            place, after = place + 1, ","
        elif mark in ("", "]", ",") or after == "value":
            raise UserError(f"{file}:{line}: not valid JSON: expected {wanted}, found "
                            f"{content[place : place + 40] or 'the end of the file'!r}")
        else:
            try:
                record, place = decoder.raw_decode(content, place)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{line}: not valid JSON: {error}") from None
            yield line, record, decoder.wrong()
            after = "value"
