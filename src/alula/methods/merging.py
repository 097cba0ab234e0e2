"""Merging: one expert per task, added up into one model at test time, without any further training and without a router."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import OFF
from alula.data.stream import Task
from alula.errors import UserError, nearest
from alula.methods.base import METHODS, Arm, Method, Stage
from alula.methods.routed import Specialist
from alula.training.settings import TrainSettings

LINEAR, TIES, DARE = "linear", "ties", "dare"
WAYS = (LINEAR, TIES, DARE)


def trim(delta: Float[Tensor, "out in"], *, density: float) -> Float[Tensor, "out in"]:
    """`delta` with the share `density` (above 0, up to 1) of its values that are largest in size, zero elsewhere."""
    count = max(1, round(density * delta.numel()))
    smallest = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def ties(deltas: Float[Tensor, "tasks out in"], *, density: float) -> Float[Tensor, "out in"]:
    """Trim, elect a sign, mean over those that have it.

    The sign is that of the sum of what is left after `trim`; where the sum is zero, so is the result.

    Source: Yadav et al. 2023, "TIES-Merging", algorithm 1 (arXiv 2306.01708). Difference: trimmed by linear layer, there
    over the whole model at once.
    """
    kept = torch.stack([trim(delta, density=density) for delta in deltas])
    elected = kept.sum(dim=0).sign()
    agrees = (kept.sign() == elected) & (elected != 0)
    return torch.where(agrees, kept, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def drop_and_rescale(delta: Float[Tensor, "out in"], *, drop_ratio: float, generator: torch.Generator) -> Float[Tensor, "out in"]:
    """Drops each value with probability `drop_ratio` (0 to below 1) and divides the rest by what is left: right on average.

    Source: Yu et al. 2024, "Language Models are Super Mario", DARE, section 3 (arXiv 2311.03099).
    """
    keeps = torch.rand(delta.shape, generator=generator) >= drop_ratio
    return torch.where(keeps.to(delta.device), delta / (1 - drop_ratio), 0.0)


@METHODS.register("merging")
class Merging(Method):
    """One expert per task, trained alone; at test time one model that has them all added into its weights.

    Trains the experts of `specialist`, bit for bit. The arms differ in how their updates ``D = scale * B A`` become one:
    ``linear`` (mean), ``ties`` (`ties`), ``dare`` (`drop_and_rescale` each, then the mean). All use ``W + strength * D``.

    The base's weights are put aside while an arm is used, and put back as they were. That and the merged weights, kept for
    the next task that is scored, take the memory of the decoder's linear layers once more (about 0.4 GB of a model of
    135 million parameters in fp32), and time: every linear layer is merged anew for each arm after each task.

    Args:
        arms: which of ``linear``, ``ties`` and ``dare`` are scored.
        density: share (above 0, up to 1) that TIES keeps of each update. Default 0.2, as published.
        drop_ratio: share (0 to below 1) that DARE drops of each update. Default 0.9: the paper finds that fine-tuned models
            bear it.
        strength: multiplies the merged update, in every arm. Default 1: the paper's lambda for TIES without validation data.
        rank, alpha: width and scale of the experts (see `Mixtures.grow`).
        linears, layers: where they sit (see `attach`).

    Source: Yadav et al. 2023 (arXiv 2306.01708), Yu et al. 2024 (arXiv 2311.03099); both merge fully fine-tuned models.

    Raises:
        UserError: an unknown arm, a share out of range, or linear layers that are quantised.
    """

    shares_parameters = False

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        arms: Sequence[str] = WAYS,
        density: float = 0.2,
        drop_ratio: float = 0.9,
        strength: float = 1.0,
        rank: int = 8,
        alpha: float | None = None,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        for arm in arms:
            if arm not in WAYS:
                raise UserError(f"Unknown arm '{arm}'. {nearest(arm, WAYS)}")
        if not 0 < density <= 1 or not 0 <= drop_ratio < 1:
            raise UserError(
                f"density: {density} and drop_ratio: {drop_ratio} came; density is above 0 and at most 1, drop_ratio at least 0 "
                "and below 1. Correct them."
            )
        # Not as `mixtures`: no router decides anything here, so there is no routing to diagnose.
        self.specialist = Specialist(model, settings=settings, rank=rank, alpha=alpha, linears=linears, layers=layers)
        self.sites = self.specialist.mixtures.sites
        for path, mixture in self.sites.items():
            if not mixture.weight.is_floating_point():
                kind = type(mixture.host).__name__
                raise UserError(f"{path} is a {kind}; only plain linear layers can be merged. Load the model unquantised.")
        self.arm_names, self.density, self.drop_ratio, self.strength = tuple(arms), density, drop_ratio, strength
        self._kept: tuple[str, dict[str, nn.Parameter]] = ("", {})

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """A new, silent expert; what was merged of the former ones is let go."""
        self._kept = ("", {})
        self.specialist.begin_task(model, task)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """The expert's."""
        return self.specialist.stages(task)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains the expert, which speaks alone."""
        self.specialist.begin_stage(model, task, stage)

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Freezes everything."""
        self.specialist.end_task(model, task)

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No expert speaks."""
        return self.specialist.base_model(model)

    def arms(self) -> tuple[Arm, ...]:
        """One per way to merge; each is the same model for every task."""
        return tuple(self._arm(name) for name in self.arm_names)

    def _arm(self, name: str) -> Arm:
        return Arm(name=name, enter=lambda task: self.using(name))

    @contextlib.contextmanager
    def using(self, way: str) -> Iterator[None]:
        """The model with all experts merged in one of the `WAYS`, inside the block."""
        if self._kept[0] != way:
            self._kept = ("", {})  # before, not after: never three sets of weights at once
            self._kept = (way, {path: self._weight(path, way) for path in self.sites})
        originals = {path: mixture.host.weight for path, mixture in self.sites.items()}
        try:
            for path, merged in self._kept[1].items():
                self.sites[path].host.weight = merged
            with self.specialist.mixtures.using(OFF):
                yield
        finally:
            for path, original in originals.items():
                self.sites[path].host.weight = original

    @torch.no_grad()
    def _weight(self, path: str, way: str) -> nn.Parameter:
        host = self.sites[path].weight
        merged = host.float() + self.strength * self.merged(path, way)
        return nn.Parameter(merged.to(host.dtype), requires_grad=False)

    @torch.no_grad()
    def merged(self, path: str, way: str) -> Float[Tensor, "out in"]:
        """The merged update of the linear layer at `path`, in fp32 and without `strength`; zero before the first task."""
        mixture = self.sites[path]
        names = mixture.experts.names
        if not names:
            return torch.zeros_like(mixture.weight, dtype=torch.float32)
        deltas = torch.stack([mixture.experts.delta(name) for name in names])
        if way == TIES:
            return ties(deltas, density=self.density)
        if way == DARE:
            pairs = zip(names, deltas, strict=True)
            deltas = torch.stack(
                [drop_and_rescale(delta, drop_ratio=self.drop_ratio, generator=self._generator(name, path)) for name, delta in pairs]
            )
        return deltas.mean(dim=0)

    def _generator(self, name: str, path: str) -> torch.Generator:
        """What DARE drops of an expert depends on seed, task and layer, not on the order of tasks."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed}/{DARE}/{name}/{path}".encode()))
