"""The loop over a stream, on any device and number of processes, resumable. It yields after each task and knows no evaluation.

Names are imported when asked for, so that reading a recipe (settings.py) does not import torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alula.training.loop import Trainer
    from alula.training.records import Cost, TaskLearnt, progress_bar
    from alula.training.settings import TrainSettings

__all__ = ["Cost", "TaskLearnt", "TrainSettings", "Trainer", "progress_bar"]
HOMES = {"Trainer": "loop", "Cost": "records", "TaskLearnt": "records", "progress_bar": "records", "TrainSettings": "settings"}


def __getattr__(name: str) -> object:
    """The public `name`, imported now."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
