"""Freezing: parts or layers wait for the first share of a stage's steps, then train."""

import torch
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError, nearest
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method, Stage
from alula.models.anatomy import Anatomy, anatomy

PARTS = ("decoder", "encoder", "connector", "head")
AT_ONCE, TOP_DOWN, BOTTOM_UP = "at_once", "top_down", "bottom_up"
THAWS = (AT_ONCE, TOP_DOWN, BOTTOM_UP)


@ADDITIONS.register("freezing")
class Freezing(Addition):
    """Of what a stage trains, takes the gradients away from some for the first steps: the optimizer leaves it as it is.

    Args:
        part: what waits: decoder, encoder, connector, head, or a path in the model (all below it).
        share: of the stage's steps (0-1) after which all of it trains.
        thaw: ``at_once``: after that share. ``top_down``: its decoder layers one after another within that share, the last
            layer from the first step on; what lies in no layer comes last. ``bottom_up``: the first layer first.

    Source: Howard & Ruder 2018, "Universal Language Model Fine-tuning", gradual unfreezing (arXiv 1801.06146): one layer
    more per epoch, from the top; ours counts in steps.

    Raises:
        UserError: an unknown part or order, or a share out of range; when a stage begins, nothing left to train.
    """

    def __init__(
        self, method: Method, model: nn.Module, *, collator: Collator, part: str = "decoder", share: float = 0.5, thaw: str = AT_ONCE
    ) -> None:
        super().__init__(method, model, collator=collator)
        if thaw not in THAWS:
            raise UserError(f"Unknown order of thawing '{thaw}'. {nearest(thaw, THAWS)}")
        if not 0 <= share <= 1:
            raise UserError(f"share: {share} came; a share of the steps from 0 to 1 is accepted. Correct it.")
        if part not in PARTS and part not in dict(model.named_modules()):
            raise UserError(f"Unknown part '{part}': neither {', '.join(PARTS)} nor the path of a module. {nearest(part, PARTS)}")
        self.part, self.share, self.thaw = part, float(share), thaw
        self._step = 0
        self._until: dict[str, int] = {}

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Lays down until which step each parameter waits."""
        parts = anatomy(model)
        trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        waiting = [name for name in trains if self._is_meant(name, parts)]
        self._step, self._until = 0, self.schedule(waiting, parts, steps=stage.steps)
        if trains and stage.gradient and all(self._until.get(name, 0) > 0 for name in trains):
            raise UserError(
                f"Task '{task.name}', stage '{stage.name}': freezing {self.part} leaves nothing to train at first. "
                "Freeze a part beside which something trains, or thaw it top_down or bottom_up."
            )

    def schedule(self, names: list[str], parts: Anatomy, *, steps: int) -> dict[str, int]:
        """The first step, counted from 0, in which each parameter trains."""
        end = round(self.share * steps)
        layers = {name: next((i for i, root in enumerate(parts.layers) if name.startswith(f"{root}.")), None) for name in names}
        order = sorted({layer for layer in layers.values() if layer is not None}, reverse=self.thaw == TOP_DOWN)
        if self.thaw == AT_ONCE or not order:
            return dict.fromkeys(names, end)
        starts = {layer: end * place // len(order) for place, layer in enumerate(order)}
        return {name: end if layer is None else starts[layer] for name, layer in layers.items()}

    def before_step(self, model: nn.Module) -> None:
        """Takes the gradients of what still waits."""
        for name, parameter in model.named_parameters():
            if self._step < self._until.get(name, 0):
                parameter.grad = None
        self._step += 1

    def _is_meant(self, name: str, parts: Anatomy) -> bool:
        return parts.part_of(name) == self.part if self.part in PARTS else name.startswith(f"{self.part}.")

    def state_dict(self) -> dict[str, Tensor]:
        """The steps of the stage that were taken."""
        return {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts them back."""
        self._step = int(state["step"])
