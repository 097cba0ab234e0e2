"""Seeded choice among rows, and seeded drawing. It knows neither images nor questions."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from alula.data.sample import Sample

Row = TypeVar("Row")
Source = TypeVar("Source")
DRAWN = {"train": 3000, "test": 500}
"""Samples of a split that is drawn: there could be any number."""


def generator(*parts: str | int) -> random.Random:
    """A random generator that depends on `parts` alone, equal on every machine."""
    return random.Random("/".join(map(str, parts)))


def choose(rows: Sequence[Row], *, size: int | None, seed: int, name: str) -> list[Row]:
    """The first `size` of the shuffled rows (all when None), so that a smaller choice is part of a larger one."""
    return generator(name, "choose", seed).sample(rows, k=len(rows))[:size]


def draw_splits(
    name: str,
    read: Callable[[str], Source],
    draw: Callable[[Source, str, int, random.Random], Sample],
    *,
    train_size: int | None,
    test_size: int | None,
    seed: int,
) -> dict[str, list[Sample]]:
    """Both splits of a task whose samples are drawn, each by a generator of its own: fewer samples are the first of more.

    Args:
        read: gives what a split is drawn from.
        draw: makes a sample of that, the split, the sample's index and its generator.
    """
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        source, count = read(split), DRAWN[split] if size is None else min(size, DRAWN[split])
        splits[split] = [draw(source, split, index, generator(name, split, seed, index)) for index in range(count)]
    return splits


def answer_tokens(samples: Iterable[Sample]) -> int:
    """Tokens enough to generate the longest answer.

    Byte-level BPE needs at worst one token a byte; measured on SmolLM2's: .65 a byte in Japanese and Urdu, less in
    English and Swahili. Two more are for a leading space and the end of the turn.
    """
    longest = max((len(sample.answer.encode()) for sample in samples), default=0)
    return max(8, int(longest * 0.75) + 2)
