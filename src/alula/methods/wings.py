"""WINGS as a continual-learning method: learners beside attention, in the two published stages."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.learners import LearnerConfig, Learners, attach_learners
from alula.methods.base import METHODS, Method, Stage, plain_logits
from alula.training.settings import TrainSettings

ALIGN, TUNE = "visual", "learners"


@METHODS.register("wings")
class Wings(Method):
    """Visual and textual learners beside attention, trained in the two published stages.

    Stage 1 trains the connector and the visual learners, added with weight 1 and without a router, on samples with images;
    stage 2 trains both learners and the router, with the connector and, if asked, the backbone.

    Args:
        visual_ratio: share (0-1) of a task's steps that go into stage 1; without a visual learner, or without images, all
            steps go into stage 2.
        visual_learning_rate: peak rate of stage 1; None: that of stage 2. 1e-3 in the paper, 2e-5 or 2e-4 in its scripts.
        connector: the connector trains in both stages, as published; False leaves it frozen.
        connector_learning_rate: its peak rate in stage 2; None: the learners'. 1e-5 in the paper.
        backbone_learning_rate: peak rate of the backbone in stage 2; 2e-6 in the paper. None leaves it frozen, which keeps
            the promise of ``strict_text``.
        learners: learners the model carries already, to go on with; None: attached here by `options`.
        options: how the learners sit in the model (`LearnerConfig`: rank, router, modalities, neither, strict_text ...).

    Source: Zhang et al. 2024, "Wings", section 3.3 (arXiv 2406.03496). There the whole data passes once through each stage;
    the split of one budget of steps is ours, so that methods compare at equal steps.

    Raises:
        UserError: options that `attach_learners` refuses.
    """

    further_options = LearnerConfig

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        visual_ratio: float = 0.25,
        visual_learning_rate: float | None = None,
        connector: bool = True,
        connector_learning_rate: float | None = None,
        backbone_learning_rate: float | None = None,
        learners: Learners | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, settings=settings)
        with torch.random.fork_rng(devices=[]):  # the learners' first values follow from the seed alone
            torch.default_generator.manual_seed(settings.seed)
            self.learners = learners or attach_learners(model, **options)
        self.visual_ratio, self.connector = visual_ratio, connector
        self.visual_rate, self.connector_rate, self.backbone_rate = visual_learning_rate, connector_learning_rate, backbone_learning_rate
        self._stage = TUNE

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """Visual learners, then all of them."""
        settings, steps = self.settings, self.settings.steps * task.num_merged
        has_images = any(sample.images for sample in task.train)
        first = round(self.visual_ratio * steps) if has_images and "image" in self.learners.config.modalities else 0
        tune = Stage(name=TUNE, steps=steps - first, learning_rate=settings.rate, rates=self._rates())
        if not first:
            return (tune,)
        return (Stage(name=ALIGN, steps=first, learning_rate=self.visual_rate or settings.rate), tune)

    def _rates(self) -> dict[str, float]:
        """Stage 2's rates: the backbone's, inside it the learners', and the connector's."""
        parts = self.learners.anatomy
        rates: dict[str, float] = {}
        if self.backbone_rate is not None:
            rates[parts.decoder] = float(self.backbone_rate)
            for path in self.learners.sites:
                rates |= {path: self.settings.rate, f"{path}.host": float(self.backbone_rate)}
        if self.connector_rate is not None:
            rates |= dict.fromkeys(parts.connector, float(self.connector_rate))
        return rates

    def training_data(self, task: Task) -> Sequence[Sample]:
        """In stage 1 the samples with images, in stage 2 all."""
        return [sample for sample in task.train if sample.images] if self._stage == ALIGN else task.train

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Says what trains."""
        self._stage = stage.name
        backbone = stage.name == TUNE and self.backbone_rate is not None
        trains = {"connector": self.connector, "decoder": backbone}
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(trains.get(self.learners.anatomy.part_of(path), False))
        if stage.name == ALIGN:
            self.learners.train("image", router=False)
        else:
            self.learners.train(*self.learners.config.modalities)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "batch tokens vocab"]:
        """In stage 1 the visual learner speaks alone and unrouted."""
        speaking = ("image",) if self._stage == ALIGN else self.learners.config.modalities
        with self.learners.using(*speaking, routed=self._stage == TUNE):
            return plain_logits(model, batch)

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No learner speaks.

        Raises:
            UserError: connector or backbone train.
        """
        if self.connector or self.backbone_rate is not None:
            return super().base_model(model)
        return self.learners.using()

    def trained_with(self, model: nn.Module) -> dict[str, Tensor]:
        """What was trained besides learners and routers: connector, backbone."""
        own = self.learners.parameters()
        return {name: tensor for name, tensor in self.stored_tensors(model).items() if name not in own}

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Freezes everything."""
        model.requires_grad_(False)
        self._stage = TUNE
