"""A grid: a recipe and the factors that are varied in it. Each point is a recipe of its own, checked before anything runs."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from alula.config import Recipe, check_recipe, read_raw
from alula.data.checking import check
from alula.data.choices import Strict
from alula.errors import UserError, nearest
from alula.overrides import put_change
from alula.report.outcomes import AVERAGE
from alula.running.cells import check_methods
from alula.running.choices import check_model
from alula.running.shots import shot_family, shot_name

KEY = "grid"


class GridChoice(Strict):
    """What is varied; a recipe's key ``grid``."""

    design: Literal["full", "one_at_a_time"] = "full"
    """``full``: every level with every other. ``one_at_a_time``: the first level of each factor, then one factor changed at a time."""

    factors: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)
    """Of each factor the levels, and of each level what it changes: paths of the recipe and their values. In short
    ``train.steps: [10, 20]``: a path, which is the factor's name, and its values."""

    expected: list[str] = Field(default_factory=list)
    """Factors in the order in which they are expected to matter: the page says whether they do."""

    outcome: str | None = None
    """What the page's sentences are about: ``average score``, a task, or ``4shot``, the mean over all tasks with so many examples
    (see ``evaluation.shots``); None: the average score."""

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
            "outcome": self.choice.outcome,
            "points": [{"label": point.label, "levels": point.levels} for point in self.points],
        }


def read_grid(path: Path | str, *, changes: Iterable[str] | None = None) -> Grid:
    """The grid in a YAML file: a recipe with a key ``grid``.

    Raises:
        UserError: as `read_recipe`; a path that leads nowhere, a point that is no valid recipe or whose parts do not fit (with the
            arithmetic), several methods, or an expected factor that is not there.
    """
    raw = read_raw(path, changes=changes)
    if KEY not in raw:
        raise UserError(f"{path}: '{KEY}' is missing, the factors of the grid. Add it, as in grid: {{factors: {{train.steps: [10, 20]}}}}.")
    choice = check(GridChoice, raw.pop(KEY), str(path), path=(KEY,))
    for name in choice.expected:
        if name not in choice.factors:
            raise UserError(f"{path}: '{KEY}.expected' names an unknown factor '{name}'. {nearest(name, choice.factors)}")
    points = tuple(_point(raw, choice, levels, where=str(path)) for levels in _combinations(choice))
    for point in points if choice.outcome else ():
        known = _outcomes(point.recipe)
        if choice.outcome not in known:
            raise UserError(f"{path}, point {point.label}: '{KEY}.outcome' is '{choice.outcome}'. {nearest(str(choice.outcome), known)}")
    return Grid(choice=choice, points=points)


def _outcomes(recipe: Recipe) -> list[str]:
    """What the page of a grid of such recipes can be about."""
    names, shots = [choice.name for choice in (*recipe.tasks, *recipe.base_tasks)], recipe.evaluation.shots
    return [AVERAGE, *names, *map(shot_family, shots), *(shot_name(name, count) for count in shots for name in names)]


def in_folder(level: str) -> str:
    """A level's name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", level).strip("-.")


def _levels(name: str, levels: Any) -> Any:
    """Levels that were a bare list: the factor's name is the path that they change."""
    if isinstance(levels, list):
        return {_named(value): {name: value} for value in levels}
    return {str(level): changes for level, changes in levels.items()} if isinstance(levels, Mapping) else levels


def _named(value: Any) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else str(value)


def _combinations(choice: GridChoice) -> list[dict[str, str]]:
    if choice.design == "full":
        return [dict(zip(choice.factors, levels, strict=True)) for levels in product(*choice.factors.values())]
    base = {name: next(iter(levels)) for name, levels in choice.factors.items()}
    return [base, *({**base, name: level} for name, levels in choice.factors.items() for level in list(levels)[1:])]


def _point(raw: dict[str, Any], choice: GridChoice, levels: dict[str, str], *, where: str) -> Point:
    label = "_".join(in_folder(level) for level in levels.values())
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
        check_model(recipe)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Point(label=label, levels=levels, recipe=recipe)
