"""Teach a vision-language model new tasks, one after another, without forgetting, and prove it.

The names below are the public surface; each is imported when it is first asked for, so that ``import alula`` is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alula.adapters import Adapters, attach_adapters
    from alula.config import Recipe, read_recipe
    from alula.context import Routing
    from alula.data.collate import Collator
    from alula.data.readers import read_samples, read_task
    from alula.data.sample import Message, Sample
    from alula.data.stream import Stream, Task
    from alula.data.tasks import load_task
    from alula.errors import UserError
    from alula.evaluation.evaluate import evaluate_task
    from alula.evaluation.matrix import ScoreMatrix
    from alula.learners import Learners, attach_learners
    from alula.methods import METHODS, Method
    from alula.mixture import Mixtures, attach, observe
    from alula.models import anatomy, load_model, load_processor
    from alula.models.composition import add_encoder, compose
    from alula.peft_format import read_adapter
    from alula.pool import Pool
    from alula.pool.adapter_folder import load_adapters, save_adapters
    from alula.report import build_report
    from alula.running.learn import generate, learn_task, open_pool
    from alula.running.run import run_recipe
    from alula.training import Trainer, TrainSettings

_HOMES = {
    "Adapters": "adapters",
    "Collator": "data.collate",
    "Learners": "learners",
    "METHODS": "methods",
    "Message": "data.sample",
    "Method": "methods",
    "Mixtures": "mixture",
    "Pool": "pool",
    "Recipe": "config",
    "Routing": "context",
    "Sample": "data.sample",
    "ScoreMatrix": "evaluation.matrix",
    "Stream": "data.stream",
    "Task": "data.stream",
    "TrainSettings": "training.settings",
    "Trainer": "training.loop",
    "UserError": "errors",
    "add_encoder": "models.composition",
    "anatomy": "models.anatomy",
    "attach": "mixture",
    "attach_adapters": "adapters",
    "attach_learners": "learners",
    "build_report": "report",
    "compose": "models.composition",
    "evaluate_task": "evaluation.evaluate",
    "generate": "running.learn",
    "learn_task": "running.learn",
    "load_adapters": "pool.adapter_folder",
    "load_model": "experts",  # not "models": this one loads upcycled models too
    "load_processor": "models",
    "load_task": "data.tasks",
    "observe": "mixture",
    "open_pool": "running.learn",
    "read_adapter": "peft_format",
    "read_recipe": "config",
    "read_samples": "data.readers",
    "read_task": "data.readers",
    "run_recipe": "running.run",
    "save_adapters": "pool.adapter_folder",
}

__version__ = "0.1.0"
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> object:
    """The public `name`, imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'alula' has no attribute '{name}'")
    return getattr(importlib.import_module(f"alula.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
