"""A method with additions: to the training loop it is one method. It knows no addition by name."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Arm, Method, Stage

OWN = "method"
"""Under this name the method's own tensors stand beside those of its additions."""


class Composed(Method):
    """A method and what is added to it. Made by `compose`.

    Attributes:
        inner: the method.
        additions: by name, in the order in which they work.
    """

    def __init__(self, model: nn.Module, *, inner: Method, additions: Mapping[str, Addition]) -> None:
        super().__init__(model, settings=inner.settings)
        self.inner, self.additions = inner, dict(additions)
        self.trained, self.mixtures = inner.trained, inner.mixtures
        # what mixtures add is whole on every process; the model's own weights are not
        reads_shards = self.mixtures is None and any(addition.reads_weights for addition in additions.values())
        self.can_shard = inner.can_shard and not reads_shards
        self._model = model
        self._has_gradient = True

    @property
    def name(self) -> str:
        """The method's name and those of its additions."""
        return " + ".join((self.inner.name, *self.additions))

    def arrange(self, stream: Stream) -> Stream:
        """The stream as the method learns it; additions see it."""
        arranged = self.inner.arrange(stream)
        for addition in self.additions.values():
            addition.arrange(arranged)
        return arranged

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """The method, then its additions."""
        self.inner.begin_task(model, task)
        for addition in self.additions.values():
            addition.begin_task(model, task)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """Those of the method."""
        return self.inner.stages(task)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """The method, then its additions."""
        self._has_gradient = stage.gradient
        self.inner.begin_stage(model, task, stage)
        for addition in self.additions.values():
            addition.begin_stage(model, task, stage)

    def training_data(self, task: Task) -> Sequence[Sample]:
        """The method's data, and what additions make of it where something trains."""
        samples = self.inner.training_data(task)
        for addition in self.additions.values() if self._has_gradient else ():
            samples = addition.training_data(self._model, task, samples)
        return samples

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "batch tokens vocab"]:
        """The method's."""
        return self.inner.logits(model, batch)

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """The method's parts of the loss, and what one addition after another makes of them."""
        parts = self.inner.parts(model, batch, logits)
        for addition in self.additions.values():
            parts = addition.parts(model, batch, logits, parts)
        return parts

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """The method's."""
        return self.inner.base_model(model)

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """The method's."""
        self.inner.observe(model, batch)

    def before_step(self, model: nn.Module) -> None:
        """The method, then its additions."""
        self.inner.before_step(model)
        for addition in self.additions.values():
            addition.before_step(model)

    def end_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """The method's."""
        self.inner.end_stage(model, task, stage)

    def end_task(self, model: nn.Module, task: Task) -> None:
        """The additions, then the method, which may merge or freeze what they look at."""
        for addition in self.additions.values():
            addition.end_task(model, task)
        self.inner.end_task(model, task)

    def rebuild(self, model: nn.Module, task: Task) -> None:
        """The method's: additions make no modules."""
        self.inner.rebuild(model, task)

    def arms(self) -> tuple[Arm, ...]:
        """The method's, and what additions make of them."""
        arms = self.inner.arms()
        for addition in self.additions.values():
            arms = addition.arms(arms)
        return arms

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of method and additions, each below its name."""
        owners = {OWN: self.inner.state_dict()} | {name: addition.state_dict() for name, addition in self.additions.items()}
        return {f"{owner}/{key}": tensor for owner, state in owners.items() for key, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hands each its own."""
        owned: dict[str, dict[str, Tensor]] = {}
        for path, tensor in state.items():
            owner, _, key = path.partition("/")
            owned.setdefault(owner, {})[key] = tensor
        self.inner.load_state_dict(owned.get(OWN, {}))
        for name, addition in self.additions.items():
            addition.load_state_dict(owned.get(name, {}))

    def stored_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's."""
        return self.inner.stored_tensors(model)


def compose(model: nn.Module, method: Method, additions: Sequence[tuple[str, Mapping[str, Any]]], *, collator: Collator) -> Composed:
    """`method` with `additions`, (name, options) each, in the order in which they work.

    Raises:
        UserError: an unknown addition, one that comes twice or does not fit the method, options it does not take, or a
            method whose loss cannot be added to.
    """
    if type(method).loss is not Method.loss:
        raise UserError(
            f"{method.name} has a `loss` of its own, so nothing can be added to it. Methods that leave `loss` alone and write "
            "`logits` and `parts` can be added to. Split its loss into those two."
        )
    made: dict[str, Addition] = {}
    for name, options in additions:
        if name in made:
            raise UserError(f"The addition '{name}' comes twice. Each can be added once: take one out.")
        kind = ADDITIONS[name]
        try:
            made[name] = kind(method, model, collator=collator, **options)
        except TypeError as error:
            raise UserError(f"Addition '{name}' cannot be made with {dict(options)}: {error}. Correct its options.") from error
    return Composed(model, inner=method, additions=made)
