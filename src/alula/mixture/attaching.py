"""`attach`: linear layers of a model become mixtures. It knows no file and no training."""

from collections.abc import Sequence

from torch import nn

from alula.context import Cell
from alula.errors import UserError
from alula.mixture.handle import Mixtures
from alula.mixture.mixture import Mixture
from alula.models.anatomy import anatomy
from alula.models.parameters import freeze_base, original_paths
from alula.routers import ROUTERS


def attach(
    model: nn.Module,
    *,
    linears: Sequence[str] | str | None = None,
    layers: Sequence[int] | None = None,
    part: str = "decoder",
    routers: Sequence[str] = ("gate", "arrow", "analytic"),
) -> Mixtures:
    """Turns linear layers of any Hugging Face vision-language model into mixtures, silent at birth.

    The base is frozen; learners that are there already, or come later, train on or not as their own handle says.

    Args:
        linears: names (``["q_proj", "v_proj"]``) or one regular expression; None is every linear of the part. The output
            head is never taken.
        layers: decoder layers by index; None is all.
        part: ``decoder`` unless asked; by name alone ``q_proj`` would silently hit the encoder of many models.
        routers: which routers are laid on the experts.

    Raises:
        UserError: nothing matches (with what there is), or the model carries mixtures already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> mixtures = attach(model, linears=["q_proj", "v_proj"])
        >>> mixtures.grow("invoices", rank=2)
        >>> mixtures.summary()
        '4 linear layers of the decoder (q_proj, v_proj) carry 1 experts'
    """
    if any(isinstance(module, Mixture) for module in model.modules()):
        raise UserError("This model carries mixtures already. Use the handle that `attach` gave, or `detach` first.")
    parts = anatomy(model)
    found, names = parts.linears(model, part=part, pattern=linears, layers=layers), original_paths(model)
    cells = [Cell() for _ in parts.layers]
    shared: dict[tuple[str, str], nn.Module] = {}
    sites: dict[str, Mixture] = {}
    for place, host in found.items():
        layer = next((i for i, prefix in enumerate(parts.layers) if place.startswith(f"{prefix}.")), None)
        if layer is None:
            raise UserError(f"{place} is in no decoder layer; mixtures live in decoder layers. Choose other linears.")
        path = names[place]
        block = path.rpartition(".")[0]
        mixture = Mixture(host, path=path, block=block, cell=cells[layer])
        for name in routers:
            kind = ROUTERS[name]
            if kind.is_shared:
                mixture.routers[name] = shared.setdefault((block, name), kind(host.in_features))
            else:
                mixture.routers[name] = kind(host.in_features)
        sites[path] = mixture
    freeze_base(model)
    places = {names[place]: place for place in found}
    for path, mixture in sites.items():
        model.set_submodule(places[path], mixture.train(model.training))
    handle = Mixtures(model, parts, sites, places=places)
    handle.director.enter(cells)
    return handle
