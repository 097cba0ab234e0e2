"""The analytic router at sample level: one decision on the prompt, kept for the whole answer."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alula.context import BASE
from alula.errors import UserError
from alula.routers.base import standardise
from alula.routers.statistics import RidgeStatistics, Spread

WIDTH = 256
"""Numbers a description is projected to; ours, see benchmarks/prompt_routing.py for accuracy against bytes."""


def describe(
    hidden: Float[Tensor, "batch tokens dim"],
    prompt: Bool[Tensor, "batch tokens"],
    image_mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch features"]:
    """A prompt's description at one layer: mean standardised image token, mean standardised text token, and two marks.

    Image and text are described apart, so that tasks which ask the same question are told apart by their images, and
    tasks over the same images by their questions. `features` is ``2 * dim + 2``; the image half of a text-only prompt
    is zero. The marks are as long as a half, ``sqrt(dim)``, so that a short prompt without images is still seen as one.
    """
    image = prompt & image_mask if image_mask is not None else torch.zeros_like(prompt)
    halves = []
    for mask in (image, prompt & ~image):
        chosen = mask.unsqueeze(-1).float()
        mean = (standardise(hidden) * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
        halves.append(torch.where(mask.any(dim=1, keepdim=True), standardise(mean), torch.zeros_like(mean)))
    has_image = image.any(dim=1, keepdim=True).float() * hidden.shape[-1] ** 0.5
    return torch.cat([*halves, has_image, torch.full_like(has_image, hidden.shape[-1] ** 0.5)], dim=-1)


def projection(dim: int, width: int) -> Float[Tensor, "dim width"]:
    """A fixed random projection that keeps lengths and angles roughly; the same on every machine."""
    drawn = torch.randn(dim, width, generator=torch.Generator().manual_seed(dim * 100_003 + width), dtype=torch.float64)
    return (drawn / width**0.5).float()


class PromptRouter:
    """Classifies whole prompts by the base model's activations at a few layers, in closed form.

    Scores of the layers are added. If general text was observed as ``base``, prompts that belong to no task go to the
    base model. The decision needs one pass of the base model over the prompt and none for the answer.

    A prompt with (or without) images is never sent to an expert that saw no such prompt, as long as the base model can
    have it: experts for pictures leave a text-only prompt bit-identical to the base model. A prompt with images that
    belongs to no task does go to the expert that fits best, unless a `threshold` is given (see `familiarity`).

    Args:
        layers: decoder layers whose input is looked at.
        dim: width of the decoder.
        width: descriptions are projected to this many numbers first, so that a task's sums take ``width ** 2 / 2`` numbers
            per layer whatever the model; None keeps them whole.

    Source: ours (see `RidgeStatistics`).
    """

    temperature = 10.0

    def __init__(self, *, layers: Sequence[int], dim: int, width: int | None = WIDTH, ridge: float = 1e-2) -> None:
        self.layers = tuple(layers)
        self.width = width if width is not None and width < 2 * dim + 2 else None
        self._projection = projection(2 * dim + 2, self.width) if self.width else None
        self.statistics = [RidgeStatistics(self.width or 2 * dim + 2, ridge=ridge) for _ in self.layers]
        self._kinds: dict[str, Tensor] = {}  # per class: prompts seen without and with images
        self._classifiers: list[Tensor] | None = None
        self._spreads: list[Spread] | None = None

    def features(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        prompt: Bool[Tensor, "batch tokens"],
        image_mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch features"]:
        """What is classified: the prompt's description, projected; then one column that says whether it has images."""
        whole = describe(hidden, prompt, image_mask)
        short = whole if self._projection is None else whole @ self._projection.to(whole.device)
        return torch.cat([short, whole[:, -2:-1].gt(0).float()], dim=-1)

    @property
    def names(self) -> list[str]:
        """Classes with statistics, sorted."""
        return self.statistics[0].names

    def observe(self, name: str, features: Sequence[Float[Tensor, "batch features"]]) -> None:
        """Adds prompts of one task, one tensor per layer."""
        for statistics, rows in zip(self.statistics, features, strict=True):
            statistics.observe(name, rows[:, :-1])
        with_images = features[0][:, -1].sum().cpu()
        seen = torch.stack([len(features[0]) - with_images, with_images])
        self._kinds[name] = self._kinds.get(name, torch.zeros(2)) + seen
        self._changed()

    def remove(self, name: str) -> None:
        """Forgets a task."""
        self._kinds.pop(name, None)
        for statistics in self.statistics:
            statistics.forget(name)
        self._changed()

    def _changed(self) -> None:
        self._classifiers = self._spreads = None

    @torch.no_grad()
    def log_weights(
        self,
        features: Sequence[Float[Tensor, "batch features"]],
        *,
        experts: Sequence[str],
        temperature: float | None,
        threshold: float | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Log-posterior over `experts` and, if observed or if there is a threshold, the base model (last column).

        Args:
            threshold: the base model takes the place of every expert whose `familiarity` with the prompt is less; None
                keeps all.

        Raises:
            UserError: an expert has no statistics.
        """
        known = self.names
        missing = [name for name in experts if name not in known]
        if missing:
            raise UserError(
                f"Router 'analytic' has no statistics of {', '.join(missing)}, so no prompt can be routed there. "
                "Learn the task with `alula learn`, or gather them from its data with `alula.observe`."
            )
        if self._classifiers is None:
            self._classifiers = [statistics.solve() for statistics in self.statistics]
        classes = [*experts, *([BASE] if BASE in known else [])]
        order = [known.index(name) for name in classes]
        by_layer = (rows[:, :-1].float() @ w[order].to(rows.device).T for rows, w in zip(features, self._classifiers, strict=True))
        scores = sum(by_layer, start=torch.tensor(0.0)) * (self.temperature if temperature is None else temperature)
        if BASE in known or threshold is not None:
            scores = scores.masked_fill(self._unknown_kind(features[0][:, -1], classes), -torch.inf)
        if threshold is not None:
            scores = _base_instead(scores, self.familiarity(features, experts=experts) < threshold)
        return scores.log_softmax(dim=-1)

    @torch.no_grad()
    def familiarity(self, features: Sequence[Float[Tensor, "batch features"]], *, experts: Sequence[str]) -> Float[Tensor, "batch experts"]:
        """How much prompts are like those each expert was observed with: about 1 for its own, towards 0 for others.

        One over the squared distance to the expert's mean prompt (see `Spread`), averaged over layers. It is infinite
        where the spread of prompts is unknown: nothing is foreign then. On the embedded model it notices new questions,
        hardly ever new pictures under a known question (docs/results.md).
        """
        tasks = [name for name in self.names if name != BASE]
        if self._spreads is None:
            self._spreads = [statistics.spread(tasks) for statistics in self.statistics]
        by_layer = [spread.distances(rows[:, :-1]) for rows, spread in zip(features, self._spreads, strict=True)]
        return 1 / torch.stack(by_layer).mean(dim=0)[:, [tasks.index(name) for name in experts]]

    def _unknown_kind(self, has_image: Float[Tensor, " batch"], classes: Sequence[str]) -> Bool[Tensor, "batch classes"]:
        """Where a class never saw a prompt of this kind; the base model takes every kind."""
        seen = torch.stack([torch.ones(2) if name == BASE else self._kinds[name] for name in classes])
        return seen.to(has_image.device)[:, has_image.long()].T == 0

    def stored(self, name: str) -> dict[str, Tensor]:
        """One task's sums, by layer, and the kinds of prompts it saw."""
        if name not in self._kinds:
            return {}
        pairs = zip(self.layers, self.statistics, strict=True)
        sums = {f"{layer}.{key}": tensor for layer, sums in pairs for key, tensor in sums.stored(name).items()}
        return {**sums, "kinds": self._kinds[name]}

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of what `stored` gives of a task that was observed."""
        pairs = zip(self.layers, self.statistics, strict=True)
        sums = {f"{layer}.{key}": shape for layer, sums in pairs for key, shape in sums.shapes.items()}
        return {**sums, "kinds": (2,)}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave."""
        if "kinds" not in tensors:
            return
        self._kinds[name] = tensors["kinds"]
        for layer, statistics in zip(self.layers, self.statistics, strict=True):
            prefix = f"{layer}."
            statistics.restore(name, {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
        self._changed()


def _base_instead(scores: Float[Tensor, "batch classes"], foreign: Bool[Tensor, "batch experts"]) -> Float[Tensor, "batch all_classes"]:
    """The base model, in the last column, with the best score among its own and those of the `foreign` experts."""
    ours, base = scores.tensor_split([foreign.shape[1]], dim=-1)
    taken = torch.cat([base, ours.masked_fill(~foreign, -torch.inf)], dim=-1).amax(dim=-1, keepdim=True)
    last_resort = torch.finfo(scores.dtype).min
    return torch.cat([ours.masked_fill(foreign, -torch.inf), taken.clamp(min=last_resort)], dim=-1)
