"""A small stand-in for lmms-eval, whose own package needs torchvision: the six names that alula takes from it, with their behaviour.

Written after lmms-eval's api/instance.py, api/model.py, models/registry_v2.py and evaluator.py: requests carry (text, options, function of
images, id, task, split), images come from ``model.task_dict``, and the evaluator ends with ``model.clean()``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from torch import nn

TASKS: dict[str, dict[str, Any]] = {}
"""By name: docs, text, visuals, target (functions of a doc) and generation_kwargs; tests fill it."""
HARNESS = "alula.evaluation.harnesses.lmms_eval"


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict
    task_name: str = field(init=False)
    doc_id: int = field(init=False)

    def __post_init__(self) -> None:
        self.task_name, self.doc_id = self.metadata["task"], self.metadata["doc_id"]

    @property
    def args(self) -> tuple:
        return self.arguments


class lmms:
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, dict[str, list]] = {}

    def clean(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, nn.Module):
                delattr(self, name)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class TaskManager:
    def __init__(self, *, include_path: str | None = None, include_defaults: bool = True) -> None:
        self.include_path, self.include_defaults = include_path, include_defaults
        self.all_tasks = list(TASKS)


def requests_of(model: lmms, name: str, *, limit: int | None = None) -> list[Instance]:
    """The requests of a task, whose documents `model` can see from now on."""
    one = TASKS[name]
    docs = one["docs"][:limit]
    model.task_dict[name] = {"test": docs}
    return [
        Instance(
            request_type=one.get("request_type", "generate_until"),
            arguments=(one["text"](doc), dict(one["generation_kwargs"]), one["visuals"], number, name, "test"),
            idx=0,
            metadata={"task": name, "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]


def simple_evaluate(
    *, model: lmms, tasks: list[str], task_manager: TaskManager, batch_size: int, limit: int | None, device: str
) -> dict[str, Any]:
    assert isinstance(model, lmms) and isinstance(task_manager, TaskManager)
    samples: dict[str, list[dict]] = {}
    for name in tasks:
        asked = requests_of(model, name, limit=limit)
        said = getattr(model, asked[0].request_type)(asked)
        samples[name] = [
            {
                "doc_id": one.doc_id,
                "target": TASKS[name]["target"](TASKS[name]["docs"][one.doc_id]),
                "arguments": [value for value in one.args if not callable(value)],
                "resps": [[text]],
                "filtered_resps": [text],
                "exact_match": float(text == TASKS[name]["target"](TASKS[name]["docs"][one.doc_id])),
            }
            for one, text in zip(asked, said, strict=True)
        ]
    model.clean()
    results = {
        name: {"alias": name, "exact_match,none": sum(row["exact_match"] for row in rows) / len(rows), "exact_match_stderr,none": "N/A"}
        for name, rows in samples.items()
    }
    return {"results": results, "samples": samples, "n-samples": {name: {"effective": len(rows)} for name, rows in samples.items()}}


@contextmanager
def standing_in() -> Iterator[ModuleType]:
    """A block in which ``lmms_eval`` is this stand-in; gives alula's module of it, which is forgotten afterwards."""
    import importlib

    parts = {
        "lmms_eval": {},
        "lmms_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.tasks": {"TaskManager": TaskManager},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
        patch.delitem(sys.modules, HARNESS, raising=False)
        yield importlib.import_module(HARNESS)
        sys.modules.pop(HARNESS)
