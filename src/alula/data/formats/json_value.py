"""One JSON value out of a text, whatever is wrong with it a ValueError. It knows no file and no row."""

import json
import re
from typing import Any

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How half of a character is escaped; both halves are one character, one alone cannot be written anywhere."""


def value_at(text: str, at: int) -> tuple[Any, int]:
    """The value that starts at `at`, and where it ends.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds half a character or a number of more than 4300 digits.
    """
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
        if SURROGATE.search(text, at, end):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value, end


def only_value(text: str) -> Any:
    """The one value that `text` is.

    Raises:
        ValueError: as `value_at`, or more follows.
    """
    value, end = value_at(text, skip_space(text, 0))
    if (end := skip_space(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def skip_space(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
