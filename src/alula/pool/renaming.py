"""Names of modules that another version of Transformers gave. It knows names, no model and no file."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from alula.errors import UserError
from alula.peft_format import few


def rename(path: str, renamed: Mapping[str, str]) -> str:
    """`path` with each old run of whole segments replaced where it first stands, in the order of `renamed`.

    Example:
        >>> rename("model.layers.0.self_attn.q_proj", {"model.layers": "model.language_model.layers"})
        'model.language_model.layers.0.self_attn.q_proj'
    """
    for old, new in renamed.items():
        path = f".{path}.".replace(f".{old}.", f".{new}.", 1)[1:-1]
    return path


def guess(missing: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """What may have been renamed, if one rule explains all that is missing; else nothing.

    Example:
        >>> guess(["model.layers.0.self_attn.q_proj"], ["model.text.layers.0.self_attn.q_proj", "model.text.layers.1.self_attn.q_proj"])
        {'model': 'model.text'}
    """
    known = [path.split(".") for path in there]
    rules = {_difference(path.split("."), max(known, key=lambda other: _shared(path.split("."), other))) for path in missing if known}
    return {".".join(old): ".".join(new) for old, new in rules} if len(rules) == 1 else {}


def check_there(paths: Iterable[str], there: Collection[str], *, what: Path) -> None:
    """Refuses layers that the model does not have, and says what may have become of them.

    Args:
        what: the expert's folder, in ``experts`` of its pool.

    Raises:
        UserError: with the layers, and the command that helps.
    """
    missing = sorted(set(paths) - set(there))
    if missing:
        rules = guess(missing, there) or {"OLD": "NEW"}
        rule = " ".join(f"{old}={new}" for old, new in rules.items())
        raise UserError(
            f"{what} adapts {len(missing)} layers that this model does not have: {few(missing)}. Its own are named like "
            f"{next(iter(there))}. If another version of transformers renamed them: alula remap {what.parents[1]} {rule}"
        )


def rules_for(paths: Collection[str], there: Collection[str], renamed: Mapping[str, str], *, what: str) -> dict[str, str]:
    """The rules that `paths` need to be in the model: none, or `renamed`.

    Raises:
        UserError: they are not there by these rules either.
    """
    if set(paths) <= set(there):
        return {}
    missing = sorted({rename(path, renamed) for path in paths} - set(there))
    if missing:
        raise UserError(
            f"By these rules {what} still has {len(missing)} layers that the model does not: {few(missing)}. "
            "A rule is OLD=NEW, whole parts of a name between dots: correct it."
        )
    return dict(renamed)


def _tail(one: list[str], other: list[str]) -> int:
    """Segments at the end that both have in common; at least the first of each is left out."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def _shared(one: list[str], other: list[str]) -> tuple[int, int]:
    return _tail(one, other), _tail(one[::-1], other[::-1])


def _difference(old: list[str], new: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is left of both without the common end, then without the common beginning."""
    end = _tail(old, new)
    old, new = old[: len(old) - end], new[: len(new) - end]
    start = _tail(old[::-1], new[::-1])
    return tuple(old[start:]), tuple(new[start:])
