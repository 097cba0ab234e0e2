"""Seeded choice among rows. It knows neither images nor questions."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from alula.data.sample import Sample

Row = TypeVar("Row")


def generator(*parts: str | int) -> random.Random:
    """A random generator that depends on `parts` alone, equal on every machine."""
    return random.Random("/".join(map(str, parts)))


def choose(rows: Sequence[Row], *, size: int | None, seed: int, name: str) -> list[Row]:
    """The first `size` of the shuffled rows (all when None), so that a smaller choice is part of a larger one."""
    return generator(name, "choose", seed).sample(rows, k=len(rows))[:size]


def answer_tokens(samples: Iterable[Sample]) -> int:
    """Tokens enough to generate the longest answer.

    Byte-level BPE needs at worst one token a byte; measured on SmolLM2's: .65 a byte in Japanese and Urdu, less in
    English and Swahili. Two more are for a leading space and the end of the turn.
    """
    longest = max((len(sample.answer.encode()) for sample in samples), default=0)
    return max(8, int(longest * 0.75) + 2)
