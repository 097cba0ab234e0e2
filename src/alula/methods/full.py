"""Training the whole decoder: what people do first, and what forgets most."""

from torch import Tensor, nn

from alula.data.stream import Stream, Task, merge_tasks
from alula.methods.base import METHODS, Method, Stage
from alula.models.anatomy import anatomy
from alula.objectives.next_token import next_token_loss


class FullDecoder(Method):
    """Every parameter of the decoder trains; encoder, connector and a head of its own stay frozen."""

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Freezes all but the decoder."""
        parts = anatomy(model)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(parts.part_of(path) == "decoder")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Next-token cross-entropy over the targets."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        return {"next_token": next_token_loss(logits, batch["labels"])}


@METHODS.register("finetune_full")
class FinetuneFull(FullDecoder):
    """Each task in turn, nothing kept of the former ones.

    Source: "naive fine-tuning" of Srivastava et al. 2025 (arXiv 2410.19925), there with the connector.
    """


@METHODS.register("joint_full")
class JointFull(FullDecoder):
    """All tasks at once, with as many steps as the tasks have in turn."""

    def arrange(self, stream: Stream) -> Stream:
        """One task with everybody's data."""
        return Stream(tasks=(merge_tasks(stream),), base_tasks=stream.base_tasks)
