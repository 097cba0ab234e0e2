"""The recipe of a run: pydantic models, YAML in, resolved YAML out. It knows names, not the things they stand for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from alula.data.checking import check
from alula.data.choices import Strict, TaskChoice
from alula.errors import UserError, nearest
from alula.evaluation.settings import EvaluationSettings
from alula.overrides import put_change, split_change
from alula.training.deepspeed_settings import with_deepspeed
from alula.training.settings import TrainSettings

Part = str | dict[str, Any]


class ModelChoice(Strict):
    """A model out of parts (see `alula.models.composition.compose`), or a whole one that is changed."""

    backbone: str = "smol"
    """``smol``, a folder or a name on the hub: of a causal LM; without `encoder` of a whole vision-language model."""

    encoder: Part | list[Part] | None = None
    """As in `compose`; ``weights: smol`` in it takes those of the embedded default."""

    connector: Part | list[Part] = "mlp"
    """As in `compose`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of `compose`: crops, mixing, router, instruction_encoder."""

    upcycle: dict[str, Any] | None = None
    """Keywords of `alula.experts.upcycling.upcycle`, which makes feed-forward networks sparse; None: they stay as they are."""

    seed: int = Field(0, ge=0)
    """Of all fresh weights: every cell of a run starts from the same model."""

    def __str__(self) -> str:
        """Made of what is not at its default: a cell's identity is made of this text, and must not change with alula."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)


class AdditionChoice(Strict):
    """What is added to a method, with its options."""

    name: str
    """See `alula list`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the addition's class."""


class MethodChoice(Strict):
    """A method with its options."""

    name: str
    """See `alula list`."""

    label: str | None = Field(None, repr=False, pattern=r"^[\w.-]+$")
    """What it is called in folders and reports, of letters, digits, ``_``, ``-`` and ``.``; None: its name."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the method's class."""

    additions: list[AdditionChoice] = Field(default_factory=list, alias="with", repr=False)
    """Added to the method, in the order in which they work; the key in YAML is ``with``."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Training settings of this method alone, over those of the recipe."""

    orders: list[Annotated[int, Field(ge=0)]] | None = Field(None, repr=False, min_length=1)
    """Which of the recipe's orders it runs, by their numbers from 0; None: all of them."""

    joint: bool = Field(False, repr=False)
    """Train on all tasks at once, as one task named ``joint``. One order then says all there is: it runs its first one."""

    @field_validator("additions", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return _named(value)

    @property
    def shown(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class TrainChoice(TrainSettings):
    """How the tasks of a run are trained."""

    pack: int | None = Field(None, ge=1)
    """Tokens of a row in which samples stand one after another without seeing each other (1 or more); None: one sample a row, padded."""


class Recipe(Strict):
    """A whole run: stream, methods, seeds."""

    model: str | ModelChoice = "smol"
    """``smol`` (the embedded default), a folder, a name on the hub, or a model out of parts."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "4bit"] = "auto"
    """Of the model's weights: auto, float32, bfloat16, float16 or 4bit (bitsandbytes). On a CPU auto is float32."""

    tasks: list[TaskChoice] = Field(min_length=1)
    """The stream, in order."""

    orders: list[list[str]] = Field(default_factory=list)
    """Orders in which the tasks are learnt, each a list of all their names; empty: the one of `tasks`."""

    base_tasks: list[TaskChoice] = Field(default_factory=list)
    """What the base model can do already: scored, never trained. Of data of one's own without test rows every row is scored."""

    methods: list[MethodChoice] = Field(min_length=1)
    """Each is run for each seed. One that comes twice, with other options, needs labels."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    """One run of each method and order per seed (0 or more)."""

    train: TrainChoice = Field(default_factory=TrainChoice)
    """Settings of the training loop. ``deepspeed`` among them is a DeepSpeed config, a file or a mapping, that says some of the others."""

    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    """Settings of scoring."""

    cache_images: bool | Path = False
    """Keep what a frozen image encoder makes of each image: below the run folder (true) or in a folder of that name, which runs may share;
    at most 20 GB. For ``smol`` and models out of parts."""

    trackers: list[str] = Field(default_factory=list)
    """Where losses go besides the run folder: tensorboard, wandb ..."""

    examples: int = Field(6, ge=0)
    """Images whose routing is drawn in the report, per routed cell of the first seed."""

    @field_validator("tasks", "base_tasks", "methods", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return _named(value)

    def order(self, number: int) -> list[str]:
        """The names of the tasks in the order of that number."""
        return self.orders[number] if self.orders else [task.name for task in self.tasks]

    def orders_of(self, choice: MethodChoice) -> list[int]:
        """The numbers of the orders that `choice` runs."""
        numbers = choice.orders or list(range(len(self.orders) or 1))
        return numbers[:1] if choice.joint else numbers


def read_recipe(path: Path | str, *, changes: Iterable[str] | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        changes: ``train.steps=100`` and the like, over what the file says.

    Raises:
        UserError: no such file, not YAML (with the line), an unknown key (with the nearest known) or a bad value.
    """
    raw = read_raw(path, changes=changes)
    if "grid" in raw:
        raise UserError(f"{path} is a grid of recipes. Run it with `alula ablate {path}`, or take the key 'grid' out.")
    return check_recipe(raw, where=str(path))


def read_raw(path: Path | str, *, changes: Iterable[str] | None = None) -> dict[str, Any]:
    """What a YAML file with a mapping says, with `changes`, not yet checked.

    Raises:
        UserError: no such file, not YAML (with the line), or no mapping.
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
        came = "an empty file" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"{path}: {came} came, a mapping with 'tasks' and 'methods' is wanted. Write one.")
    for change in changes or []:
        put_change(raw, *split_change(change))
    return raw


def check_recipe(raw: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """`raw` as a recipe; a DeepSpeed config becomes the training settings it stands for.

    Raises:
        UserError: an unknown key (with the nearest known), a bad value, the same task, method, seed or order twice, or an
            order that does not name every task once.
    """
    if isinstance(raw.get("train"), dict):
        raw = raw | {"train": with_deepspeed(raw["train"], kind=TrainChoice, where=where, path=("train",), dtype=raw.get("dtype"))}
    recipe = check(Recipe, raw, where)
    for number, choice in enumerate(recipe.methods):
        check(TrainChoice, recipe.train.model_dump() | choice.train, where, path=("methods", number, "train"))
    tasks = [choice.name for choice in (*recipe.tasks, *recipe.base_tasks)]
    _refuse_twice(where, "task", tasks, "Each task needs a name of its own: rename one.")
    methods = [choice.shown for choice in recipe.methods]
    _refuse_twice(where, "method", methods, "Give each of them a 'label' of its own: its results go into a folder of that name.")
    _refuse_twice(where, "seed", [str(seed) for seed in recipe.seeds], "It would be the same run: take one out.")
    _refuse_twice(where, "number in 'evaluation.shots'", [str(shots) for shots in recipe.evaluation.shots], "Take one out.")
    _check_orders(recipe, where)
    return recipe


def _check_orders(recipe: Recipe, where: str) -> None:
    """Every order names every task once, and every method names orders that are there."""
    tasks, same = [choice.name for choice in recipe.tasks], "It would be the same run: take one out."
    for number, order in enumerate(recipe.orders):
        place = f"{where}: 'orders.{number}'"
        for name in order:
            if name not in tasks:
                raise UserError(f"{place} names an unknown task '{name}'. {nearest(name, tasks)}")
        _refuse_twice(where, f"task in 'orders.{number}'", order, "Name each task once.")
        missing = ", ".join(repr(name) for name in tasks if name not in order)
        if missing:
            raise UserError(f"{place} lacks {missing}. An order names every task once: add what is missing.")
    _refuse_twice(where, "order", [", ".join(order) for order in recipe.orders], same)
    for number, choice in enumerate(recipe.methods):
        wanted, count = choice.orders or [], len(recipe.orders) or 1
        if max(wanted, default=0) >= count:
            raise UserError(f"{where}: 'methods.{number}.orders' is {wanted}, but there are {count}, counted from 0. Correct it.")
        _refuse_twice(where, f"number in 'methods.{number}.orders'", [str(order) for order in wanted], same)


def write_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def check_task(**fields: Any) -> TaskChoice:
    """The fields of a `TaskChoice`, checked.

    Raises:
        UserError: a bad value.
    """
    return check(TaskChoice, fields, "task")


def check_train(raw: dict[str, Any], *, defaults: dict[str, Any] | None = None) -> TrainSettings:
    """`raw` over `defaults` as training settings; a DeepSpeed config becomes those it stands for.

    Raises:
        UserError: an unknown key (with the nearest known) or a bad value.
    """
    return check(TrainSettings, with_deepspeed(raw, where="training settings", defaults=defaults), "training settings")


def parse_settings(changes: Iterable[str]) -> dict[str, Any]:
    """``steps=200`` and the like as training settings, not yet checked.

    Raises:
        UserError: no ``=``, or a value that is not YAML.
    """
    return dict(split_change(change) for change in changes)


def _named(value: Any) -> Any:
    """A list of mappings, of which some were bare names."""
    return [{"name": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value


def _refuse_twice(where: str, what: str, names: list[str], remedy: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: the {what} {', '.join(repr(name) for name in twice)} comes twice. {remedy}")
