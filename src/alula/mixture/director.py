"""Who decides which experts speak in a forward: the hooks that build the context and hand it down."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from alula.context import KEYWORD, OFF, Cell, Context, Decoding, Observer, Recorder, Routing, Variable, prompt_mask
from alula.errors import UserError
from alula.mixture.mixture import introduce, own_parameters
from alula.models.graph import output_with_parameters
from alula.models.logits import keeping

if TYPE_CHECKING:
    from alula.mixture.handle import Mixtures

T = TypeVar("T")
_NOT_IN_A_PROMPT_PASS = ("labels", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "num_logits_to_keep", KEYWORD)


class PerCache(weakref.WeakKeyDictionary[Any, T]):
    """What is known of the generation of each cache; a pickled model has no generation."""

    def __reduce__(self) -> tuple[type["PerCache[T]"], tuple[()]]:
        return type(self), ()


class Director:
    """Builds each forward's `Context`.

    A pre-hook on the model adds the context as one keyword; Transformers hands it down to the attention modules, where
    a tap per layer puts it into the layer's cell. A sample-level decision is made once, on the prompt, and lives with
    the `Cache` object of its generation: two interleaved generations do not disturb each other.
    """

    def __init__(self, mixtures: "Mixtures") -> None:
        self.mixtures = mixtures
        self._decided: PerCache[Tensor] = PerCache()
        self._answers: PerCache[Decoding] = PerCache()
        self._pending: Variable[Tensor | None] = Variable("alula_pending", None)
        self._route: Variable[Tensor | None] = Variable("alula_route", None)
        self._recorder: Variable[Recorder | None] = Variable("alula_recorder", None)
        self._observer: Variable[Observer | None] = Variable("alula_observer", None)
        self._hooks: list[Any] = []

    def enter(self, cells: Sequence[Cell]) -> None:
        """Places the hooks: one before and one after the model, one after its decoder, one tap per layer."""
        introduce(self.mixtures.sites.values())
        model, parts = self.mixtures.model, self.mixtures.anatomy
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
            model.get_submodule(parts.decoder).register_forward_hook(self._keep_skipped, with_kwargs=True),
        ]
        for path, cell in zip(parts.attention, cells, strict=True):
            tap = partial(_tap, cell)
            self._hooks.append(model.get_submodule(path).register_forward_pre_hook(tap, with_kwargs=True))

    def leave(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget_answers(self) -> None:
        """Lets mixtures look up anew what an answer needs: experts, gates or who trains changed in the middle of it."""
        self._answers.clear()

    @contextlib.contextmanager
    def recording(self, *, recorder: Recorder | None = None, observer: Observer | None = None) -> Iterator[None]:
        """Lets `recorder` see every mixture's weights and `observer` every mixture's input, inside the block.

        Where the prompt decides, a recorder sees who speaks on it, and not the same again for each token of the answer.
        """
        before, seen_before = self._recorder.set(recorder), self._observer.set(observer)
        try:
            yield
        finally:
            self._recorder.reset(before)
            self._observer.reset(seen_before)

    @contextlib.contextmanager
    def deciding(self, log_weights: Tensor) -> Iterator[None]:
        """Takes `log_weights` (batch x classes) as every forward's sample-level decision, inside the block."""
        token = self._route.set(log_weights)
        try:
            yield
        finally:
            self._route.reset(token)

    @contextlib.contextmanager
    def on_prompts(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Decides on a batch's prompts (what precedes the labels, if there are any) and holds to it inside the block."""
        routing = self.mixtures.current
        if routing.router is None or routing.level == "token" or not self.mixtures.names:
            yield
            return
        with self.deciding(self.decide(inputs, temperature=routing.temperature, threshold=_threshold(routing))):
            yield

    @torch.no_grad()
    def describe(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The prompt's features at the prompt router's layers: one pass of the base model."""
        model, parts = self.mixtures.model, self.mixtures.anatomy
        ids = inputs.get("input_ids")
        if ids is None:
            raise UserError("A sample-level decision needs `input_ids`; the call came without them. Pass token ids.")
        valid = _valid(inputs.get("attention_mask"), ids)
        prompt = prompt_mask(valid, inputs.get("labels"))
        seen: dict[int, Tensor] = {}

        def catch(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                seen[layer] = self.mixtures.prompt_router.features(hidden, prompt, parts.image_mask(ids))

            return hook

        layers = self.mixtures.prompt_router.layers
        hooks = [model.get_submodule(parts.layers[layer]).register_forward_pre_hook(catch(layer), with_kwargs=True) for layer in layers]
        try:
            with self.mixtures.using(OFF):
                asked = {key: value for key, value in inputs.items() if key not in _NOT_IN_A_PROMPT_PASS}
                model(**asked, **keeping(model, 1), use_cache=False)  # nobody reads the logits
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[layer] for layer in layers]

    def decide(self, inputs: Mapping[str, Any], *, temperature: float | None = None, threshold: float | None = None) -> Tensor:
        """Log-weights per sample over all experts and, if known or with a threshold, the base model (batch x classes)."""
        router = self.mixtures.prompt_router
        return router.log_weights(self.describe(inputs), experts=self.mixtures.names, temperature=temperature, threshold=threshold)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = dict(kwargs)
        if args:
            inputs["input_ids"] = args[0]
        return args, {**kwargs, KEYWORD: self.context(inputs)}

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        pending, cache = self._pending.get(), getattr(output, "past_key_values", None)
        if pending is not None and cache is not None:
            self._decided[cache] = pending
        self._pending.set(None)

    def _keep_skipped(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cross-attention layers (Mllama) are skipped by a batch without images; what trains there stays in the graph."""
        context, sites = kwargs.get(KEYWORD), self.mixtures.sites.values()
        if context is None or not torch.is_grad_enabled():
            return output
        skipped = [mixture for mixture in sites if mixture.cell.context is not context]
        return output_with_parameters(output, own_parameters(skipped)) if skipped else output

    def context(self, inputs: Mapping[str, Any]) -> Context:
        """The context of a call with these keywords."""
        routing, parts = self.mixtures.current, self.mixtures.anatomy
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        like = ids if ids is not None else embeds
        if like is None:
            raise UserError("The call has neither `input_ids` nor `inputs_embeds`. Pass one of them.")
        shape = (int(like.shape[0]), int(like.shape[1]))
        choice = self._choose(routing, inputs, shape, like.device)
        recorder, observer = self._recorder.get(), self._observer.get()
        decoding = self._decoding(routing, choice, inputs.get("past_key_values"), like)
        if observer is not None or (recorder is not None and decoding is not None and decoding.told is None):
            decoding = None  # every token is shown
        return Context(
            shape=shape,
            routing=routing,
            image_mask=parts.image_mask(ids) if ids is not None else None,
            valid=_valid(inputs.get("attention_mask"), like),
            recorder=recorder,
            observer=observer,
            decoding=decoding,
            **choice,
        )

    def _decoding(self, routing: Routing, choice: Mapping[str, Any], cache: Any, like: Tensor) -> Decoding | None:
        """What holds throughout these answers; None unless this is one token of each, without gradients.

        Who speaks is read here once: every layer would wait for it. A prompt, also that of a later turn, begins anew.
        """
        if cache is None:
            return None
        if like.shape[1] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling() or self._is_autocast():
            self._answers.pop(cache, None)
            return None
        weights, told = choice.get("weights"), None
        if weights is not None:
            rows = (zip(choice["active"], row, strict=True) for row in weights.tolist())
            told = tuple(tuple((index, share) for index, share in row if share) for row in rows)
        elif not _by_token(routing) or not choice["active"]:
            return None
        known = self._answers.get(cache)
        if known is None or known.told != told or known.routing != routing:
            known = self._answers[cache] = Decoding(routing, told)
        return known

    def _is_autocast(self) -> bool:
        site = next(iter(self.mixtures.sites.values()), None)
        return site is not None and torch.is_autocast_enabled(site.weight.device.type)

    def _choose(self, routing: Routing, inputs: Mapping[str, Any], shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
        names = self.mixtures.names
        everyone = tuple(range(len(names)))
        if routing.gate_of is not None:
            index = self.mixtures.index(routing.gate_of)
            return {"active": (index,), "gate_of": index}
        if routing.fixed is not None or not names:
            chosen = {self.mixtures.index(name): weight for name, weight in (routing.fixed or {}).items()}
            weights = torch.tensor(list(chosen.values()), device=device).expand(shape[0], -1)
            return {"active": tuple(chosen), "weights": weights if chosen else None}
        if routing.level == "token":
            return {"active": everyone}
        log_weights = self._prompt_decision(routing, inputs, shape)
        if routing.level == "combined":
            return {
                "active": everyone,
                "prior": log_weights if routing.router == "analytic" else log_weights[:, : len(names)].clamp(min=-1e4),
            }
        best, classes = log_weights.topk(min(routing.top_k, log_weights.shape[-1]), dim=-1)
        weights = torch.zeros_like(log_weights).scatter(-1, classes, best.softmax(dim=-1))[:, : len(names)]
        active = tuple(torch.nonzero(weights.any(dim=0)).flatten().tolist())
        return {"active": active, "weights": weights[:, list(active)] if active else None}

    def _prompt_decision(self, routing: Routing, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        given, cache = self._route.get(), inputs.get("past_key_values")
        if cache is not None and shape[1] > 1 and cache.get_seq_length() == 0:
            self._decided.pop(cache, None)  # it was used before, and emptied
        decided = given if given is not None else (self._decided.get(cache) if cache is not None else None)
        if decided is None:
            if cache is not None and cache.get_seq_length() > 0:
                raise UserError(
                    "This cache was filled without a routing decision, so its answer cannot be continued under sample-level "
                    "routing. Start the generation anew with the experts attached."
                )
            decided = self.decide(inputs, temperature=routing.temperature, threshold=_threshold(routing))
            self._pending.set(decided)
            if cache is not None:
                self._decided[cache] = decided
        if len(decided) != shape[0]:
            if shape[0] % len(decided):
                raise UserError(f"The routes of {len(decided)} prompts came to a batch of {shape[0]} rows. Generate for the same prompts.")
            decided = decided.repeat_interleave(shape[0] // len(decided), dim=0)
        return decided


def _threshold(routing: Routing) -> float | None:
    """How unlike its own prompts an expert may still be given; the other levels have no such threshold here."""
    return routing.threshold if routing.null == "threshold" and routing.level == "sample" else None


def _by_token(routing: Routing) -> bool:
    """Whether a token's own products with the gates decide and nothing else: no prior, no null option, no groups, no gate alone."""
    return routing.level == "token" and routing.null == "none" and not routing.groups and routing.gate_of is None


def _tap(cell: Cell, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook on a layer's attention; no closure over the cell, so that a copied model has a copied cell."""
    cell.enter(kwargs.get(KEYWORD))


def _valid(attention_mask: Any, like: Tensor) -> Tensor:
    batch, tokens = like.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -tokens:].bool()
    return torch.ones(batch, tokens, dtype=torch.bool, device=like.device)
