"""What a recipe says of a task's data, and the task with that data. It knows names, paths and numbers; `readers` reads."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from alula.data.blend import Blend, Source
from alula.data.readers import find_splits, read_samples, read_task, room_for
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

    ratio: float | None = Field(None, gt=0)
    """Samples drawn from it, to those from the others (above 0). None, for all sources: their numbers of samples."""

    cap: int | None = Field(None, ge=1)
    """Different samples of it at most; None: all."""

    epochs: float = Field(1.0, gt=0)
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
    def identity(self) -> str:
        """What is read: one source that is named twice is sampled once."""
        return str(self.path.resolve()) if self.path is not None else str(self.name)


class TaskChoice(Strict):
    """A built-in task, or a user's data."""

    name: str
    """The task's name: of a built-in task (see `alula list`), or any if `path` or `blend` is given."""

    path: Path | None = None
    """A data file, several (``shards/*.tar``), or a folder with train and test files (see docs/data.md); None for a built-in task."""

    test_path: Path | None = None
    """Where the test rows are; None: a tenth of the data is held out."""

    scoring: Literal["exact_match", "ranked", "bits_per_byte", "box_iou"] = "exact_match"
    """For data of one's own: exact_match of the greedy answer, ranked likelihood of each row's options, prose, or boxes (docs/data.md)."""

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

    temperature: float = Field(1.0, gt=0)
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
    tasks = [_source_task(source, choice) for source in choice.blend]
    blend = Blend(
        [
            Source(name=source.identity, samples=task.train, ratio=source.ratio, cap=source.cap, epochs=source.epochs)
            for source, task in zip(choice.blend, tasks, strict=True)
        ],
        temperature=choice.temperature,
    )
    if choice.test_path is not None:
        test: Sequence[Sample] = read_samples(choice.test_path, **choice.reading)
    else:
        parts = {source.identity: task.test for source, task in zip(choice.blend, tasks, strict=True) if task.scoring == choice.scoring}
        test = list(chain.from_iterable(parts.values()))
    if not test:
        raise UserError(f"Task '{choice.name}': none of its sources is scored by {choice.scoring}. Give test_path, or another scoring.")
    refuse_shared(blend, test)
    return Task(name=choice.name, train=blend, test=test, scoring=choice.scoring, max_new_tokens=room_for(test))


def _source_task(source: SourceChoice, choice: TaskChoice) -> Task:
    if source.path is None:
        from alula.data.documents import SOURCE, source_task
        from alula.data.tasks import load_task

        name = str(source.name)
        return source_task(name, **({"size": source.cap} if source.cap else {})) if name.startswith(SOURCE) else load_task(name)
    if choice.test_path is None:
        return read_task(choice.name, source.path, scoring=choice.scoring, **source.reading)
    path = find_splits(source.path)[0] if source.path.is_dir() else source.path
    return Task(name=choice.name, train=read_samples(path, **source.reading), test=(), scoring=choice.scoring)
