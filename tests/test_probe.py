"""Linear probe and retrieval: what they must find they find, what is not there they do not, and they say on how many samples."""

import pytest
import torch

from alula.errors import UserError
from alula.evaluation.probe import linear_probe, retrieve


def clouds(count, *, distance, seed):
    """`count` points around each of three corners, and which corner."""
    corners = distance * torch.eye(3, 8)
    classes = [name for name in ("cat", "cow", "dog") for _ in range(count)]
    noise = torch.randn(3 * count, 8, generator=torch.Generator().manual_seed(seed))
    return corners.repeat_interleave(count, 0) + noise, classes


def test_the_probe_finds_classes_that_are_apart_and_none_that_are_not():
    for distance, low, high in ((12.0, 1.0, 1.0), (0.0, 0.2, 0.47)):
        train, classes = clouds(40, distance=distance, seed=0)
        test, expected = clouds(40, distance=distance, seed=1)
        found = linear_probe(train, classes, test, expected)
        assert low <= found.score <= high
        assert (found.num_classes, found.num_train, found.num_test) == (3, 120, 120)
        assert found.chance == pytest.approx(1 / 3)


def test_the_probe_ignores_the_scale_and_place_of_features():
    train, classes = clouds(30, distance=2.0, seed=0)
    test, expected = clouds(30, distance=2.0, seed=1)
    scale, shift = torch.logspace(-3, 3, 8), torch.linspace(-5, 5, 8)
    assert (
        linear_probe(train, classes, test, expected).score
        == linear_probe(train * scale + shift, classes, test * scale + shift, expected).score
    )


def test_a_class_that_was_never_shown_is_never_found():
    train, classes = clouds(10, distance=12.0, seed=0)
    found = linear_probe(train, classes, train[:4], ["cat", "cat", "owl", "owl"])
    assert found.score == 0.5


def test_the_probe_refuses_one_class():
    with pytest.raises(UserError, match="two classes or more"):
        linear_probe(torch.randn(9, 2), ["cat"] * 9, torch.randn(1, 2), ["cat"])


def test_recall_is_what_a_hand_counts():
    texts = torch.eye(4)
    # the first image is nearest its own text, the second has its own in the second place, the third in the last
    images = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.9, 0.8, 0.0, 0.0], [0.9, 0.8, 0.1, 0.2]])
    found = retrieve(images, texts, names=["cat", "cow", "dog", "owl"], own=["cat", "cow", "dog"], at=(1, 2, 4))
    assert found.image_to_text == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 4: 1.0}
    assert (found.num_images, found.num_texts) == (3, 4)


def test_a_text_is_found_by_any_of_its_images_and_one_without_images_asks_nothing():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = retrieve(images, torch.eye(2), names=["cat", "cow"], own=["cat", "cat", "cat"], at=(1,))
    assert found.text_to_image == {1: 1.0}
    assert found.image_to_text == {1: pytest.approx(1 / 3)}


def test_retrieval_refuses_names_that_do_not_match():
    with pytest.raises(UserError, match="not among the names"):
        retrieve(torch.eye(2), torch.eye(2), names=["cat", "dog"], own=["cat", "owl"])
    with pytest.raises(UserError, match="comes twice"):
        retrieve(torch.eye(2), torch.eye(2), names=["cat", "cat"], own=["cat", "cat"])
