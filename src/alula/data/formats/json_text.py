"""JSON: one object a line, or a list of objects. Each row knows its line."""

from collections.abc import Iterator
from pathlib import Path

from alula.data.formats.json_value import only_value, skip_space, value_at
from alula.data.formats.table import FORMATS, Format, Line
from alula.data.sample import BadRow
from alula.errors import UserError


@FORMATS.register("json")
class Json(Format):
    """One object a line, a list of objects, or one object alone; a list ends at its first mistake, lines go on after one."""

    endings = (".jsonl", ".json", ".ndjson")

    def rows(self, path: Path) -> Iterator[Line]:
        """By their lines in the text."""
        try:
            text = path.read_text(encoding="utf-8-sig")  # Excel and PowerShell put a byte order mark in front
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {path}: {error}. A UTF-8 text file is wanted.") from error
        start = skip_space(text, 0)
        if text.startswith("[", start):
            return _listed(path, text)
        try:
            row = only_value(text)  # one object alone may take several lines; of many, only the first is looked at here
        except ValueError:
            return _by_line(path, text)
        number = 1 + text.count("\n", 0, start)
        return iter([Line(origin=f"{path.name}:{number}", row=row)])


def _by_line(path: Path, text: str) -> Iterator[Line]:
    # Not str.splitlines: it also splits at U+2028 and others, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Line(origin=f"{path.name}:{number}", row=only_value(line))
            except ValueError as error:
                yield _not_json(path, number, error)


def _listed(path: Path, text: str) -> Iterator[Line]:
    """The items one by one, because a parsed list no longer knows its lines."""
    at, number, counted = skip_space(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", at):
        number, counted = number + text.count("\n", counted, at), at
        try:
            row, at = value_at(text, at)
        except ValueError as error:
            yield _not_json(path, getattr(error, "lineno", number), error)
            return
        yield Line(origin=f"{path.name}:{number}", row=row)
        at = skip_space(text, at)
        if text.startswith(",", at):
            at = skip_space(text, at + 1)
        elif not text.startswith("]", at):
            number += text.count("\n", counted, at)
            message = f"{path}:{number}: the list ends too early or lacks a comma. Write the file again, whole."
            yield Line(origin=f"{path.name}:{number}", row=BadRow(message, kind="json"))
            return
    if (at := skip_space(text, at + 1)) < len(text):
        number += text.count("\n", counted, at)
        message = f"{path}:{number}: more follows after the end of the list. Put all rows into one list, or one object on a line."
        yield Line(origin=f"{path.name}:{number}", row=BadRow(message, kind="json"))


def _not_json(path: Path, number: int, error: ValueError) -> Line:
    what = f"not valid JSON ({getattr(error, 'msg', error)})"
    message = f"{path}:{number}: {what}. One object a line, or a list of objects is wanted. Correct the line, or write the file again."
    return Line(origin=f"{path.name}:{number}", row=BadRow(message, kind="json"))
