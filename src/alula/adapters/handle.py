"""What `attach_adapters` gives back: the handle on a model's adapters."""

import contextlib
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.adapters.config import AdapterConfig
from alula.adapters.instruction import Instructions
from alula.adapters.site import ALL, FIRST, KEYWORD, NONE, AdapterMixture, Call, Recorder, tap_for
from alula.context import Variable, prompt_mask
from alula.errors import UserError, nearest
from alula.learners.features import valid_tokens
from alula.models.anatomy import Anatomy
from alula.models.graph import output_with_parameters
from alula.models.handle import Handle

SPEAKING = (ALL, FIRST, NONE)


class Adapters(Handle[AdapterMixture]):
    """The adapters of one model, and which of them speak. Made by `attach_adapters`.

    The instruction is what a row says before its first target; without `labels`, all that the first forward of a generation sees. It
    lives with that generation's `Cache`, so decoding steps, beams and several generations at once each keep their own.

    Attributes:
        model: the model, whose feed-forward networks at `sites` are mixtures now.
        config: how they sit in it.
    """

    own, what = ("adapters.", "router."), "adapters"

    def __init__(
        self, model: nn.Module, parts: Anatomy, sites: Mapping[str, AdapterMixture], config: AdapterConfig, embed: Instructions
    ) -> None:
        super().__init__(model, parts, sites)
        self.config, self.embed = config, embed
        self._speaking: Variable[str] = Variable("alula_adapters_speaking", ALL)
        self._given: Variable[Tensor | None] = Variable("alula_instruction", None)
        self._pending: Variable[Tensor | None] = Variable("alula_instruction_pending", None)
        self._recorder: Variable[Recorder | None] = Variable("alula_adapters_recorder", None)
        self._kept: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def using(self, speaking: str) -> Iterator[None]:
        """Who speaks inside the block: ``all`` by the routers, ``first`` (each layer's first adapter, for everybody), or ``none``.

        Raises:
            UserError: another word.
        """
        if speaking not in SPEAKING:
            raise UserError(f"Unknown '{speaking}'. {nearest(speaking, SPEAKING)}")
        token = self._speaking.set(speaking)
        try:
            yield
        finally:
            self._speaking.reset(token)

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Lets `recorder` see every router's choice inside the block."""
        token = self._recorder.set(recorder)
        try:
            yield
        finally:
            self._recorder.reset(token)

    @contextlib.contextmanager
    def on_prompts(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Takes the instructions of a batch (what precedes its labels, if it has any) for every forward inside the block."""
        token = self._given.set(self.instructions(inputs) if self.reads_instruction else None)
        try:
            yield
        finally:
            self._given.reset(token)

    @property
    def reads_instruction(self) -> bool:
        """Whether a choice is made, and by the instruction."""
        return self.config.num_experts > 1 and self.config.router != "token"

    def instructions(self, inputs: Mapping[str, Any]) -> Float[Tensor, "batch width"]:
        """The vector that each row of a call with these keywords is routed by.

        Raises:
            UserError: no token ids.
        """
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if ids is None:
            raise UserError("Adapters are chosen by the instruction, and the call has no `input_ids` to read it from. Pass token ids.")
        valid = valid_tokens(inputs.get("attention_mask"), ids, seen=0)
        return self.embed(ids, prompt_mask(valid, labels) & ~self.anatomy.image_mask(ids))

    def train(self, *, only_first: bool = False) -> None:
        """Lets adapters and routers train, or each layer's first adapter alone; changes nothing else."""
        for path, parameter in self.parameters().items():
            parameter.requires_grad_(not only_first or ".adapters.0." in path)

    def grow_from(self, single: Mapping[str, Tensor]) -> None:
        """Makes every adapter a copy of its layer's first one in `single`; the routers stay as they are.

        So whatever the routers choose, the output is, bit for bit, the one of that adapter alone.

        Args:
            single: what `tensors` gave, of adapters with one expert (stage 1) or more.

        Raises:
            UserError: a layer is missing, or another bottleneck.

        Source: Shen et al., "MoME", stage 2, https://arxiv.org/abs/2407.12709.
        """
        own = self.tensors()
        routers = {name: tensor for name, tensor in own.items() if ".router." in name}
        firsts = {name: tensor for name, tensor in single.items() if ".adapters.0." in name}
        sources = {name: re.sub(r"\.adapters\.\d+\.", ".adapters.0.", name) for name in own.keys() - routers.keys()}
        self.load({**routers, **firsts, **{name: firsts[source] for name, source in sources.items() if source in firsts}})

    def enter(self) -> None:
        """Places the hooks: one before and one after the model, one after its decoder, one tap per layer."""
        hooks = [self.model.register_forward_pre_hook(self._before, with_kwargs=True)]
        hooks.append(self.model.register_forward_hook(self._after, always_call=True))
        decoder = self.model.get_submodule(self.anatomy.decoder)
        hooks.append(decoder.register_forward_hook(self._keep_skipped, with_kwargs=True))
        for mixture in self.sites.values():
            attention = self.model.get_submodule(self.anatomy.attention[mixture.index])
            while isinstance(inner := getattr(attention, "host", None), nn.Module):  # learners around it may leave before the adapters
                attention = inner
            hooks.append(attention.register_forward_pre_hook(tap_for(mixture.passed), with_kwargs=True))
        self._undo += [hook.remove for hook in hooks]

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = {**kwargs, "input_ids": args[0]} if args else kwargs
        speaking, cache = self._speaking.get(), inputs.get("past_key_values")
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and embeds is None:
            raise UserError("The call has neither `input_ids` nor `inputs_embeds`. Pass one of them.")
        self._pending.set(None)
        like = inputs["inputs_embeds"][..., 0] if ids is None else ids
        call = Call(
            speaking=speaking,
            instruction=self._instruction(inputs, cache, batch=len(like)) if speaking == ALL and self.reads_instruction else None,
            valid=valid_tokens(inputs.get("attention_mask"), like, seen=_seen(cache)),
            recorder=self._recorder.get(),
        )
        self._tell(call)
        return args, {**kwargs, KEYWORD: call}

    def _tell(self, call: Call | None) -> None:
        for mixture in self.sites.values():
            mixture.passed.outer = call

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._tell(None)
        pending, cache = self._pending.get(), getattr(output, "past_key_values", None)
        if pending is not None and cache is not None:
            self._kept[cache] = pending
        self._pending.set(None)

    def _keep_skipped(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cross-attention layers (Mllama) are skipped by a batch without images; what trains there stays in the graph."""
        call = kwargs.get(KEYWORD)
        if call is None or not torch.is_grad_enabled():
            return output
        skipped = tuple(f"{path}." for path, mixture in self.sites.items() if mixture.passed.call is not call)
        own = [parameter for name, parameter in self.parameters().items() if name.startswith(skipped)] if skipped else []
        return output_with_parameters(output, own) if own else output

    def _instruction(self, inputs: Mapping[str, Any], cache: Any, *, batch: int) -> Float[Tensor, "batch width"]:
        """The one given, the one of this generation, or that of the rows themselves."""
        found = self._given.get()
        if found is None and cache is not None:
            found = self._kept.get(cache)
        if found is None:
            if _seen(cache):
                raise UserError(
                    "This cache was filled without the adapters, so nobody knows its instruction. Start the generation anew with the "
                    "adapters attached and speaking."
                )
            if cache is not None and _is_piece(inputs.get("position_ids")):
                raise UserError(
                    "The prompt comes in pieces (`prefill_chunk_size`), but adapters are chosen by the whole of it. Leave "
                    "`prefill_chunk_size` out, or generate inside `on_prompts(batch)` of the adapters, which reads it before."
                )
            found = self.instructions(inputs)
            self._pending.set(found)
            if cache is not None:
                self._kept[cache] = found
        if batch % len(found):
            raise UserError(f"The instructions of {len(found)} prompts came to a batch of {batch} rows. Generate for the same prompts.")
        return found.repeat_interleave(batch // len(found), dim=0)

    def summary(self) -> str:
        """One line: where the adapters sit, how they are chosen, and how many parameters there are."""
        count = sum(parameter.numel() for parameter in self.parameters().values())
        chosen = f", chosen by {self.config.router}," if self.config.num_experts > 1 else ""
        return (
            f"{len(self.sites)} feed-forward networks carry {self.config.num_experts} adapters of width {self.config.bottleneck}{chosen} "
            f"({count:,} parameters)"
        )


def _is_piece(positions: Any) -> bool:
    """Whether the positions are the first of longer rows: `generate` cuts them off those of the whole prompt, without copying."""
    return isinstance(positions, Tensor) and positions.dim() > 1 and positions.stride(-2) > positions.shape[-1]


def _seen(cache: Any) -> int:
    """Tokens of earlier forwards of a generation."""
    return 0 if cache is None else int(cache.get_seq_length())
