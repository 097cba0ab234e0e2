"""Learnt vectors that scale keys, values and the MLP's inner activation of each decoder layer, all ones at birth.

The seam is the one of the mixtures: a linear layer is swapped for a small wrapper through `nn.Module.set_submodule`. A
wrapper looks at nothing but the hidden state it gets, so caches, masks and recomputed activations are none of its business.
It knows no method.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.errors import UserError
from alula.models.anatomy import anatomy

KEYS = ("k_proj", "key", "k")
VALUES = ("v_proj", "value", "v")
INNER = ("down_proj", "fc2", "w2", "dense_4h_to_h")
"""The last linear of an MLP, by the names it has in Transformers: its input is the inner activation."""


class Scaled(nn.Module):
    """``scale * host(x)`` in place of one linear layer, or ``host(scale * x)``.

    Args:
        host: the frozen layer, plain or quantised.
        scales_input: the vector is as long as the input, and acts on it.

    Attributes:
        speaks: False: the host alone.

    Example:
        >>> scaled = Scaled(nn.Linear(2, 3), scales_input=False)
        >>> x = torch.ones(1, 2)
        >>> torch.equal(scaled(x), scaled.host(x))
        True
    """

    def __init__(self, host: nn.Linear, *, scales_input: bool) -> None:
        super().__init__()
        self.host, self.scales_input, self.speaks = host, scales_input, True
        size = host.in_features if scales_input else host.out_features
        # In fp32 whatever the host: near 1, a step of bf16 is 0.4 %.
        self.scale = nn.Parameter(torch.ones(size, device=host.weight.device))

    @property
    def weight(self) -> Tensor:
        """The host's weight, for code that looks at a linear layer's dtype or device."""
        return self.host.weight

    @property
    def bias(self) -> Tensor | None:
        """The host's bias."""
        return self.host.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The host's output, with it or its input scaled."""
        if not self.speaks:
            return self.host(x)
        if self.scales_input:
            return self.host((x * self.scale).to(x.dtype))
        out = self.host(x)
        return (out * self.scale).to(out.dtype)


class Scales:
    """The scales of one model. Made by `attach_scales`.

    Attributes:
        sites: each wrapper by the path of the linear layer in whose place it stands.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Scaled]) -> None:
        self.model, self.sites = model, dict(sites)

    def train(self) -> None:
        """Of the whole model, only the scales train."""
        self.model.requires_grad_(False)
        for scaled in self.sites.values():
            scaled.scale.requires_grad_(True)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The base model inside the block."""
        before = {path: scaled.speaks for path, scaled in self.sites.items()}
        for scaled in self.sites.values():
            scaled.speaks = False
        try:
            yield
        finally:
            for path, speaks in before.items():
                self.sites[path].speaks = speaks

    def detach(self) -> nn.Module:
        """Puts every host back: the model is exactly what it was before `attach_scales`."""
        for path, scaled in self.sites.items():
            self.model.set_submodule(path, scaled.host)
        self.sites = {}
        return self.model


def attach_scales(model: nn.Module) -> Scales:
    """Gives keys, values and inner activations of every decoder layer a vector of ones, and freezes the rest.

    Layers without keys of their own (linear attention) keep their MLP's vector alone; cross-attention has its own.

    Raises:
        UserError: keys, values or MLPs are not linear layers of a known name (fused ones are not), or carry wrappers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> scales = attach_scales(LlamaForCausalLM(config))
        >>> {path.rpartition(".")[2]: len(scaled.scale) for path, scaled in scales.sites.items()}
        {'k_proj': 8, 'v_proj': 8, 'down_proj': 32}
    """
    found = anatomy(model).linears(model)
    sites: dict[str, Scaled] = {}
    for what, names in (("keys", KEYS), ("values", VALUES), ("inner activations", INNER)):
        chosen = {path: linear for path, linear in found.items() if path.rpartition(".")[2] in names}
        if not chosen:
            known = sorted({path.rpartition(".")[2] for path in found})
            raise UserError(
                f"No linear layer of the decoder gives {what} by name; there are {', '.join(known)}. Known names: {', '.join(names)}. "
                "Fused layers cannot be scaled in part: use a LoRA method for this model."
            )
        sites |= {path: Scaled(linear, scales_input=names is INNER) for path, linear in chosen.items()}
    for path, scaled in sites.items():
        if model.get_submodule(path) is not scaled.host:
            kind = type(model.get_submodule(path)).__name__
            raise UserError(f"{path} is wrapped already, in a {kind}. Scales want a plain model: detach first, or load it anew.")
    model.requires_grad_(False)
    ordered = {path: sites[path] for path in found if path in sites}
    for path, scaled in ordered.items():
        model.set_submodule(path, scaled.train(model.training))
    return Scales(model, ordered)
