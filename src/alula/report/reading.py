"""The run folder as it lies on disk. What is missing is empty, what cannot be read is named, nothing is computed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from alula.errors import UserError
from alula.files import read_json, read_jsonl

T = TypeVar("T")
Row = dict
CELL_NAME = re.compile(r"^(?P<method>.+)-seed(?P<seed>\d+)(?:-order(?P<order>\d+))?(?P<rest>.*)$")
ORDER = "order.json"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method with one seed in one order: a folder below ``cells/``.

    Attributes:
        order: number of its task order; 0 is the recipe's.
        tasks: the stream in its order, from ``order.json`` or else the recipe; empty where neither tells.
        state: ``finished``, ``crashed`` or ``unfinished`` (still running, or killed).
        error: what it crashed with; empty otherwise.
        scores: lines of ``scores.jsonl``; `cost`, `routing` and `examples` likewise, empty where the file is missing.
    """

    name: str
    method: str
    seed: int
    folder: Path
    state: str
    order: int = 0
    tasks: tuple[str, ...] = ()
    error: str = ""
    scores: tuple[Row, ...] = ()
    cost: tuple[Row, ...] = ()
    routing: tuple[Row, ...] = ()
    examples: tuple[Row, ...] = ()
    done: Row = field(default_factory=dict)

    @property
    def place(self) -> tuple[int, int]:
        """Seed and order."""
        return self.seed, self.order

    @property
    def shown(self) -> str:
        """Which of a method's cells it is: ``seed 1``, or ``seed 1, order 2``."""
        return f"seed {self.seed}" + (f", order {self.order}" if self.order else "")

    @property
    def arms(self) -> list[str]:
        """Ways of using the trained model, in the order of the scores. Row 0 belongs to none: it is the base model."""
        trained = [row["arm"] for row in self.scores if row["row"] > 0]
        return list(dict.fromkeys(trained or [row["arm"] for row in self.scores]))

    @property
    def shots(self) -> dict[str, Row]:
        """The scores of the untouched model on tasks with solved examples before each question, by task."""
        return {row["task"]: row for row in self.scores if row["row"] == 0 and row.get("shots") is not None}

    def predictions_path(self, row: int, arm: str, task: str) -> Path:
        """Where the predictions behind one score are."""
        return self.folder / "predictions" / f"row{row:02d}" / arm / f"{task}.jsonl"

    def predictions(self, row: int, arm: str, task: str) -> list[Row]:
        """The predictions behind one score; empty where the file is missing."""
        path = self.predictions_path(row, arm, task)
        return read_jsonl(path) if path.exists() else []


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read.

    Attributes:
        problems: files that exist and cannot be read, one sentence each.
    """

    folder: Path
    recipe: Row
    recipe_text: str
    versions: Row
    cells: tuple[Cell, ...]
    problems: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The model's name or folder; the names of its parts for one that was composed."""
        chosen = self.recipe.get("model", "")
        if not isinstance(chosen, dict):
            return str(chosen)
        parts = (chosen.get(key) for key in ("backbone", "encoder", "connector"))
        named = [one for part in parts if part for one in (part if isinstance(part, list) else [part])]
        return " + ".join(str(one["name"]) if isinstance(one, dict) else str(one) for one in named)


def read_run(folder: Path | str) -> Run:
    """Everything in a run folder but the predictions, which are read where they are needed.

    Raises:
        UserError: no such folder, or no ``cells/`` in it.
    """
    home = Path(folder)
    if not (home / "cells").is_dir():
        if (home / "grid.json").exists():
            raise UserError(
                f"{home} is the folder of a grid. Give one of its points, {home}/points/*, or `alula ablate --no-run` for its page."
            )
        found = ", ".join(sorted(path.name for path in home.iterdir())[:8]) if home.is_dir() else "nothing there"
        raise UserError(
            f"{home} is not a run folder: it has no 'cells' ({found or 'it is empty'}). Give the folder that `alula run` wrote."
        )
    problems: list[str] = []
    recipe_text = _optional(home / "recipe.yaml", lambda path: path.read_text(encoding="utf-8"), "", problems)
    raw: object = _optional(home / "recipe.yaml", lambda path: yaml.safe_load(path.read_text("utf-8")), {}, problems)
    versions: object = _optional(home / "versions.json", read_json, {}, problems)
    recipe = raw if isinstance(raw, dict) else {}
    usual = _names(recipe.get("tasks"))
    folders = sorted(path for path in (home / "cells").iterdir() if path.is_dir())
    return Run(
        folder=home,
        recipe=recipe,
        recipe_text=recipe_text,
        versions=versions if isinstance(versions, dict) else {},
        cells=tuple(_read_cell(path, problems, usual=usual) for path in folders),
        problems=tuple(problems),
    )


def rows_by_method(
    cells: Sequence[Cell], file: str, *, is_usable: Callable[[Row], bool], wanted: str, problems: list[str]
) -> dict[str, list[Row]]:
    """The object that this JSON file of each cell holds, by method; a damaged one is named in `problems`, with what is `wanted`."""
    found: dict[str, list[Row]] = {}
    for cell in cells:
        value: object = _optional(cell.folder / file, read_json, {}, problems)
        if isinstance(value, dict) and is_usable(value):
            found.setdefault(cell.method, []).append(value)
        elif value:
            problems.append(f"{cell.name}/{file}: {wanted}")
    return found


def _optional(path: Path, read: Callable[[Path], T], default: T, problems: list[str]) -> T:
    if not path.exists():
        return default
    try:
        return read(path)
    except (UserError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path.name}: {error}")
        return default


def _read_cell(folder: Path, problems: list[str], *, usual: tuple[str, ...]) -> Cell:
    parts = CELL_NAME.match(folder.name)
    crash: object = _optional(folder / "crashed.json", read_json, {}, problems)
    done: object = _optional(folder / "done.json", read_json, {}, problems)
    order: object = _optional(folder / ORDER, read_json, {}, problems)
    marks = {"done.json": "finished", "crashed.json": "crashed"}
    state = next((state for file, state in marks.items() if (folder / file).exists()), "unfinished")
    return Cell(
        name=folder.name,
        method=parts["method"] if parts else folder.name,
        seed=int(parts["seed"]) if parts else 0,
        folder=folder,
        state=state,
        order=int(parts["order"] or 0) if parts else 0,
        tasks=_names(order.get("tasks") if isinstance(order, dict) else None) or usual,
        error=str(crash.get("error", "")) if isinstance(crash, dict) and state == "crashed" else "",
        scores=tuple(_optional(folder / "scores.jsonl", read_jsonl, [], problems)),
        cost=tuple(_optional(folder / "cost.jsonl", read_jsonl, [], problems)),
        routing=_rows(_optional(folder / "routing.json", read_json, [], problems)),
        examples=_rows(_optional(folder / "examples.json", read_json, [], problems)),
        done=done if isinstance(done, dict) else {},
    )


def _names(tasks: object) -> tuple[str, ...]:
    """Task names as a recipe lists them: a string each, or a mapping with a name."""
    named = [entry.get("name") if isinstance(entry, dict) else entry for entry in (tasks if isinstance(tasks, list) else [])]
    return tuple(name for name in named if isinstance(name, str))


def _rows(value: object) -> tuple[Row, ...]:
    """The objects of a JSON list; a single object is a list of one."""
    found = value if isinstance(value, list) else [value]
    return tuple(row for row in found if isinstance(row, dict) and row)
