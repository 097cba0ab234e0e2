"""Samples to the tensors that pre-train an encoder: pixels with a text, or with the prefix of AIM. It knows no model."""

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alula.data.collate import IGNORED
from alula.data.sample import Sample
from alula.data.tasks.selection import generator

Pixels = Callable[[list[Image.Image]], Float[Tensor, "images 3 height width"]]
"""Pictures of any size -> what the encoder reads."""
SMALLEST_CROP = 0.4
"""Share of the area (AIM)."""
TRIES = 10


class PairCollator:
    """The first image of each sample and its answer as a text; each pair counts as one target.

    Args:
        pixels: the encoder's image processor.
        tokenizer: has an end token.
        context: tokens of a text, the end included; longer texts are cut before their end.
    """

    def __init__(self, pixels: Pixels, tokenizer: PreTrainedTokenizerBase, *, context: int = 77) -> None:
        self.pixels, self.tokenizer, self.context = pixels, tokenizer, context

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`pixel_values`, `input_ids`, `attention_mask` and `labels`."""
        return {
            "pixel_values": self.pixels([sample.open_images()[0] for sample in samples]),
            **self.texts([sample.answer for sample in samples]),
            "labels": torch.tensor([[IGNORED, 0]]).repeat(len(samples), 1),
        }

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, padded on the right."""
        end = self.tokenizer.eos_token_id
        cut = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.context - 1], end] for text in texts]  # type: ignore[list-item]
        rows = [torch.tensor(ids) for ids in cut]
        masks = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(rows, batch_first=True, padding_value=end), "attention_mask": pad(masks, batch_first=True)}  # type: ignore[arg-type]


class PrefixCollator:
    """A random crop of each sample's first image and the length of its prefix, uniform from 1 to the number of patches less one.

    What is drawn follows from the seed and from which samples share a micro-batch, in their order, so that a resumed run draws the same.
    Another epoch puts others together and so draws something else. A sample alone (``micro_batch_size: 1``) has one crop and one prefix
    for all epochs: take two or more.

    The labels have a target for each patch outside of the prefix, so that micro-batches are weighted by their targets.

    Source: AIM, https://arxiv.org/abs/2401.08541. Deliberate difference: no jitter of colours, which the names of many things depend on.

    Args:
        pixels: the encoder's image processor.
        num_patches: of the encoder.
        seed: of crops and prefixes.
    """

    def __init__(self, pixels: Pixels, *, num_patches: int, seed: int = 0) -> None:
        self.pixels, self.num_patches, self.seed = pixels, num_patches, seed

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`pixel_values`, `prefix` and `labels`."""
        rng = generator("aim", self.seed, *(sample.id for sample in samples))
        prefix = torch.tensor([rng.randint(1, self.num_patches - 1) for _ in samples])
        is_target = torch.arange(self.num_patches) >= prefix[:, None]
        return {
            "pixel_values": self.pixels([random_crop(sample.open_images()[0], rng) for sample in samples]),
            "prefix": prefix,
            "labels": torch.where(is_target, 0, IGNORED),
        }


def random_crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A part of at least 0.4 of the area, its sides in a ratio of 3:4 to 4:3, perhaps mirrored; the whole if none fits."""
    for _ in range(TRIES):
        area = image.width * image.height * rng.uniform(SMALLEST_CROP, 1.0)
        ratio = (4 / 3) ** rng.uniform(-1.0, 1.0)
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            image = image.crop((left, top, left + width, top + height))
            break
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
