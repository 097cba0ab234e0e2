"""A grid: a recipe and the factors that are varied in it. Each point is a recipe of its own, checked before anything runs."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alula.config import Recipe, check_recipe, read_raw
from alula.data.checking import check
from alula.data.choices import Strict
from alula.errors import UserError, nearest
from alula.overrides import put_change
from alula.report.outcomes import AVERAGE
from alula.running.cells import check_methods
from alula.running.choices import check_model, check_tasks
from alula.running.shots import shot_family, shot_name

KEY = "grid"
LONGEST = 200
"""Letters of a point's name: file systems take 255 bytes, and seed and order follow."""


class GridChoice(Strict):
    """What is varied; a recipe's key ``grid``."""

    design: Literal["full", "half", "one_at_a_time"] = "full"
    """``full``: every level with every other. ``half``: of factors with two levels the points in which an even number of them stands at its
    second, so that (from four factors on) no effect is mixed up with another or with how two go together. ``one_at_a_time``: the first
    level of each factor, then one factor changed at a time."""

    factors: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)
    """Of each factor the levels, and of each level what it changes: paths of the recipe and their values. In short
    ``train.steps: [10, 20]``: a path, which is the factor's name, and its values, of which one with a ``name`` is called by that."""

    expected: list[str] = Field(default_factory=list)
    """Factors in the order in which they are expected to matter: the page says whether they do."""

    steps: list[str] = Field(default_factory=list)
    """Factors whose levels stand in an order, each with something more than the one before: the page shows each step."""

    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    """Groups of tasks, as ``documents: [digits, charts]``: the mean over each is an outcome."""

    outcome: list[str] = Field(default_factory=list)
    """What the page's sentences are about, one or several: ``average score``, a task, a group, or ``4shot``, the mean over all tasks with
    so many examples (see ``evaluation.shots``). Default: the average score."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        uneven = {name: len(levels) for name, levels in self.factors.items() if len(levels) != 2}
        if self.design == "half" and (uneven or len(self.factors) < 3):
            raise ValueError(f"design half takes three factors or more with two levels each; came {uneven or len(self.factors)}. Take full")
        return self

    @field_validator("outcome", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("factors", mode="before")
    @classmethod
    def _in_full(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {str(name): _levels(str(name), levels) for name, levels in value.items()}

    @field_validator("factors")
    @classmethod
    def _are_factors(cls, factors: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
        for name, levels in factors.items():
            if len({in_folder(level) for level in levels}) < max(2, len(levels)):
                wanted = "two or more that differ in letters or digits are wanted"
                raise ValueError(f"the factor {name!r} has the levels {list(levels)}; {wanted}")
        return factors


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid.

    Attributes:
        label: what it is called in folders and reports.
        levels: of each factor.
    """

    label: str
    levels: dict[str, str]
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid whose points are all valid recipes."""

    choice: GridChoice
    points: tuple[Point, ...]

    def about(self) -> dict[str, Any]:
        """What a report needs to know of it."""
        return {
            "design": self.choice.design,
            "factors": {name: list(levels) for name, levels in self.choice.factors.items()},
            "expected": self.choice.expected,
            "steps": self.choice.steps,
            "groups": self.choice.groups,
            "outcome": self.choice.outcome,
            "points": [{"label": point.label, "levels": point.levels} for point in self.points],
        }


def read_grid(path: Path | str, *, changes: Iterable[str] | None = None) -> Grid:
    """The grid in a YAML file: a recipe with a key ``grid``.

    Raises:
        UserError: as `read_recipe`; a path that leads nowhere, a point that is no valid recipe or whose parts do not fit (with the
            arithmetic), several methods, or a factor, task or outcome that is named and not there.
    """
    raw = read_raw(path, changes=changes)
    if KEY not in raw:
        raise UserError(f"{path}: '{KEY}' is missing, the factors of the grid. Add it, as in grid: {{factors: {{train.steps: [10, 20]}}}}.")
    choice = check(GridChoice, raw.pop(KEY), str(path), path=(KEY,))
    points = tuple(_point(raw, choice, levels, where=str(path)) for levels in _combinations(choice))
    _refuse_equal(points, where=str(path))
    for key in ("expected", "steps"):
        _refuse_unknown(getattr(choice, key), choice.factors, what="factor", where=f"{path}: '{KEY}.{key}'")
    for point in points:
        place, known = f"{path}, point {point.label}", _outcomes(point.recipe)
        for name, members in choice.groups.items():
            _refuse_unknown(members, _tasks(point.recipe), what="task", where=f"{place}: '{KEY}.groups.{name}'")
            if name in known:
                raise UserError(f"{path}: '{KEY}.groups' has a group '{name}', which is the name of another outcome. Rename the group.")
        _refuse_unknown(choice.outcome, [*known, *choice.groups], what="outcome", where=f"{place}: '{KEY}.outcome'")
    return Grid(choice=choice, points=points)


def _refuse_equal(points: Iterable[Point], *, where: str) -> None:
    """Refuses two points with one recipe: a factor whose levels say the same would look as if it did not matter."""
    seen: dict[str, str] = {}
    for point in points:
        (method,) = point.recipe.methods
        recipe = point.recipe.model_copy(update={"methods": [method.model_copy(update={"label": None})]})
        first = seen.setdefault(recipe.model_dump_json(), point.label)
        if first != point.label:
            raise UserError(f"{where}: points {first} and {point.label} are the same recipe. Give levels that differ, or leave one out.")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], *, what: str, where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{where} names an unknown {what} '{name}'. {nearest(name, known)}")


def _tasks(recipe: Recipe) -> list[str]:
    return [choice.name for choice in (*recipe.tasks, *recipe.base_tasks)]


def _outcomes(recipe: Recipe) -> list[str]:
    """What the page of a grid of such recipes can be about, besides groups."""
    names, shots = _tasks(recipe), recipe.evaluation.shots
    return [AVERAGE, *names, *map(shot_family, shots), *(shot_name(name, count) for count in shots for name in names)]


def in_folder(level: str) -> str:
    """A level's name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", level).strip("-.")


def _levels(name: str, levels: Any) -> Any:
    """Levels that were a bare list: the factor's name is the path that they change."""
    if not isinstance(levels, list):
        return {str(level): changes for level, changes in levels.items()} if isinstance(levels, Mapping) else levels
    named = [str(_named(value)) for value in levels]
    if len(set(named)) < len(named) or any(_holds_mapping(_named(value)) for value in levels):
        raise ValueError(f"the factor {name!r} has levels without a name of their own; name them: {name}: {{level: {{{name}: value}}}}")
    return {level: {name: value} for level, value in zip(named, levels, strict=True)}


def _named(value: Any) -> Any:
    """What a level in a bare list is called: by its ``name``, or as it is."""
    return value["name"] if isinstance(value, Mapping) and "name" in value else value


def _holds_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(map(_holds_mapping, value)))


def _combinations(choice: GridChoice) -> list[dict[str, str]]:
    if choice.design != "one_at_a_time":
        whole = [dict(zip(choice.factors, levels, strict=True)) for levels in product(*choice.factors.values())]
        return whole if choice.design == "full" else [point for point in whole if _is_even(choice, point)]
    base = {name: next(iter(levels)) for name, levels in choice.factors.items()}
    return [base, *({**base, name: level} for name, levels in choice.factors.items() for level in list(levels)[1:])]


def _is_even(choice: GridChoice, point: dict[str, str]) -> bool:
    return sum(list(choice.factors[name]).index(level) for name, level in point.items()) % 2 == 0


def _point(raw: dict[str, Any], choice: GridChoice, levels: dict[str, str], *, where: str) -> Point:
    label = "_".join(in_folder(level) for level in levels.values())
    if len(label) > LONGEST:
        raise UserError(f"{where}: {len(label)} letters came as the name of point {label[:40]}...; {LONGEST} fit. Give levels short names.")
    place, own = f"{where}, point {label}", copy.deepcopy(raw)
    for name, level in levels.items():
        for path, value in choice.factors[name][level].items():
            if path.startswith("model.") and isinstance(own.get("model", "smol"), str):
                own["model"] = {"backbone": own.get("model", "smol")}
            put_change(own, path, copy.deepcopy(value))
    recipe = check_recipe(own, where=place)
    if len(recipe.methods) > 1:
        raise UserError(f"{where}: {len(recipe.methods)} methods came; a grid has one. Make the method a factor: methods.0.")
    (method,) = recipe.methods
    recipe = recipe.model_copy(update={"methods": [method.model_copy(update={"label": label})]})
    try:
        check_methods(recipe)
        check_tasks(recipe)
        check_model(recipe)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Point(label=label, levels=levels, recipe=recipe)
