"""Alignment: only the connector trains, so that a frozen backbone can read a frozen encoder."""

from torch import nn

from alula.data.stream import Task
from alula.methods.base import METHODS, Method, Stage
from alula.models.anatomy import anatomy


@METHODS.register("align")
class Align(Method):
    """Trains the connector alone.

    Source: stage 1 of LLaVA (Liu et al. 2023, arXiv 2304.08485, sec. 4.2).
    """

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Freezes all but the connector."""
        parts = anatomy(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(parts.part_of(path) == "connector")
