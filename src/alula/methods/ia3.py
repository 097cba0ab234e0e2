"""(IA)^3: learnt vectors that scale what is there already; the fewest parameters of all methods here."""

from contextlib import AbstractContextManager

from torch import nn

from alula.data.stream import Task
from alula.methods.base import METHODS, Method, Stage
from alula.mixture.scaling import attach_scales
from alula.training.settings import TrainSettings


@METHODS.register("ia3")
class IA3(Method):
    """Learnt vectors scale keys, values and the MLP's inner activation; every task goes on training the same ones.

    ``softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)`` and ``W2 (l_ff * activation(W1 x))``; all start at one, so the model is
    the base model at birth. In a gated MLP the inner activation is the product with the gate. Keys are scaled before they
    are rotated (and normalised, where a model does), as in PEFT.

    So few parameters want a large rate: the paper trains at 3e-3, about five times the default of `TrainSettings`.

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    section 3.3 (arXiv 2205.05638). Difference: AdamW, there Adafactor, and no loss besides the next token's.

    Raises:
        UserError: a model whose keys, values or MLPs `attach_scales` does not find.
    """

    def __init__(self, model: nn.Module, *, settings: TrainSettings) -> None:
        super().__init__(model, settings=settings)
        self.scales = attach_scales(model)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains the vectors."""
        self.scales.train()

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No vector scales anything."""
        return self.scales.silent()
