"""Prediction: an image encoder learns by saying the next patch. Not a continual-learning method: its model is a `PatchPredictor`."""

from torch import Tensor, nn

from alula.data.stream import Task
from alula.methods.base import Method, Stage
from alula.objectives.aim import aim_loss, patches_of, prefix_causal_mask


class Aim(Method):
    """Everything trains; the collator draws each image's prefix.

    Source: El-Nouby et al. 2024 (arXiv 2401.08541). Deliberate differences: the loop's AdamW has torch's betas (0.9, 0.999) unless
    the settings say 0.9 and 0.95, and `vit` has biases and learnt positions.
    """

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Everything trains."""
        model.requires_grad_(True)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The error of the patches outside of the prefix."""
        pixels, prefix = batch["pixel_values"], batch["prefix"]
        patches = patches_of(pixels, model.encoder.grid)  # type: ignore[union-attr, arg-type]
        predictions = model(pixels, mask=prefix_causal_mask(patches.shape[1], prefix))
        return {"aim": aim_loss(predictions, patches, prefix)}
