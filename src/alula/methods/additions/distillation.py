"""Distillation as an addition: on the data of the new task the model goes on saying what a teacher says."""

import contextlib

import torch
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError, nearest
from alula.methods.additions.aside import evaluating, holding
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method, Stage, plain_logits
from alula.objectives.distillation import distillation_loss

BASE, PREVIOUS = "base", "previous"


@ADDITIONS.register("distillation")
class Distillation(Addition):
    """Adds the divergence from a teacher's distribution, on the targets of the batch.

    One more forward per micro-batch, without dropout and without gradients.

    Args:
        teacher: ``base``: the untouched model, which is in the model already wherever a method only adds to it; no copy.
            ``previous``: the model as it was before the task, used the way it is being trained; what trains is kept twice.
        temperature: divides both scores (above 0). Default 2, as in the paper.
        weight: of this part of the loss (0 or more). Default 1, as in the paper.

    Source: Li & Hoiem 2017, "Learning without Forgetting" (arXiv 1606.09282): its teacher is ``previous``, its distribution
    that of the old tasks' outputs, which here is the one over the vocabulary; Hinton et al. 2015 (arXiv 1503.02531).

    Raises:
        UserError: an unknown teacher, a value out of range, or the teacher ``base`` for a method that changes the base.
    """

    reads_weights = True

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        collator: Collator,
        teacher: str = BASE,
        temperature: float = 2.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(method, model, collator=collator)
        if teacher not in (BASE, PREVIOUS):
            raise UserError(f"Unknown teacher '{teacher}'. {nearest(teacher, (BASE, PREVIOUS))}")
        if temperature <= 0 or weight < 0:
            wanted = "a temperature above 0 and a weight from 0 up are accepted"
            raise UserError(f"temperature: {temperature} and weight: {weight} came; {wanted}. Correct them.")
        if teacher == BASE:
            method.base_model(model)  # refuses now what could not be entered later
        self.teacher, self.temperature, self.weight = teacher, float(temperature), float(weight)
        self._values: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Lets the last task's teacher go."""
        self._values = {}

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Keeps what is about to train for the first time in this task."""
        if self.teacher == PREVIOUS and stage.gradient:
            found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            self._values |= {name: parameter.detach().clone() for name, parameter in found.items() if name not in self._values}

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The divergence beside the other parts."""
        loss = distillation_loss(logits, self.teacher_logits(model, batch), batch["labels"], temperature=self.temperature)
        return {**parts, "distillation": self.weight * loss}

    @torch.no_grad()
    def teacher_logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the teacher says to `batch`."""
        with contextlib.ExitStack() as block:
            block.enter_context(evaluating(model))
            if self.teacher == BASE:
                block.enter_context(self.method.base_model(model))
                return plain_logits(model, batch)
            block.enter_context(holding(model, self._values))
            return self.method.logits(model, batch)

    def state_dict(self) -> dict[str, Tensor]:
        """The copies of the previous model's values."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts them back."""
        self._values = dict(state)
