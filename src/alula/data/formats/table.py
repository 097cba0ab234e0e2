"""What a format is, and which one a path has. It knows no single format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alula.data.sample import BadRow
from alula.errors import UserError
from alula.registry import Registry

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a file, or why it cannot be read.

    Attributes:
        origin: ``file.jsonl:12``: the line, or the number of the row from 1.
    """

    origin: str
    row: Any | BadRow


class Format(ABC):
    """How the rows of one file, or of one folder that is read as one, are found.

    Attributes:
        endings: of its files.
        marker: the file that a folder of this format holds; empty: it is no folder.
    """

    endings: ClassVar[tuple[str, ...]] = ()
    marker: ClassVar[str] = ""

    @abstractmethod
    def rows(self, path: Path) -> Iterator[Line]:
        """Every row of `path` in order; what is wrong with one row is a line.

        Raises:
            UserError: the file cannot be read at all, or not to its end.
        """

    def open(self, path: Path) -> "Dataset | None":
        """`path` as a data set whose rows are read when they are needed; None: rows are kept in memory."""
        return None


FORMATS: Registry[type[Format]] = Registry("format")


def endings() -> tuple[str, ...]:
    """Of all files that can be read."""
    return tuple(ending for name in FORMATS for ending in FORMATS[name].endings)


def find_format(path: Path, *, name: str | None = None) -> Format:
    """The format called `name`; None: the one that the marker of a folder or the ending of a file tells.

    Raises:
        UserError: an unknown name, nothing there, or neither tells.
    """
    if name is None:
        name = next((one for one in FORMATS if _is_of(path, FORMATS[one])), None)
    if name is None and (path.is_dir() or not path.suffix):
        what = "is a folder without data that is known" if path.is_dir() else "has no ending"
        raise UserError(f"{path} {what}. Known formats: {', '.join(FORMATS)}. Name the data file itself, or the format.")
    if name is None:
        raise UserError(f"{path}: unknown ending '{path.suffix}'. Known: {', '.join(endings())}. Convert the file, or name its format.")
    found = FORMATS[name]()
    if not path.exists():
        raise UserError(f"No file {path}. Check the path; relative paths start at {Path.cwd()}.")
    return found


def _is_of(path: Path, format: type[Format]) -> bool:
    return path.name.endswith(format.endings) or (bool(format.marker) and (path / format.marker).is_file())


def read_lines(path: Path, *, format: str | None = None) -> Iterator[Line]:
    """The lines of one file, with the unreadable ones.

    Raises:
        UserError: as `find_format`; the file cannot be read at all, or not to its end.
    """
    yield from find_format(path, name=format).rows(path)
