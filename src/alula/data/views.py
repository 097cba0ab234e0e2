"""Samples that are looked up when they are asked for: some of others, or the rows of a data set. It reads no file."""

from collections.abc import Callable, Sequence
from typing import Any, overload

from alula.data.sample import Sample


class Chosen(Sequence[Sample]):
    """Some of `samples`, in the order of `indices`; an index may come twice.

    Example:
        >>> both = [Sample.ask("a?", "b"), Sample.ask("c?", "d")]
        >>> [sample.answer for sample in Chosen(both, [1, 0, 1])[:2]]
        ['d', 'b']
    """

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int]) -> None:
        self.samples = samples
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> "Chosen": ...
    def __getitem__(self, place: int | slice) -> "Sample | Chosen":
        """The sample at `place`, or the samples there, looked up no earlier."""
        if isinstance(place, slice):
            return Chosen(self.samples, self.indices[place])
        return self.samples[self.indices[place]]


class Rows(Sequence[Sample]):
    """The rows of a ``datasets.Dataset`` as samples; each row is read when its sample is asked for.

    Args:
        table: the data set in its arrow format, which gives images as they are stored; or with a transform, which gives dicts.
        to_sample: the sample of a row (as a dict) and its number from 1.
    """

    def __init__(self, table: Any, to_sample: Callable[[dict[str, Any], int], Sample]) -> None:
        self._table = table
        self._to_sample = to_sample

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Chosen: ...
    def __getitem__(self, place: int | slice) -> Sample | Chosen:
        """The sample at `place`, or the samples there, looked up no earlier."""
        whole = range(len(self))[place]
        if isinstance(whole, range):
            return Chosen(self, whole)
        found = self._table[whole]
        return self._to_sample(found if isinstance(found, dict) else found.to_pylist()[0], whole + 1)
