"""`attach` and what it gives back: the handle on a model's mixtures, with the five verbs."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import nn

from alula.context import Cell, Routing
from alula.errors import UserError, nearest
from alula.experts.lora import check_name
from alula.mixture.director import Director
from alula.mixture.mixture import Mixture
from alula.models.anatomy import Anatomy, anatomy
from alula.routers import ROUTERS, GateRouter, PromptRouter, Router


class Mixtures:
    """Every mixture of one model, and how experts are chosen in it. Made by `attach`.

    Attributes:
        model: the model, whose linear layers at `sites` are mixtures now.
        routing: how experts are chosen unless `using` says otherwise; at first the base model alone.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, sites: Mapping[str, Mixture]) -> None:
        self.model, self.anatomy, self.sites = model, parts, dict(sites)
        self.routing = Routing(fixed={})
        self._override: ContextVar[Routing | None] = ContextVar("alula_routing", default=None)
        self.prompt_router = PromptRouter(layers=_prompt_layers(parts), dim=parts.hidden_size)
        self.director = Director(self)

    @property
    def names(self) -> list[str]:
        """The experts, in order of arrival."""
        return list(next(iter(self.sites.values())).experts.names)

    @property
    def current(self) -> Routing:
        """The routing in force here and now."""
        return self._override.get() or self.routing

    @contextlib.contextmanager
    def using(self, routing: Routing) -> Iterator[None]:
        """Chooses experts by `routing` inside the block; nests, and is private to the thread."""
        self.check(routing)
        token = self._override.set(routing)
        try:
            yield
        finally:
            self._override.reset(token)

    def check(self, routing: Routing) -> None:
        """Refuses a routing that names unknown experts, routers, levels or null options.

        Raises:
            UserError: with what is known.
        """
        for name in (*(routing.fixed or {}), *([routing.gate_of] if routing.gate_of else [])):
            self.index(name)
        if routing.router is not None:
            ROUTERS[routing.router]
            attached = next(iter(self.sites.values())).named_routers()
            if routing.level != "sample" and routing.router not in attached:
                there = nearest(routing.router, attached)
                raise UserError(f"Router '{routing.router}' is not on these mixtures. {there} Name it in `attach(routers=)`.")
        for word, known in ((routing.level, ("token", "sample", "combined")), (routing.null, _NULL_OPTIONS)):
            if word not in known:
                raise UserError(f"Unknown routing option '{word}'. {nearest(word, known)}")
        if routing.null == "threshold" and routing.router == "analytic" and routing.level != "sample":
            raise UserError("Router 'analytic' has a threshold at level 'sample' only. Set that level, or null='none'.")
        if routing.router in ("gate", "arrow", "dense") and routing.level == "sample":
            raise UserError(f"Router '{routing.router}' decides per token; its levels are 'token' and 'combined'. Set one of them.")

    def index(self, name: str) -> int:
        """The position of an expert.

        Raises:
            UserError: no such expert.
        """
        if name not in self.names:
            raise UserError(f"Unknown expert '{name}'. {nearest(name, self.names)}")
        return self.names.index(name)

    def grow(self, name: str, *, rank: int = 8, alpha: float | None = None, generator: torch.Generator | None = None) -> None:
        """Adds a silent expert at every site; every tensor that is there stays as it is.

        Args:
            rank: width of the bottleneck. Default 8: ours, for small models; 16 in arXiv 2402.05859.
            alpha: the update is scaled by ``alpha / rank``; None is twice the rank, as the VLM recipes have it.

        Raises:
            UserError: the name is taken or cannot name a folder.
        """
        check_name(name)
        if name in self.names:
            raise UserError(f"There is an expert '{name}' already. Choose another name, or `remove` it first.")
        for mixture in self.sites.values():
            weight = mixture.weight
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
            mixture.experts.grow(
                name, rank=rank, alpha=2.0 * rank if alpha is None else alpha, dtype=dtype, device=weight.device, generator=generator
            )
            for router in mixture.named_routers().values():
                router.grow(name, mixture.experts)

    def remove(self, name: str) -> None:
        """Takes an expert out; outputs are bit-identical to those before it came."""
        self.index(name)
        for mixture in self.sites.values():
            mixture.experts.remove(name)
            for router in mixture.named_routers().values():
                router.remove(name)
        self.prompt_router.remove(name)

    def freeze(self) -> None:
        """Nothing in the model trains any more: base, experts and routers."""
        self.model.requires_grad_(False)

    def train_expert(self, name: str) -> None:
        """Of the whole model, only this expert trains; it speaks alone."""
        index = self.index(name)
        self.freeze()
        for mixture in self.sites.values():
            mixture.experts.A[index].requires_grad_(True)
            mixture.experts.B[index].requires_grad_(True)

    def train_gate(self, name: str) -> None:
        """Of the whole model, only this expert's gates train."""
        index = self.index(name)
        self.freeze()
        for mixture in self.sites.values():
            router = mixture.named_routers()["gate"]
            assert isinstance(router, GateRouter)
            router.gates[index].requires_grad_(True)

    def refresh(self) -> None:
        """Recomputes what routers derive from trained experts (Arrow's prototypes)."""
        for mixture in self.sites.values():
            for router in mixture.named_routers().values():
                router.refresh(mixture.experts)

    def detach(self) -> nn.Module:
        """Puts every host back and removes the hooks: the model is exactly what it was before `attach`.

        Raises:
            UserError: something was attached around the mixtures since (learners).
        """
        for path, mixture in self.sites.items():
            if not _stands_at(self.model, path, mixture):
                raise UserError(f"{path} is not where its mixture was put. Detach what was attached last (learners) first.")
        self.director.leave()
        for path, mixture in self.sites.items():
            self.model.set_submodule(path, mixture.host)
        self.sites = {}
        return self.model

    @torch.no_grad()
    def merge(self, weights: Mapping[str, float]) -> nn.Module:
        """Adds a weighted set of experts into the hosts' own weights and detaches: a plain model, without alula.

        Raises:
            UserError: an unknown expert, or a host whose weight is not a plain matrix (quantised).
        """
        for name in weights:
            self.index(name)
        for path, mixture in self.sites.items():
            if not mixture.weight.is_floating_point():
                kind = type(mixture.host).__name__
                raise UserError(f"{path} is a {kind}; only plain linear layers can be merged. Load the model unquantised.")
        for mixture in self.sites.values():
            deltas = (weight * mixture.experts.delta(name) for name, weight in weights.items())
            mixture.weight.copy_((mixture.weight.float() + sum(deltas, start=torch.tensor(0.0))).to(mixture.weight.dtype))
        return self.detach()

    def router_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that routes to an expert (or, for ``base``, away from all), by router and site."""
        found = {f"prompt.{key}": tensor for key, tensor in self.prompt_router.stored(name).items()}
        for kind, where, router in self._routers():
            found |= {f"{kind}.{where}.{key}": tensor for key, tensor in router.stored(name).items()}
        return found

    def restore_router(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `router_tensors` gave."""
        grouped: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            site, _, last = key.rpartition(".")
            grouped.setdefault(site, {})[last] = tensor
        prompt = {key.removeprefix("prompt."): tensor for key, tensor in tensors.items() if key.startswith("prompt.")}
        self.prompt_router.restore(name, prompt)
        for kind, where, router in self._routers():
            if f"{kind}.{where}" in grouped:
                router.restore(name, grouped[f"{kind}.{where}"])

    def _routers(self) -> Iterator[tuple[str, str, Router]]:
        seen: set[int] = set()
        for path, mixture in self.sites.items():
            for kind, router in mixture.named_routers().items():
                if id(router) not in seen:
                    seen.add(id(router))
                    yield kind, mixture.block if router.is_shared else path, router

    def summary(self) -> str:
        """One line: how many linears of which part carry mixtures."""
        kinds = sorted({path.rsplit(".", 1)[-1] for path in self.sites})
        return f"{len(self.sites)} linear layers of the decoder ({', '.join(kinds)}) carry {len(self.names)} experts"


def _stands_at(model: nn.Module, path: str, mixture: nn.Module) -> bool:
    try:
        return model.get_submodule(path) is mixture
    except AttributeError:
        return False


def _prompt_layers(parts: Anatomy) -> list[int]:
    """Layers at a quarter, half and three quarters of the depth; cross-attention layers are left out without images."""
    always = [i for i, path in enumerate(parts.attention) if not path.endswith("cross_attn")]
    return sorted({always[len(always) * quarter // 4] for quarter in (1, 2, 3)})


_NULL_OPTIONS = ("none", "zero_expert", "sigmoid_keep", "threshold")


def attach(
    model: nn.Module,
    *,
    linears: Sequence[str] | str | None = None,
    layers: Sequence[int] | None = None,
    part: str = "decoder",
    routers: Sequence[str] = ("gate", "arrow", "analytic"),
) -> Mixtures:
    """Turns linear layers of any Hugging Face vision-language model into mixtures, silent at birth.

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
    found = parts.linears(model, part=part, pattern=linears, layers=layers)
    cells = [Cell() for _ in parts.layers]
    shared: dict[tuple[str, str], nn.Module] = {}
    sites: dict[str, Mixture] = {}
    for path, host in found.items():
        layer = next((i for i, prefix in enumerate(parts.layers) if path.startswith(f"{prefix}.")), None)
        if layer is None:
            raise UserError(f"{path} is in no decoder layer; mixtures live in decoder layers. Choose other linears.")
        block = path.rsplit(".", 1)[0]
        mixture = Mixture(host, path=path, block=block, cell=cells[layer])
        for name in routers:
            kind = ROUTERS[name]
            if kind.is_shared:
                mixture.routers[name] = shared.setdefault((block, name), kind(host.in_features))
            else:
                mixture.routers[name] = kind(host.in_features)
        sites[path] = mixture
    model.requires_grad_(False)
    for path, mixture in sites.items():
        model.set_submodule(path, mixture.train(model.training))
    handle = Mixtures(model, parts, sites)
    handle.director.enter(cells)
    return handle
