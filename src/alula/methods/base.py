"""What a continual-learning method is: verbs the training loop calls. A method owns no optimizer, loop, device, logging or file."""

import contextlib
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods.rates import resolve_rate
from alula.mixture import Mixtures
from alula.models.logits import keeping
from alula.objectives.next_token import columns_needed, next_token_loss
from alula.registry import Registry

if TYPE_CHECKING:  # the training room lies below this one; only its settings' type is named here
    from pydantic import BaseModel

    from alula.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of using what was learnt; each is scored apart.

    Attributes:
        enter: makes the context in which the model is evaluated on a task.
        around: makes the context for one batch inside it: where a decision is taken on the prompt alone.
        is_settled: a task's score cannot change once it was learnt (and is the base model's before), so it is not
            measured again.
        is_routed: routers decide who speaks, so there is a routing to look at.
    """

    name: str
    enter: Callable[[Task], AbstractContextManager[None]]
    around: Callable[[dict[str, Tensor]], AbstractContextManager[None]] = lambda batch: contextlib.nullcontext()
    is_settled: bool = False
    is_routed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a task's training with an optimizer of its own.

    Attributes:
        steps: optimizer steps; of a forward-only stage at most this many batches and at most one epoch.
        learning_rate: peak rate (above 0); unused by a forward-only stage.
        gradient: False: the data goes through the model once, `observe` sees each batch, nothing is optimized.
        rates: peak rates of parts of the model, by the path of a module or parameter; what lies in none of them trains at
            `learning_rate`. Of paths inside each other the innermost counts.
    """

    name: str
    steps: int
    learning_rate: float
    gradient: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate_of(self, path: str) -> float:
        """The peak rate of the parameter at `path`.

        Example:
            >>> stage = Stage(name="train", steps=9, learning_rate=2e-6, rates={"model.connector": 1e-5})
            >>> stage.rate_of("model.connector.weight"), stage.rate_of("model.connector_norm.weight")
            (1e-05, 2e-06)
        """
        holding = [root for root in self.rates if f"{path}.".startswith(f"{root}.")]
        return self.rates[max(holding, key=len)] if holding else self.learning_rate


def plain_logits(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "batch last vocab"]:
    """The scores of `model` for `batch`, in one forward without a cache; `labels` are kept from it.

    They begin at the first column that some row's target needs (see `at_targets`), where the model can leave others out.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kept = keeping(model, columns_needed(batch["labels"])) if "labels" in batch else {}
    return model(**inputs, **kept, use_cache=False).logits


class Method(ABC):
    """A continual-learning method. Every verb is optional; most methods write `begin_stage`.

    Order of calls: ``arrange``; then for each task ``begin_task``, for each of its ``stages`` ``begin_stage``,
    ``training_data``, (``loss``: ``logits`` and their ``parts``; ``before_step``) per step or ``observe`` per batch,
    ``end_stage``; then ``end_task``.

    Resumption: structure (new modules) is made in ``begin_task`` and ``begin_stage``, values in the steps and in the
    ``end_`` verbs. On a fresh model the loop calls ``rebuild`` for finished tasks and the ``begin_`` verbs for the
    current one, then loads ``stored_tensors`` and ``state_dict``. So what a ``begin_`` verb computes from the model's
    values (a teacher, say) belongs into ``state_dict``.

    Attributes:
        shares_parameters: every task goes on training the same parameters; False: each task has parameters of its own.
        further_options: the class whose fields its ``**options`` are; None: it takes none.
        can_shard: right also where the base model's weights are spread over processes (`training.sharding`): nothing reads
            or changes their values outside of a forward.
        mixtures: the mixtures that the method works with, if it does.
        trained: names of all parameters that ever had gradients; kept up by the training loop.
    """

    shares_parameters: ClassVar[bool] = True
    further_options: ClassVar["type[BaseModel] | None"] = None
    can_shard: bool = False
    mixtures: Mixtures | None = None

    def __init__(self, model: nn.Module, *, settings: "TrainSettings") -> None:
        # Of the model a method needs no more here; subclasses look at it, attach modules, freeze.
        self.settings = resolve_rate(settings, model)
        self.trained: set[str] = set()

    @property
    def name(self) -> str:
        """What tells this method's checkpoints from those of another."""
        return type(self).__name__

    def arrange(self, stream: Stream) -> Stream:
        """The stream as this method learns it."""
        return stream

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Prepares the model for `task`: grows modules, draws memory. torch's generator is seeded by the loop."""

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """The stages of `task` in order; a pure function."""
        steps = self.settings.steps * task.num_merged
        return (Stage(name="train", steps=steps, learning_rate=self.settings.rate),)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Sets ``requires_grad`` of every parameter: what has it is what trains."""

    def training_data(self, task: Task) -> Sequence[Sample]:
        """The samples a stage of `task` draws from; asked once per stage, after `begin_stage`."""
        return task.train

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "batch last vocab"]:
        """What the model says to `batch` while it learns; scores of first tokens that no target needs may be missing (`at_targets`)."""
        return plain_logits(model, batch)

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Named parts of the loss, each a mean over the targets of `batch`; the loop adds and weights them."""
        return {"next_token": next_token_loss(logits, batch["labels"])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `parts` of the `logits`: write those two, then other things can be added to the method."""
        return self.parts(model, batch, self.logits(model, batch))

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which `model` gives the logits of the untouched base, bit for bit.

        Raises:
            UserError: the method trains the base's own weights.
        """
        raise UserError(
            f"{type(self).__name__} trains the model's own weights, so the base model is not in it any more. "
            "Use a method that only adds to the model (LoRA, prefixes, learners), or keep a copy as the teacher (teacher: previous)."
        )

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """Takes statistics from one batch of a forward-only stage, without gradients.

        With several processes each one sees all samples, so that statistics need no reduction.
        """
        raise NotImplementedError(f"{type(self).__name__} has a stage without gradient but no observe().")

    def before_step(self, model: nn.Module) -> None:
        """May change the gradients, which are complete but not yet clipped."""

    def end_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Uses what the stage gave."""

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Freezes, merges, stores."""

    def rebuild(self, model: nn.Module, task: Task) -> None:
        """Gives a fresh model the structure it has after `task`; values are loaded afterwards."""
        self.begin_task(model, task)
        for stage in self.stages(task):
            self.begin_stage(model, task, stage)

    def arms(self) -> tuple[Arm, ...]:
        """The ways to use what was learnt."""
        return (Arm(name="default", enter=lambda task: contextlib.nullcontext()),)

    def state_dict(self) -> dict[str, Tensor]:
        """The method's own tensors, those outside the model."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} saves {sorted(state)} but has no load_state_dict()."

    def stored_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What must be kept beside the base model: all parameters that ever trained, and the buffers beside them."""
        owners = {name.rpartition(".")[0] for name in self.trained}
        beside = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners}
        return {name: value for name, value in model.state_dict().items() if name in self.trained | beside}


METHODS: Registry[type[Method]] = Registry("method")
