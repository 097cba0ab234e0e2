"""A growing answer in pieces that never have to be taken back. It knows no model."""

from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character whose last ones are still to come."""


class Pieces:
    """Cuts a growing text at the first of `stops`, and holds back what the next token could still change.

    All pieces together are the whole answer without white space around it, however it grew.

    Example:
        >>> pieces = Pieces(["END"])
        >>> [pieces.grow(text) for text in (" A", " A bE", " A bEe ", " A bEe EN", " A bEe ENDED")]
        ['A', ' b', 'Ee', '', '']
        >>> pieces.is_stopped
        True
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._sent = stops, 0
        self.is_stopped = False

    def grow(self, text: str, *, is_last: bool = False) -> str:
        """What is new and certain in `text`, the whole answer so far."""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text = text[: min(found)]
        elif not is_last:
            text = text[: len(text) - self._held_back(text)].rstrip(UNFINISHED)
        certain = text.strip()
        piece = certain[self._sent :]
        self._sent += len(piece)
        return piece

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop."""
        lengths = (size for stop in self._stops for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        return max(lengths, default=0)
