"""Several sources as one sequence of samples, in ratios. It reads no file, and it is data like any other: a list of fixed length.

The sample at a place follows from the sources and the seed alone. So the loop shuffles and resumes a blend as it does a file's
samples: its checkpoint holds a place, and nothing of the blend has to be saved.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from alula.data.sample import Sample
from alula.data.views import Chosen
from alula.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples that go into a blend; those may be a blend themselves.

    Attributes:
        name: its identity: the same name twice is the same source.
        ratio: above 0; of the samples drawn from it to those from the others. None, for all sources of a blend: their numbers.
        cap: different samples of it at most, chosen by the seed; None: all.
        epochs: above 0; passes over it at most before the blend ends.
    """

    name: str
    samples: Sequence[Sample]
    ratio: float | None = None
    cap: int | None = None
    epochs: float = 1.0

    def __post_init__(self) -> None:
        for what, value in (("ratio", self.ratio), ("cap", self.cap), ("epochs", self.epochs)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"Source '{self.name}': {what} is {value}. A number above 0 is wanted; to take none, leave the source out.")
        if not self.samples:
            raise UserError(f"Source '{self.name}' has no samples to learn from. Correct it, or leave it out.")

    @property
    def num_samples(self) -> int:
        """Different samples."""
        return min(len(self.samples), self.cap or len(self.samples))

    @property
    def num_draws(self) -> int:
        """Samples that its epochs allow."""
        return math.floor(self.num_samples * self.epochs)


class Blend(Sequence[Sample]):
    """The sources in their ratios, as long as no source needs more than its epochs.

    Every beginning of a blend keeps the ratios too, to within a sample or so of each source. A source reached twice, also
    through another blend, is sampled once, and its ratios are added. Each pass over a source has an order of its own.

    Args:
        sources: their ratios need not sum to 1.
        temperature: above 0; a share is proportional to ``ratio ** (1 / temperature)``: 1 keeps the ratios, more evens them.
        seed: of caps and orders.

    Raises:
        UserError: no source; ratios for some sources only; one source twice with different caps or epochs; epochs too few for
            a single sample.

    Source: temperature as in Arivazhagan et al. 2019, "Massively Multilingual Neural Machine Translation in the Wild",
    section 4.1, https://arxiv.org/abs/1907.05019.

    Example:
        >>> few, many = ([Sample.ask(f"{name}{i}?", name) for i in range(n)] for name, n in (("few", 2), ("many", 9)))
        >>> blend = Blend([Source(name="few", samples=few, ratio=1), Source(name="many", samples=many, ratio=3)])
        >>> [sample.answer for sample in blend]
        ['many', 'few', 'many', 'many', 'many', 'few', 'many', 'many']
    """

    def __init__(self, sources: Sequence[Source], *, temperature: float = 1.0, seed: int = 0) -> None:
        if not sources or not 0 < temperature < math.inf:
            raise UserError(f"{len(sources)} sources and temperature {temperature} came. A source or more and a number above 0 are wanted.")
        self.sources = _merged([leaf for source in _merged(sources) for leaf in _leaves(source)])
        self.seed = seed
        ratios = [source.ratio or 0.0 for source in self.sources]
        weights = [(ratio / max(ratios)) ** (1 / temperature) for ratio in ratios]  # 1 at most: a power of it may vanish, not overflow
        self.shares = [weight / sum(weights) for weight in weights]
        allowed = [source.num_draws / share if share else math.inf for source, share in zip(self.sources, self.shares, strict=True)]
        self.counts = _apportioned(math.floor(min(allowed) + 1e-9), self.shares)
        self._places = self._plan()
        if not self._places:
            first = self.sources[allowed.index(min(allowed))].name
            raise UserError(f"The blend is empty: source '{first}' has too few samples for its ratio. Raise its epochs or lower its ratio.")

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Chosen: ...
    def __getitem__(self, place: int | slice) -> Sample | Chosen:
        """The sample at `place`, or the samples there."""
        if isinstance(place, slice):
            return Chosen(self, range(len(self))[place])
        source, index = self._places[place]
        return self.sources[source].samples[index]

    def _plan(self) -> list[tuple[int, int]]:
        """(source, sample) of every place: the j-th of a source's n draws stands at (j + 1/2) / n of the way."""
        draws = [self._draws(source) for source in self.sources]
        spots = [((j + 0.5) / count, i) for i, count in enumerate(self.counts) for j in range(count)]
        return [(i, next(draws[i])) for _, i in sorted(spots)]

    def _draws(self, source: Source) -> Iterator[int]:
        """Samples of `source` without end, pass after pass."""
        kept = list(range(len(source.samples)))
        if source.num_samples < len(kept):
            kept = random.Random(f"{self.seed} {source.name} cap").sample(kept, source.num_samples)
        number = 0
        while True:
            yield from random.Random(f"{self.seed} {source.name} {number}").sample(kept, len(kept))
            number += 1


def _merged(sources: Sequence[Source]) -> list[Source]:
    """Each name once, with its ratios added.

    Raises:
        UserError: some sources have a ratio and some have none, or equal names differ in cap or epochs.
    """
    if len({source.ratio is None for source in sources}) > 1:
        without = next(source.name for source in sources if source.ratio is None)
        raise UserError(f"Source '{without}' has no ratio, but others have. Give all of them a ratio, or none.")
    found: dict[str, Source] = {}
    for source in sources:
        known = found.setdefault(source.name, source)
        if (known.cap, known.epochs) != (source.cap, source.epochs):
            limits = f"cap {known.cap} and epochs {known.epochs}, then cap {source.cap} and epochs {source.epochs}"
            raise UserError(f"Source '{source.name}' comes twice, with {limits}. It is sampled once: give both the same.")
        if known is not source and known.ratio is not None and source.ratio is not None:
            found[source.name] = replace(known, ratio=known.ratio + source.ratio)
    return list(found.values())


def _leaves(source: Source) -> list[Source]:
    """`source`, or the sources of the blend that it is with their shares of its ratio; a missing ratio is the number of samples."""
    inner = source.samples
    if not isinstance(inner, Blend):
        return [replace(source, ratio=source.ratio or float(source.num_samples))]
    if source.cap is not None or source.epochs != 1:
        raise UserError(f"Source '{source.name}' is a blend, and has a cap or epochs. Give those to the sources in it.")
    whole = source.ratio or float(len(inner))
    return [replace(leaf, ratio=whole * share) for leaf, share in zip(inner.sources, inner.shares, strict=True) if whole * share]


def _apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole numbers nearest to the shares: what is left goes to the largest remainders, of equal ones to the first."""
    counts = [math.floor(total * share) for share in shares]
    behind = sorted(range(len(shares)), key=lambda i: (round(counts[i] - total * shares[i], 6), i))  # rounded: floats differ by noise
    return [count + (i in behind[: total - sum(counts)]) for i, count in enumerate(counts)]
