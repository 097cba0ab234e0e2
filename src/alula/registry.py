"""Name -> class tables. A new method, router, task ... is one new file and one import line in its room."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from alula.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of everything of one kind, by name.

    Example:
        >>> shapes: Registry[type] = Registry("shape")
        >>> @shapes.register("circle")
        ... class Circle: ...
        >>> shapes["circle"].__name__
        'Circle'
        >>> shapes["circel"]
        Traceback (most recent call last):
        ...
        alula.errors.UserError: Unknown shape 'circel'. Known: circle. Did you mean 'circle'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters what it decorates under `name`; a name is taken once."""

        def enter(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} '{name}' is registered twice"
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(f"Unknown {self.kind} '{name}'. {nearest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
