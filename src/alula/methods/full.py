"""Training the whole decoder: what people do first, and what forgets most."""

from dataclasses import replace

from torch import nn

from alula.data.stream import Stream, Task, merge_tasks
from alula.errors import UserError
from alula.methods.base import METHODS, Method, Stage
from alula.models.anatomy import anatomy
from alula.training.settings import TrainSettings


class FullDecoder(Method):
    """Every parameter of the decoder trains; encoder and a head of its own stay frozen, the connector unless asked.

    Args:
        connector: the connector trains too, as in stage 2 of LLaVA (arXiv 2304.08485, sec. 4.2).
        connector_learning_rate: its peak rate (above 0); None: the decoder's, ``train.learning_rate``.

    Raises:
        UserError: the model has no connector, or a rate came for one that does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        connector: bool = False,
        connector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        roots = anatomy(model).connector
        if connector and not roots:
            raise UserError(f"connector: true came, but {type(model).__name__} has no connector that is known. Leave the option out.")
        self.training_parts = ("decoder", "connector") if connector else ("decoder",)
        self.rates: dict[str, float] = {}
        if connector_learning_rate is not None:
            rate = float(connector_learning_rate)  # YAML reads 1e-5 as text
            if not connector or rate <= 0:
                raise UserError(
                    f"connector_learning_rate: {rate} came with connector: {str(connector).lower()}. A rate above "
                    "0 is accepted, for a connector that trains. Correct the rate, or set connector: true."
                )
            self.rates = dict.fromkeys(roots, rate)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """One stage; the connector may have a rate of its own."""
        return tuple(replace(stage, rates=self.rates) for stage in super().stages(task))

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Freezes all but the decoder and, if asked, the connector."""
        parts = anatomy(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(parts.part_of(path) in self.training_parts)


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
