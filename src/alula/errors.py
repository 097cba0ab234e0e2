"""The one error a user sees, and what its messages share. It knows nothing of models or files."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user gave cannot be used. The message says what came, what is accepted and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The half-sentence ``Known: a, b. Did you mean 'a'?`` for an unknown `word`."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Known: {', '.join(names) or 'none'}.{hint}"


def counted(number: int, what: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def install_extra(name: str) -> str:
    """How the packages of an extra are installed. The name alula is on no index, so that a clone is what can be installed."""
    return f"In a clone of alula's repository type: pip install '.[{name}]'"
