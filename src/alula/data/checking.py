"""Raw values as pydantic models; what is wrong with them, in sentences that name the place and the nearest known key."""

import builtins
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from alula.errors import UserError, nearest

Checked = TypeVar("Checked", bound=BaseModel)


def check(kind: type[Checked], raw: Any, where: str, *, path: tuple[str | int, ...] = ()) -> Checked:
    """`raw`, found at `path` of `where`, as a `kind`.

    Raises:
        UserError: an unknown key (with the nearest known), a bad value or a missing one.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, kind, where, path) for problem in _one_per_place(error, kind))) from error


def _one_per_place(error: ValidationError, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The problems; of a value that may be one of several types, what each of them wants in one, or what is wrong inside it."""
    found: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for problem in error.errors():
        place = _place(problem["loc"], kind, is_unknown=problem["type"] == "extra_forbidden")
        first = found.setdefault(place, {**problem, "loc": place})
        if len(place) < len(problem["loc"]) and first["msg"] != problem["msg"]:
            first["msg"] += f", or {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return [one for place, one in found.items() if not any(other[: len(place)] == place != other for other in found)]


def _place(location: tuple[str | int, ...], kind: type[BaseModel] | None, *, is_unknown: bool) -> tuple[str | int, ...]:
    """Without the names of types, by which pydantic tells apart what a value may be: ``float``, ``literal['mm1']``, ``ModelChoice``."""
    kept: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(part, int) or (is_unknown and index == len(location) - 1):
            kept.append(part)
        elif kind is None or part in _by_key(kind):
            kept += [part] if part.isidentifier() and not hasattr(builtins, part) else []
            kind = _model_in(_by_key(kind)[part]) if kind else None
    return tuple(kept)


def _explain(problem: Any, kind: type[BaseModel], where: str, path: tuple[str | int, ...]) -> str:
    location = problem["loc"]
    place = ".".join(str(part) for part in (*path, *location))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{place}'. {nearest(str(location[-1]), _known_keys(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: '{place}' is missing. Add it."
    given, said = repr(problem["input"]), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict | list | None):  # it says what of them is wrong
        return f"{where}: '{place}': {said}. Correct it."
    shown = given if len(given) <= 80 else f"{given[:77]}..."
    return f"{where}: '{place}' is {shown}: {said}. Correct the value."


def _known_keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            kind = _model_in(_by_key(kind)[part]) or kind
    return list(_by_key(kind))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model of ``str | Model``, ``list[Model]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _by_key(kind: Any) -> dict[str, Any]:
    """The types of a model's fields, by the key a recipe has for them."""
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
