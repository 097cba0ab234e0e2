"""JSON: one object a line, or a list of objects. Each row knows its line."""

import json
from collections.abc import Iterator
from pathlib import Path

from alula.data.formats.table import FORMATS, Format, Line
from alula.data.sample import BadRow
from alula.errors import UserError


@FORMATS.register("json")
class Json(Format):
    """One object a line, or a list of objects; a list ends at its first mistake, lines go on after one."""

    endings = (".jsonl", ".json", ".ndjson")

    def rows(self, path: Path) -> Iterator[Line]:
        """By their lines in the text."""
        try:
            text = path.read_text(encoding="utf-8-sig")  # Excel and PowerShell put a byte order mark in front
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {path}: {error}. A UTF-8 text file is wanted.") from error
        return _listed(path, text) if text.lstrip().startswith("[") else _by_line(path, text)


def _by_line(path: Path, text: str) -> Iterator[Line]:
    # Not str.splitlines: it also splits at U+2028 and others, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Line(origin=f"{path.name}:{number}", row=json.loads(line))
            except json.JSONDecodeError as error:
                yield _not_json(path, number, error)


def _listed(path: Path, text: str) -> Iterator[Line]:
    """The items one by one, because a parsed list no longer knows its lines."""
    decoder = json.JSONDecoder()
    at, number, counted = _skip(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", at):
        number, counted = number + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield _not_json(path, error.lineno, error)
            return
        yield Line(origin=f"{path.name}:{number}", row=row)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            number += text.count("\n", counted, at)
            message = f"{path}:{number}: the list ends too early or lacks a comma. Write the file again, whole."
            yield Line(origin=f"{path.name}:{number}", row=BadRow(message, kind="json"))
            return


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _not_json(path: Path, number: int, error: json.JSONDecodeError) -> Line:
    message = f"{path}:{number}: not valid JSON ({error.msg}). Correct the line, or write the file again."
    return Line(origin=f"{path.name}:{number}", row=BadRow(message, kind="json"))
