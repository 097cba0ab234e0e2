"""What frozen features know: a linear probe of classes, retrieval between images and texts and among images. It knows no model.

Every result carries how many samples it is from.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from alula.errors import UserError

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths that are tried, as shares of the features' mean variance (the mean diagonal of their covariance)."""
FOLDS = 5

Features = Float[Tensor, "samples dim"]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The share of test samples whose class a linear map finds.

    Attributes:
        chance: the share of the commonest training class among the test samples.
        ridge: the strength that cross-validation chose.
    """

    score: float
    chance: float
    ridge: float
    num_classes: int
    num_train: int
    num_test: int


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Recall in both directions; keys are how many of the best are looked at.

    Attributes:
        num_images, num_texts: queries; and what is searched, in the other direction. Texts that are equal count once.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    num_images: int
    num_texts: int


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How often an image of the same class is among the nearest; keys are how many of them are looked at."""

    recall: dict[int, float]
    num_queries: int
    num_searched: int


@torch.no_grad()
def linear_probe(train: Features, train_classes: Sequence[Hashable], test: Features, test_classes: Sequence[Hashable]) -> Probed:
    """Ridge regression to one-hot classes on standardised features; its strength is chosen on the training samples alone.

    Deliberate difference to CLIP's probe (arXiv 2103.00020, appendix A.3), a logistic regression by L-BFGS: this is in closed form, so the
    same features give the same score on any machine.

    Raises:
        UserError: fewer than two classes, or fewer training samples than folds of the cross-validation.

    Example:
        >>> rows = torch.eye(2).repeat(5, 1)
        >>> linear_probe(rows, ["cat", "dog"] * 5, rows[:2], ["cat", "dog"]).score
        1.0
    """
    names = list(dict.fromkeys(train_classes))
    if len(names) < 2 or len(train) < FOLDS:
        raise UserError(
            f"The probe got {len(train)} training samples of {len(names)} classes. {FOLDS} samples or more, of two classes or more, are "
            "wanted. Raise the number of samples."
        )
    index = {name: number for number, name in enumerate(names)}
    classes = torch.tensor([index[name] for name in train_classes])
    expected = torch.tensor([index.get(name, -1) for name in test_classes])  # a class that was never shown is never found
    deviation, mean = torch.std_mean(train.double(), dim=0, correction=0)
    known, asked = ((rows.double() - mean) / deviation.clamp(min=1e-6) for rows in (train, test))
    fold = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)) % FOLDS

    def validated(ridge: float) -> float:
        right = [_right(known[fold != one], classes[fold != one], known[fold == one], classes[fold == one], ridge) for one in range(FOLDS)]
        return torch.cat(right).double().mean().item()

    best = max(RIDGES, key=validated)
    return Probed(
        score=_right(known, classes, asked, expected, best).double().mean().item(),
        chance=(expected == classes.mode().values).double().mean().item(),
        ridge=best,
        num_classes=len(names),
        num_train=len(train),
        num_test=len(test),
    )


def _right(train: Features, classes: Tensor, test: Features, expected: Tensor, ridge: float) -> Bool[Tensor, " samples"]:
    """Which samples of `test` the ridge regression on `train` takes for what they are."""
    mean = train.mean(0)
    rows, wanted = train - mean, functional.one_hot(classes).double()
    share = wanted.mean(0)
    covariance = rows.T @ rows
    covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp(min=1e-12))
    weights = torch.linalg.solve(covariance, rows.T @ (wanted - share))
    return ((test - mean) @ weights + share).argmax(1) == expected


@torch.no_grad()
def retrieve(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    *,
    names: Sequence[str],
    own: Sequence[str],
    at: Sequence[int] = (1, 5),
) -> Retrieved:
    """How often what belongs together is found among the nearest by cosine.

    An image is found its text if that is among the best k texts; a text its image if any image of that text is among the best k.

    Args:
        names: the texts that `texts` are of, each once.
        own: the text of each image.

    Raises:
        UserError: a name comes twice, or an image's text is not among them.

    Example:
        >>> found = retrieve(torch.eye(2), torch.eye(2), names=["cat", "dog"], own=["cat", "dog"])
        >>> found.image_to_text[1], found.num_texts
        (1.0, 2)
    """
    place = {name: number for number, name in enumerate(names)}
    strange = sorted(set(own) - set(place))
    if len(place) != len(names) or strange:
        what = f"the texts of images {strange[:3]} are not among the names" if strange else "a name comes twice"
        raise UserError(f"Retrieval got {len(names)} names, but {what}. Give each text once, and among them that of every image.")
    is_own = torch.tensor([place[name] for name in own])[:, None] == torch.arange(len(names))
    scores = functional.normalize(images.double(), dim=1) @ functional.normalize(texts.double(), dim=1).T
    has_image = is_own.any(0)
    return Retrieved(
        image_to_text=_recall(scores, is_own, at),
        text_to_image=_recall(scores.T[has_image], is_own.T[has_image], at),
        num_images=len(images),
        num_texts=len(names),
    )


@torch.no_grad()
def neighbours(
    searched: Features,
    searched_classes: Sequence[Hashable],
    queries: Features,
    query_classes: Sequence[Hashable],
    *,
    at: Sequence[int] = (1, 5),
) -> Neighbours:
    """Retrieval of images by images: for encoders without text. By cosine; nothing is learnt.

    Example:
        >>> neighbours(torch.eye(2), ["cat", "dog"], torch.eye(2), ["cat", "cat"]).recall
        {1: 0.5, 5: 1.0}
    """
    scores = functional.normalize(queries.double(), dim=1) @ functional.normalize(searched.double(), dim=1).T
    known = list(searched_classes)
    is_own = torch.tensor([[own == name for name in known] for own in query_classes])
    return Neighbours(recall=_recall(scores, is_own, at), num_queries=len(queries), num_searched=len(searched))


def _recall(scores: Float[Tensor, "queries found"], is_own: Bool[Tensor, "queries found"], at: Sequence[int]) -> dict[int, float]:
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = is_own.gather(1, order)
    return {best: ranked[:, :best].any(1).double().mean().item() for best in at}
