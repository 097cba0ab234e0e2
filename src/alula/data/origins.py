"""What files are called in messages: their names, with folders only where names are not enough."""

from collections.abc import Sequence
from pathlib import Path


def shortest_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Each path's name, with as few of its folders as tell it from the others; a path that another one ends with stays as it is.

    Example:
        >>> shortest_names([Path("d/a/train.jsonl"), Path("d/b/train.jsonl"), Path("d/b/test.jsonl")]).values()
        dict_values(['a/train.jsonl', 'b/train.jsonl', 'test.jsonl'])
    """

    def short(path: Path) -> str:
        others = [other for other in paths if other != path]
        ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
        found = next((end for end in ends if all(other.parts[-len(end) :] != end for other in others)), path.parts)
        return Path(*found).as_posix()

    return {path: short(path) for path in paths}
