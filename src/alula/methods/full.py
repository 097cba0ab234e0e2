"""Training the whole decoder: what people do first, and what forgets most."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import nn

from alula.data.stream import Stream, Task, merge_tasks
from alula.errors import UserError
from alula.methods.base import METHODS, Method, Stage
from alula.models.anatomy import anatomy
from alula.training.settings import TrainSettings

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FullDecoder(Method):
    """Every parameter of the decoder trains; a head of its own stays frozen, connector and encoder unless asked.

    Args:
        connector: the connector trains too, as in stage 2 of LLaVA (arXiv 2304.08485, sec. 4.2).
        connector_learning_rate: its peak rate (above 0); None: the decoder's, ``train.learning_rate``.
        encoder: every encoder trains too, as in MM1 (arXiv 2403.09611), where nothing is frozen. Its batch norms stay as they are:
            statistics of a few images would spoil them.
        encoder_learning_rate: as `connector_learning_rate`.

    Raises:
        UserError: the model has no such part, or a rate came for one that does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        connector: bool = False,
        connector_learning_rate: Annotated[float, Field(gt=0)] | None = None,
        encoder: bool = False,
        encoder_learning_rate: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        parts = anatomy(model)
        asked = {"connector": (connector, connector_learning_rate), "encoder": (encoder, encoder_learning_rate)}
        self.training_parts = ("decoder", *(part for part, (trains, _) in asked.items() if trains))
        self.rates: dict[str, float] = {}
        for part, (trains, rate) in asked.items():
            roots = getattr(parts, part)
            if trains and not roots:
                raise UserError(f"{part}: true came, but {type(model).__name__} has no {part} that is known. Leave the option out.")
            if rate is not None:
                self.rates |= dict.fromkeys(roots, _checked(part, rate, trains=trains))
        if encoder_learning_rate is not None:  # of paths inside each other the innermost counts: Qwen's merger is in its encoder
            inner = [root for root in parts.connector if any(root.startswith(f"{outer}.") for outer in parts.encoder)]
            self.rates = dict.fromkeys(inner, self.settings.rate) | self.rates

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """One stage; connector and encoder may have rates of their own."""
        return tuple(replace(stage, rates=self.rates) for stage in super().stages(task))

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Freezes all but the decoder and, if asked, the connector and the encoders."""
        parts = anatomy(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(parts.part_of(path) in self.training_parts)
        for path, module in model.named_modules():
            if isinstance(module, BATCH_NORMS) and parts.part_of(path) == "encoder":
                module.requires_grad_(False)  # and so in evaluation mode while the rest trains


def _checked(part: str, rate: float | str, *, trains: bool) -> float:
    """The peak rate of a part; YAML reads 1e-5 as text."""
    found = float(rate)
    if not trains or found <= 0:
        raise UserError(
            f"{part}_learning_rate: {found} came with {part}: {str(trains).lower()}. A rate above "
            f"0 is accepted, for {'an' if part == 'encoder' else 'a'} {part} that trains. Correct the rate, or set {part}: true."
        )
    return found


@METHODS.register("finetune_full")
class FinetuneFull(FullDecoder):
    """Each task in turn, nothing kept of the former ones.

    Source: "naive fine-tuning" of Srivastava et al. 2025 (arXiv 2410.19925), there with the connector.
    """

    can_shard = True


@METHODS.register("joint_full")
class JointFull(FullDecoder):
    """All tasks at once, with as many steps as the tasks have in turn."""

    can_shard = True

    def arrange(self, stream: Stream) -> Stream:
        """One task with everybody's data."""
        return Stream(tasks=(merge_tasks(stream),), base_tasks=stream.base_tasks)
