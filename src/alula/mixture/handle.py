"""What `attach` gives back: the handle on a model's mixtures, with its verbs."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alula.context import Routing, Variable
from alula.errors import UserError, nearest
from alula.experts.lora import check_name
from alula.mixture.director import Director
from alula.mixture.mixture import Mixture
from alula.models.anatomy import Anatomy
from alula.models.parameters import freeze_base
from alula.routers import ROUTERS, GateRouter, PromptRouter, Router
from alula.routers.stored import by_router


@dataclass(frozen=True, kw_only=True)
class ExpertState:
    """One row of the table that `Mixtures.experts` gives.

    Attributes:
        name: the expert's, which is that of the task it learnt.
        rank: width of its bottleneck; of several the widest.
        active: it may speak in the next forward: the routing in force names it, or leaves the choice to a router.
        trainable: its matrices or its gates get gradients.
        merged: the weight with which it is in the model's own weights since `Mixtures.merge`; None: it is not.
    """

    name: str
    rank: int
    active: bool
    trainable: bool
    merged: float | None = None


class Mixtures:
    """Every mixture of one model, and how experts are chosen in it. Made by `attach`.

    Attributes:
        model: the model, whose linear layers are mixtures now.
        sites: each mixture by the path that its host had in the base model, whatever else was attached before.
        routing: how experts are chosen unless `using` says otherwise; at first the base model alone.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, sites: Mapping[str, Mixture], *, places: Mapping[str, str]) -> None:
        self.model, self.anatomy, self.sites, self._places = model, parts, dict(sites), places
        self.routing = Routing(fixed={})
        self._override: Variable[Routing | None] = Variable("alula_routing", None)
        self.prompt_router = PromptRouter(layers=_prompt_layers(parts), dim=parts.hidden_size)
        self.director = Director(self)
        self._merged: tuple[ExpertState, ...] = ()

    @property
    def names(self) -> list[str]:
        """The experts, in order of arrival; none after `detach`."""
        return next((list(mixture.experts.names) for mixture in self.sites.values()), [])

    def experts(self) -> tuple[ExpertState, ...]:
        """What is on the model and what it does: one row for each expert, in order of arrival.

        After `merge` the rows are those of the experts that were there; after `detach` there are none.
        """
        routing = self.current
        named = self.names if routing.fixed is None else [name for name, weight in routing.fixed.items() if weight]
        speaking = [routing.gate_of] if routing.gate_of else named
        found = []
        for index, name in enumerate(self.names):
            own = [(mixture.experts.A[index], mixture.experts.B[index]) for mixture in self.sites.values()]
            gates = [router.gates[index] for _, _, router in self._routers() if isinstance(router, GateRouter)]
            trains = any(tensor.requires_grad for tensor in (*gates, *(matrix for pair in own for matrix in pair)))
            found.append(ExpertState(name=name, rank=max(len(down) for down, _ in own), active=name in speaking, trainable=trains))
        return tuple(found) or self._merged

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
        self._check_free(name)
        for mixture in self.sites.values():
            weight = mixture.weight
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
            mixture.experts.grow(
                name, rank=rank, alpha=2.0 * rank if alpha is None else alpha, dtype=dtype, device=weight.device, generator=generator
            )
            for router in mixture.named_routers().values():
                router.grow(name, mixture.experts)
        self.director.forget_answers()

    def adopt(self, name: str, pairs: Mapping[str, Mapping[str, Tensor]], *, scales: Mapping[str, float]) -> None:
        """Adds a frozen expert whose matrices are there already.

        Args:
            pairs: ``A`` (rank x in) and ``B`` (out x rank) by site; sites that are not in it are left alone. Matrices of a mapped
                file stay unread until they speak.
            scales: what ``B A`` is multiplied by, by site.

        Raises:
            UserError: the name is taken or cannot name a folder.
        """
        self._check_free(name)
        for path, mixture in self.sites.items():
            mixture.adopt(name, pairs.get(path), scale=scales.get(path, 1.0))
        self.refresh()

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self.names:
            raise UserError(f"There is an expert '{name}' already. Choose another name, or `remove` it first.")

    def remove(self, name: str) -> None:
        """Takes an expert out; outputs are bit-identical to those before it came."""
        self.index(name)
        for mixture in self.sites.values():
            mixture.experts.remove(name)
            for router in mixture.named_routers().values():
                router.remove(name)
        self.prompt_router.remove(name)
        self.director.forget_answers()

    def freeze(self) -> None:
        """Base, experts and routers train no more; learners are their own handle's matter."""
        freeze_base(self.model)
        self.director.forget_answers()
        for mixture in self.sites.values():
            mixture.experts.requires_grad_(False)
            mixture.routers.requires_grad_(False)

    def train_expert(self, name: str) -> None:
        """Of base, experts and routers, only this expert trains."""
        index = self.index(name)
        self.freeze()
        for mixture in self.sites.values():
            mixture.experts.A[index].requires_grad_(True)
            mixture.experts.B[index].requires_grad_(True)

    def train_gate(self, name: str) -> None:
        """Of base, experts and routers, only this expert's gates train."""
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
        self.director.forget_answers()

    def detach(self) -> nn.Module:
        """Puts every host back and removes the hooks: the model is exactly what it was before `attach`.

        Raises:
            UserError: something was attached around the mixtures since (learners).
        """
        self._check_places()
        self.director.leave()
        for path, mixture in self.sites.items():
            self.model.set_submodule(self._places[path], mixture.host)
        self.sites = {}
        return self.model

    @torch.no_grad()
    def merge(self, weights: Mapping[str, float]) -> nn.Module:
        """Adds a weighted set of experts into the hosts' own weights and detaches: a plain model, without alula.

        Raises:
            UserError: an unknown expert, a host whose weight is not a plain matrix (quantised), or as in `detach`.
        """
        self._check_places()
        for name in weights:
            self.index(name)
        for path, mixture in self.sites.items():
            if not mixture.weight.is_floating_point():
                kind = type(mixture.host).__name__
                raise UserError(f"{path} is a {kind}; only plain linear layers can be merged. Load the model unquantised.")
        for mixture in self.sites.values():
            deltas = (weight * mixture.experts.delta(name) for name, weight in weights.items())
            mixture.weight.copy_((mixture.weight.float() + sum(deltas, start=torch.tensor(0.0))).to(mixture.weight.dtype))
        self._merged = tuple(replace(one, active=False, trainable=False, merged=weights.get(one.name)) for one in self.experts())
        return self.detach()

    def _check_places(self) -> None:
        for path, mixture in self.sites.items():
            if not _stands_at(self.model, self._places[path], mixture):
                raise UserError(f"{path} is not where its mixture was put. Detach what was attached last (learners) first.")

    def router_tensors(self, name: str) -> dict[str, Tensor]:
        """All that routes to an expert (or, for ``base``, away from all), by router and site."""
        found = {f"prompt.{key}": tensor for key, tensor in self.prompt_router.stored(name).items()}
        for kind, where, router in self._routers():
            found |= {f"{kind}.{where}.{key}": tensor for key, tensor in router.stored(name).items()}
        return found

    def restore_router(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `router_tensors` gave, but nothing of routers that `attach(routers=)` left out.

        Raises:
            UserError: a tensor of no router, or of another shape; nothing was taken back then.
        """
        routers: dict[str, PromptRouter | Router] = {"prompt": self.prompt_router}
        routers |= {f"{kind}.{where}": router for kind, where, router in self._routers()}
        left_out = set(ROUTERS) - {place.partition(".")[0] for place in routers}
        wanted = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] not in left_out}
        for place, own in by_router(wanted, {place: router.shapes(name) for place, router in routers.items()}).items():
            if own:
                routers[place].restore(name, own)
        self.director.forget_answers()

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
