"""Contrast: an image encoder learns which text belongs to which image. Not a continual-learning method: its model is a `DualEncoder`."""

from torch import Tensor, distributed, nn

from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.base import Method, Stage
from alula.objectives.clip import clip_loss, gathered


class Clip(Method):
    """Everything trains; a batch's pairs are contrasted with those of all processes.

    Source: Radford et al. 2021 (arXiv 2103.00020), as MM1 uses it (arXiv 2403.09611, section 3.1). Deliberate differences: the loop's
    AdamW has torch's betas (0.9, 0.999) unless the settings say 0.9 and 0.95, and decays every parameter, the scale too.

    Raises:
        UserError: the batch is cut into micro-batches, or cannot be shared out evenly among the processes.
    """

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Refuses what would make another loss."""
        size, micro = self.settings.batch_size, self.settings.micro_batch_size
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        if size % processes or (micro is not None and micro * processes < size):
            raise UserError(
                f"batch_size={size}, micro_batch_size={micro} and {processes} processes came. Contrast needs the whole batch at once and "
                f"an equal share of it on each process: a batch_size that is a multiple of {processes}, no micro_batch_size. Correct them."
            )

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Everything trains."""
        model.requires_grad_(True)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The contrast over the batches of all processes."""
        images, texts = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        return {"clip": clip_loss(gathered(images), gathered(texts), model.log_scale)}  # type: ignore[arg-type]
