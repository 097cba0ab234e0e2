"""The recipe of a run: pydantic models, YAML in, resolved YAML out. It knows names, not the things they stand for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from alula.errors import UserError, nearest
from alula.training.settings import TrainSettings

Checked = TypeVar("Checked", bound=BaseModel)


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

    scoring: Literal["exact_match", "ranked", "bits_per_byte"] = "exact_match"
    """For data of one's own: exact_match of the greedy answer, ranked likelihood of each row's options, or prose."""

    train_size: int | None = Field(None, ge=1)
    """Training samples at most; None: all."""

    test_size: int | None = Field(None, ge=1)
    """Test samples at most; None: all."""


class MethodChoice(Strict):
    """A method with its options."""

    name: str
    """See `alula list`."""

    label: str | None = Field(None, repr=False, pattern=r"^[\w.-]+$")
    """What it is called in folders and reports, of letters, digits, ``_``, ``-`` and ``.``; None: its name."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the method's class."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Training settings of this method alone, over those of the recipe."""

    @property
    def shown(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


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

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's weights: auto, float32, bfloat16 or float16. On a CPU auto is float32."""

    tasks: list[TaskChoice] = Field(min_length=1)
    """The stream, in order."""

    base_tasks: list[TaskChoice] = Field(default_factory=list)
    """What the base model can do already: scored, never trained."""

    methods: list[MethodChoice] = Field(min_length=1)
    """Each is run for each seed. One that comes twice, with other options, needs labels."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    """One run of each method per seed (0 or more)."""

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


def read_recipe(path: Path | str, *, changes: Iterable[str] | None = None) -> Recipe:
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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}. A UTF-8 text file with YAML is wanted.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}). Correct that line.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {_kind(raw)} came, a mapping with 'tasks' and 'methods' is wanted. Write one.")
    for change in changes or []:
        _set(raw, *_split(change))
    return check_recipe(raw, where=str(path))


def check_recipe(raw: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """`raw` as a recipe.

    Raises:
        UserError: an unknown key (with the nearest known), a bad value, or the same task, method or seed twice.
    """
    recipe = _check(Recipe, raw, where)
    for number, choice in enumerate(recipe.methods):
        _check(TrainSettings, recipe.train.model_dump() | choice.train, where, path=("methods", number, "train"))
    tasks = [choice.name for choice in (*recipe.tasks, *recipe.base_tasks)]
    _refuse_twice(where, "task", tasks, "Each task needs a name of its own: rename one.")
    methods = [choice.shown for choice in recipe.methods]
    _refuse_twice(where, "method", methods, "Give each of them a 'label' of its own: its results go into a folder of that name.")
    _refuse_twice(where, "seed", [str(seed) for seed in recipe.seeds], "It would be the same run: take one out.")
    return recipe


def write_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_task(**fields: Any) -> TaskChoice:
    """The fields of a `TaskChoice`, checked.

    Raises:
        UserError: a bad value.
    """
    return _check(TaskChoice, fields, "task")


def check_train(raw: dict[str, Any]) -> TrainSettings:
    """`raw` as training settings.

    Raises:
        UserError: an unknown key (with the nearest known) or a bad value.
    """
    return _check(TrainSettings, raw, "training settings")


def parse_settings(changes: Iterable[str]) -> dict[str, Any]:
    """``steps=200`` and the like as training settings, not yet checked.

    Raises:
        UserError: no ``=``, or a value that is not YAML.
    """
    return dict(_split(change) for change in changes)


def _check(kind: type[Checked], raw: Any, where: str, *, path: tuple[str | int, ...] = ()) -> Checked:
    """`raw`, found at `path` of `where`, as a `kind`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, kind, where, path) for problem in error.errors())) from error


def _explain(problem: Any, kind: type[BaseModel], where: str, path: tuple[str | int, ...]) -> str:
    location = problem["loc"]
    place = ".".join(str(part) for part in (*path, *location))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{place}'. {nearest(str(location[-1]), _known_keys(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: '{place}' is missing. Add it."
    given = repr(problem["input"])
    shown = given if len(given) <= 80 else f"{given[:77]}..."
    return f"{where}: '{place}' is {shown}: {problem['msg']}. Correct the value."


def _known_keys(kind: Any, location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            annotation = kind.model_fields[part].annotation
            kind = next((inner for inner in get_args(annotation) if isinstance(inner, type)), annotation)
    return list(kind.model_fields)


def _refuse_twice(where: str, what: str, names: list[str], remedy: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: the {what} {', '.join(repr(name) for name in twice)} comes twice. {remedy}")


def _split(change: str) -> tuple[str, Any]:
    path, equals, value = change.partition("=")
    if not equals or not path:
        raise UserError(f"'{change}' came for --set; name=value is wanted, as in train.steps=100 (recipe) or steps=100 (learn, align).")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"'{change}' came for --set; '{value}' is not valid YAML. Put quotes around it.") from error


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    """Puts `value` at ``methods.0.options.rank`` and the like; a task or method that is a bare name becomes a mapping."""
    *parents, last = path.split(".")
    place: Any = raw
    for depth, part in enumerate(parents):
        key = _key(place, part, path, depth)
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        elif isinstance(place, list) and isinstance(place[key], str):
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


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"
