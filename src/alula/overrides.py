"""``--set path=value``: single values over what a recipe's file says. It knows no recipe, only what YAML can hold."""

from typing import Any

import yaml

from alula.errors import UserError

PARTS = ("encoder", "connector")
"""Keys of a model out of parts whose value may be a bare name."""


def split_change(change: str) -> tuple[str, Any]:
    """``train.steps=100`` as a path and a value.

    Raises:
        UserError: no ``=``, or a value that is not YAML.
    """
    path, equals, value = change.partition("=")
    if not equals or not path:
        raise UserError(f"'{change}' came for --set; name=value is wanted, as in train.steps=100 (recipe) or steps=100 (learn, align).")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"'{change}' came for --set; '{value}' is not valid YAML. Put quotes around it.") from error


def put_change(raw: dict[str, Any], path: str, value: Any) -> None:
    """Puts `value` at ``methods.0.options.rank`` and the like; a task, method or part that is a bare name becomes a mapping.

    Raises:
        UserError: the path leads nowhere.
    """
    *parents, last = path.split(".")
    place: Any = raw
    for depth, part in enumerate(parents):
        key = _key(place, part, path, depth)
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        elif (isinstance(place, list) or key in PARTS) and isinstance(place[key], str):
            place[key] = {"name": place[key]}
        place = place[key]
    place[_key(place, last, path, len(parents))] = value


def _key(place: Any, part: str, path: str, depth: int) -> Any:
    if isinstance(place, dict):
        return part
    above = ".".join(path.split(".")[:depth])
    if not isinstance(place, list):
        raise UserError(f"'{path}' came for --set, but '{above}' is {place!r} and holds nothing. Shorten the path.")
    if not part.isdigit() or int(part) >= len(place):
        wanted = f"a number from 0 to {len(place) - 1} is wanted, not '{part}'"
        raise UserError(f"'{path}' came for --set, but '{above}' is a list of {len(place)}: {wanted}. Correct the path.")
    return int(part)
