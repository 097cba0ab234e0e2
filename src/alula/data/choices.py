"""What a recipe says of a task's data, and the task with that data. It knows names, paths and numbers; `readers` reads."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from alula.data.blend import Blend, Source
from alula.data.readers import find_shards, find_splits, read_samples, read_task, room_for
from alula.data.sample import Sample
from alula.data.splitting import refuse_shared
from alula.data.stream import Task
from alula.errors import UserError


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceChoice(Strict):
    """One source of a blend: a built-in task, or a user's data."""

    name: str | None = None
    """Of a built-in task (see `alula list`), or ``pretraining/captions``, ``pretraining/documents``, ``pretraining/text``
    (docs/pretraining.md); None: `path` says what is read."""

    path: Path | None = Field(None, validate_default=True)
    """As for a task."""

    ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Samples drawn from it, to those from the others (above 0). None, for all sources: their numbers of samples."""

    cap: int | None = Field(None, ge=1)
    """Different samples of it at most; None: all."""

    epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Passes over it at most; the blend ends when a source would need more (above 0). Default: no sample comes twice."""

    image_root: Path | None = None
    """As for a task."""

    format: str | None = None
    """As for a task."""

    @field_validator("path")
    @classmethod
    def _is_one(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if (path is None) == (info.data.get("name") is None):
            raise ValueError("one of 'name' (a built-in task) and 'path' is wanted")
        return path

    @property
    def reading(self) -> dict[str, Any]:
        """How its files are read: keywords of `read_samples`."""
        return {"image_root": self.image_root, "format": self.format}

    @property
    def files(self) -> frozenset[str]:
        """Where its training rows are, links followed: one source that is named twice is sampled once. Of a built-in task, its name.

        Raises:
            UserError: no file fits, or a folder without train rows.
        """
        if self.path is None:
            return frozenset([str(self.name)])
        return frozenset(str(shard.resolve()) for shard in find_shards(_train_rows(self.path)))


class TaskChoice(Strict):
    """A built-in task, or a user's data."""

    name: str
    """The task's name: of a built-in task (see `alula list`), or any if `path` or `blend` is given."""

    path: Path | None = None
    """A data file, several (``shards/*.tar``), or a folder with train and test files (see docs/data.md); None for a built-in task."""

    test_path: Path | None = None
    """Where the test rows are; None: a tenth of the data is held out, or of a base task all is scored."""

    scoring: Literal["exact_match", "ranked", "bits_per_byte", "box_iou"] = "exact_match"
    """Exact match of the greedy answer, ranked likelihood of each row's options, bits per byte of the answer, or boxes (docs/data.md). A
    built-in task has its own and takes bits_per_byte besides."""

    train_size: int | None = Field(None, ge=1)
    """Training samples at most; None: all."""

    test_size: int | None = Field(None, ge=1)
    """Test samples at most; None: all."""

    image_root: Path | None = None
    """Folder that relative image paths start at; None: the folder of the data file, or where CoIN and UCIT keep images."""

    format: str | None = None
    """Of a file whose ending does not tell: json, parquet or webdataset; None: look."""

    blend: list[SourceChoice] = Field(default_factory=list)
    """Sources of the training data, in place of `path`."""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of the blend: 1 keeps its ratios, more makes them more even (above 0)."""

    @field_validator("blend", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value

    @field_validator("blend")
    @classmethod
    def _is_alone(cls, blend: list[SourceChoice], info: ValidationInfo) -> list[SourceChoice]:
        if blend and info.data.get("path") is not None:
            raise ValueError("both 'path' and 'blend' are given; put the path into the blend")
        return blend

    @property
    def reading(self) -> dict[str, Any]:
        """How its files are read: keywords of `read_samples`."""
        return {"image_root": self.image_root, "format": self.format}

    @property
    def is_built_in(self) -> bool:
        """Whether the name alone says which task it is."""
        return self.path is None and not self.blend

    def __repr_args__(self) -> Any:
        """Without newer keys at their defaults: a cell's identity is made of this text, and must not change with alula."""
        newer: dict[str, Any] = {"image_root": None, "format": None, "blend": [], "temperature": 1.0}
        return [(name, value) for name, value in super().__repr_args__() if name not in newer or value != newer[name]]


def read_choice(choice: TaskChoice) -> Task:
    """The task that a recipe describes by a path or a blend; its images are not opened.

    Raises:
        UserError: data that cannot be used (with file and line), or sources that cannot be blended.
    """
    if choice.path is not None:
        return read_task(choice.name, choice.path, test_path=choice.test_path, scoring=choice.scoring, **choice.reading)
    return _blended(choice)


def _blended(choice: TaskChoice) -> Task:
    """The blend; its test rows are those of `test_path`, or those held out of every source that is scored like the task."""
    named = _named(choice.blend)
    tasks = {name: _source_task(sources[0], choice) for name, sources in named.items()}
    blend = Blend(
        [
            Source(name=name, samples=tasks[name].train, ratio=source.ratio, cap=source.cap, epochs=source.epochs)
            for name, sources in named.items()
            for source in sources
        ],
        temperature=choice.temperature,
    )
    if choice.test_path is not None:
        test: Sequence[Sample] = read_samples(choice.test_path, **choice.reading)
    else:
        test = list(chain.from_iterable(task.test for task in tasks.values() if task.scoring == choice.scoring))
    if not test:
        raise UserError(f"Task '{choice.name}': none of its sources is scored by {choice.scoring}. Give test_path, or another scoring.")
    refuse_shared(blend, test)
    return Task(name=choice.name, train=blend, test=test, scoring=choice.scoring, max_new_tokens=room_for(test))


def _named(sources: Sequence[SourceChoice]) -> dict[str, list[SourceChoice]]:
    """The sources by a name for each set of files: those of one name are one source, which is read once.

    Raises:
        UserError: as `SourceChoice.files`, or two sources share some of their files and not all.
    """
    names: dict[frozenset[str], str] = {}
    found: dict[str, list[SourceChoice]] = {}
    for source in sources:
        files = source.files
        for others, name in names.items():
            if others != files and (shared := others & files):
                message = f"The sources '{name}' and '{source.path}' both hold {min(shared)}, and one holds more."
                raise UserError(f"{message} Its rows would come twice: name every file in one source only.")
        name = names.setdefault(files, str(source.path.resolve() if source.path else source.name))
        found.setdefault(name, []).append(source)
    return found


def _train_rows(path: Path) -> Path | str:
    return find_splits(path)[0] if path.is_dir() else path


def _source_task(source: SourceChoice, choice: TaskChoice) -> Task:
    if source.path is None:
        from alula.data.documents import SOURCE, source_task
        from alula.data.tasks import load_task

        name = str(source.name)
        return source_task(name, **({"size": source.cap} if source.cap else {})) if name.startswith(SOURCE) else load_task(name)
    if choice.test_path is None:
        return read_task(choice.name, source.path, scoring=choice.scoring, **source.reading)
    samples = read_samples(_train_rows(source.path), **source.reading)
    return Task(name=choice.name, train=samples, test=(), scoring=choice.scoring)
