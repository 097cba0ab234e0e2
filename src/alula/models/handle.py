"""What every handle on wrapped modules can do: give its tensors and take them back, exchange the base's, and leave without a trace."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor, nn

from alula.errors import UserError
from alula.models.anatomy import Anatomy
from alula.models.parameters import put, tensors_for

Wrapper = TypeVar("Wrapper", bound=nn.Module)


class Handle(Generic[Wrapper]):
    """A model, and the wrappers in it: each has a ``host``, which stood there before, and the ``index`` of its decoder layer.

    Attributes:
        own: how the names of the parameters begin that a wrapper brought.
        what: their name, for errors.
    """

    own: tuple[str, ...]
    what: str

    def __init__(self, model: nn.Module, parts: Anatomy, sites: Mapping[str, Wrapper]) -> None:
        self.model, self.anatomy, self.sites = model, parts, dict(sites)
        self._inside = {path: list(wrapper.get_submodule("host").modules()) for path, wrapper in sites.items()}
        self._undo: list[Callable[[], None]] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the wrappers brought, routers included, by their path in the model."""
        return {f"{path}.{name}": parameter for path, wrapper in self.sites.items() for name, parameter in self._brought(wrapper).items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that must be kept beside `config`, by layer."""
        return {
            f"layers.{wrapper.index}.{name}": parameter.detach()
            for wrapper in self.sites.values()
            for name, parameter in self._brought(wrapper).items()
        }

    def _brought(self, wrapper: Wrapper) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in wrapper.named_parameters() if name.startswith(self.own)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave.

        Raises:
            UserError: a tensor is missing, too many or of another shape; nothing was changed then.
        """
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            wanted, came = (tuple(found[name].shape) if name in found else "none" for found in (own, tensors))
            if wanted != came:
                raise UserError(f"'{name}' came with shape {came}, the model wants {wanted}. Attach with the options they were saved with.")
        put(own, tensors)

    def exchange(self, values: Mapping[str, Tensor], *, origin: str) -> None:
        """Puts other parameters of the model (a connector that was trained, too) in place until `detach`.

        Args:
            origin: where they come from, for the error.

        Raises:
            UserError: the model has no such parameter, or one of another shape.
        """
        own = tensors_for(self.model, values, origin=origin, remedy="Load the base model they were made for.")
        former = {name: tensor.detach().clone() for name, tensor in own.items()}
        put(own, values)
        self._undo.append(partial(put, own, former))

    def detach(self) -> nn.Module:
        """Puts every host back and undoes the rest, the last first: the model is what it was before.

        Raises:
            UserError: something else was attached later and is still there; nothing was changed then.
        """
        hosts = {path: wrapper.get_submodule("host") for path, wrapper in self.sites.items()}
        for path, host in hosts.items():
            if set(host.modules()) != set(self._inside[path]):
                raise UserError(f"{path} was changed after the {self.what} came. Detach what was attached last (LoRA experts) first.")
        for path, host in hosts.items():
            self.model.set_submodule(path, host)
        for undo in reversed(self._undo):
            undo()
        self._undo, self.sites = [], {}
        return self.model
