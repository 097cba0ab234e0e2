"""MoME's training as a method: one adapter beside every feed-forward network, then a routed mixture of copies of it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from alula.adapters import AdapterConfig, Adapters, attach_adapters
from alula.adapters.site import ALL, FIRST, NONE
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.base import METHODS, Arm, Method, Stage, plain_logits
from alula.objectives.balance import load_balance_loss
from alula.routers.instruction import Choice
from alula.training.settings import TrainSettings

SINGLE, MIXTURE = "single", "mixture"


@METHODS.register("mome")
class MoME(Method):
    """Language experts chosen by the instruction, in the two published stages, with the connectors of the images.

    Stage 1 trains one adapter beside every feed-forward network; stage 2 begins with copies of it, so with exactly the same outputs, and
    trains them and their routers. The connectors train in both; of a model with several encoders they hold the router that weighs these
    (MoVE). A later task goes on with stage 2. Meant for all tasks at once (``joint``); a stream of tasks is the harder case.

    Args:
        single_ratio: share (0-1) of the first task's steps that go into stage 1; one half as published.
        connector: the connectors train; False leaves them frozen.
        connector_learning_rate: their peak rate; None: the adapters'.
        load_balance: weight (0 or more) of the load-balance loss of every router in stage 2: the variant +LB. 0 as published.
        tokenizer: the model's own, which a sentence encoder (``instruction: minilm``) needs; a run gives it.
        options: how the adapters sit in the model (`AdapterConfig`: num_experts, router, gumbel ...).

    Source: Shen et al. 2024, "MoME" (NeurIPS 2024, https://arxiv.org/abs/2407.12709), section 4; there is no training code. The encoders
    are frozen here, and stage 2 trains the connectors on; the paper says neither.

    Raises:
        UserError: options that `attach_adapters` refuses, or numbers out of range.
    """

    further_options = AdapterConfig

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        single_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5,
        connector: bool = True,
        connector_learning_rate: Annotated[float, Field(gt=0)] | None = None,
        load_balance: Annotated[float, Field(ge=0)] = 0.0,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, settings=settings)
        if not 0 <= single_ratio <= 1 or load_balance < 0:
            raise UserError(
                f"single_ratio: {single_ratio}, load_balance: {load_balance} came; a share (0 to 1) and a weight from 0 up are accepted. "
                "Correct them."
            )
        with torch.random.fork_rng(devices=[]):  # the first values follow from the seed alone
            torch.default_generator.manual_seed(settings.seed)
            self.adapters: Adapters = attach_adapters(model, tokenizer=tokenizer, **options)
        self.single_ratio, self.connector, self.connector_rate = single_ratio, connector, connector_learning_rate
        self.load_balance = float(load_balance)
        self._stage, self._first = MIXTURE, ""
        self._choices: list[tuple[Choice, Bool[Tensor, "batch tokens"]]] = []

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Notes the first task, the only one with a stage 1."""
        self._first = self._first or task.name

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """One adapter, then all of them."""
        steps = self.settings.steps * task.num_merged
        single = round(self.single_ratio * steps) if task.name == (self._first or task.name) else 0
        rates = dict.fromkeys(self.adapters.anatomy.connector, float(self.connector_rate)) if self.connector_rate else {}
        named = ((SINGLE, single), (MIXTURE, steps - single))
        return tuple(Stage(name=name, steps=count, learning_rate=self.settings.rate, rates=rates) for name, count in named if count)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Says what trains."""
        self._stage = stage.name
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(self.connector and self.adapters.anatomy.part_of(path) == "connector")
        self.adapters.train(only_first=stage.name == SINGLE)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "batch tokens vocab"]:
        """In stage 1 the first adapter speaks for everybody; in stage 2 the one that a row's question chooses, before its first target."""
        self._choices = []
        with self.adapters.using(FIRST if self._stage == SINGLE else ALL), self.adapters.on_prompts(batch), self._listening():
            return plain_logits(model, batch)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        if not self.load_balance:
            yield
            return
        found: dict[str, tuple[Choice, Tensor]] = {}
        with self.adapters.recording(lambda path, choice, valid: found.setdefault(path, (choice, valid))):
            yield
        self._choices = list(found.values())

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """The routers' load balance beside the loss, where it was asked for and something was chosen."""
        parts = super().parts(model, batch, logits)
        choices, self._choices = self._choices, []
        if not choices:
            return parts
        return {**parts, "load_balance": self.load_balance * torch.stack([_balance(*choice) for choice in choices]).mean()}

    def end_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """After stage 1 every adapter is a copy of the one that learnt."""
        if stage.name == SINGLE:
            self.adapters.grow_from(self.adapters.tensors())

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Freezes everything."""
        model.requires_grad_(False)
        self._stage = MIXTURE

    def arms(self) -> tuple[Arm, ...]:
        """By the routers; the instruction is read from the prompt alone, also where answers are ranked."""
        return (Arm(name="default", enter=lambda task: contextlib.nullcontext(), around=self.adapters.on_prompts),)

    def trained_with(self, model: nn.Module) -> dict[str, Tensor]:
        """What was trained besides adapters and routers: the connectors. `save_adapters` takes it."""
        own = self.adapters.parameters()
        return {name: tensor for name, tensor in self.stored_tensors(model).items() if name not in own}

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No adapter speaks.

        Raises:
            UserError: the connectors train.
        """
        return super().base_model(model) if self.connector else self.adapters.using(NONE)


def _balance(choice: Choice, valid: Bool[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """E * sum of f_i P_i over the batch: over its samples, or over its tokens without padding."""
    if choice.index.dim() == 1:
        return load_balance_loss(choice.scores[None])
    return load_balance_loss(choice.scores.flatten(0, 1)[None], valid.flatten()[None])
