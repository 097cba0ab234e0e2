"""The recipe of a run: pydantic models, YAML in, resolved YAML out. It knows names, not the things they stand for."""

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from alula.errors import UserError, nearest
from alula.training.settings import TrainSettings


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TaskChoice(Strict):
    """A built-in task, or a user's data."""

    name: str
    """The task's name: of a built-in task (see `alula list`), or any if `path` is given."""

    path: Path | None = None
    """A data file (.json, .jsonl, .parquet) or a folder with train and test files; None for a built-in task."""

    test_path: Path | None = None
    """A file of test rows; None: a tenth of the data is held out."""

    scoring: str = "exact_match"
    """For data of one's own: exact_match of the greedy answer, or ranked likelihood of each row's options."""

    train_size: int | None = Field(None, ge=1)
    """Training samples at most; None: all."""

    test_size: int | None = Field(None, ge=1)
    """Test samples at most; None: all."""


class MethodChoice(Strict):
    """A method with its options."""

    name: str
    """See `alula list`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the method's class."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Training settings of this method alone, over those of the recipe."""


class EvaluationSettings(Strict):
    """How the model is scored after each task."""

    batch_size: int = Field(32, ge=1)
    """Samples per forward."""

    future_tasks: bool = True
    """Also score tasks that are not learnt yet: needed for forward transfer, costs time."""


class Recipe(Strict):
    """A whole run: stream, methods, seeds."""

    model: str = "smol"
    """``smol`` (the embedded default), a folder, or a name on the hub."""

    dtype: str = "auto"
    """Of the model's weights: auto, float32, bfloat16 or float16. On a CPU auto is float32."""

    tasks: list[TaskChoice]
    """The stream, in order."""

    base_tasks: list[TaskChoice] = Field(default_factory=list)
    """What the base model can do already: scored, never trained."""

    methods: list[MethodChoice]
    """Each is run for each seed."""

    seeds: list[int] = Field(default_factory=lambda: [0])
    """One run of each method per seed."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """Settings of the training loop."""

    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    """Settings of scoring."""

    trackers: list[str] = Field(default_factory=list)
    """Where losses go besides the run folder: tensorboard, wandb ..."""

    examples: int = Field(6, ge=0)
    """Images whose routing is drawn in the report, per routed cell of the first seed."""

    @field_validator("tasks", "base_tasks", "methods", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value


def read_recipe(path: Path | str, *, changes: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        changes: ``train.steps=100`` and the like, over what the file says.

    Raises:
        UserError: no such file, not YAML (with the line), an unknown key (with the nearest known) or a bad value.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"No recipe {path}. Check the path; relative paths start at {Path.cwd()}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}). Correct that line.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a {type(raw).__name__} came, a mapping with 'tasks' and 'methods' is wanted.")
    for change in changes or []:
        _set(raw, change)
    return check_recipe(raw, where=str(path))


def check_recipe(raw: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """`raw` as a recipe.

    Raises:
        UserError: an unknown key (with the nearest known) or a bad value.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, where) for problem in error.errors())) from error


def write_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set(raw: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"'{change}' came for --set; path=value is wanted, as in train.steps=100.")
    *parents, last = path.split(".")
    place: Any = raw
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
    place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)


def _explain(problem: Any, where: str) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{place}'. {nearest(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: '{place}' is missing. Add it."
    return f"{where}: '{place}' is {problem['input']!r}: {problem['msg']}. Correct the value."


def _known_keys(location: tuple) -> list[str]:
    kind: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        kind = next((inner for inner in get_args(annotation) if isinstance(inner, type)), annotation)
    return list(kind.model_fields)


def check_train(raw: dict[str, Any]) -> TrainSettings:
    """`raw` as training settings.

    Raises:
        UserError: an unknown key (with the nearest known) or a bad value.
    """
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        known = TrainSettings.model_fields
        raise UserError(
            "\n".join(
                f"Unknown setting '{problem['loc'][0]}'. {nearest(str(problem['loc'][0]), known)}"
                if problem["type"] == "extra_forbidden"
                else f"Setting '{problem['loc'][0]}' is {problem['input']!r}: {problem['msg']}. Correct the value."
                for problem in error.errors()
            )
        ) from error
