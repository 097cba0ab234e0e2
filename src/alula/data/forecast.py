"""How long rows get and what a batch of them costs, before any training. It knows a processor and sizes, and no weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from alula.data.collate import Collator
from alula.data.sample import Sample

ACTIVATION_BYTES = 34
"""Of a decoder layer, per token and unit of width, at two bytes a value and without a matrix of attention."""
LOGIT_BYTES = 8
"""Per token and entry of the vocabulary: logits and their gradient in float32."""


class RowForecast:
    """How many tokens a training row takes, by its text and the sizes of its images.

    One row of blank images of each size goes through the processor; pixels do not matter. Some processors (LLaVA-OneVision)
    give an image fewer tokens where a row has several.

    Args:
        collator: of the model's processor.
    """

    def __init__(self, collator: Collator) -> None:
        self._collator = collator
        self._known: dict[tuple[tuple[int, int], int], int] = {}
        self._opening = self._added(())  # what the processor itself writes: <bos>

    def text(self, sample: Sample) -> int:
        """Tokens without those of images.

        Raises:
            UserError: the template refuses the messages or changes an answer.
        """
        return self._collator.count_text(sample) - len(sample.images) + self._opening

    def visual(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of images, with what the processor writes around them (row marks, a beginning and an end).

        Args:
            sizes: width and height in pixels of each image of the row.

        Raises:
            UserError: the processor refuses an image of that size.
        """
        return sum(self._image(size, min(len(sizes), 2)) for size in sizes)

    def _image(self, size: tuple[int, int], number: int) -> int:
        """Tokens of one of `number` images of that size in a row."""
        if (size, number) not in self._known:
            added = self._added([size] * number) - self._opening
            self._known[size, number] = added // number + 1  # its mark is a token of the text
        return self._known[size, number]

    def _added(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that the processor adds to those of the text."""
        shown = tuple(Image.new("RGB", size) for size in sizes)
        named = " and ".join(f"an image of {width} x {height} pixels" for width, height in sizes)
        blank = Sample.ask("a", "b", images=shown, id=named or "a text")
        return self._collator([blank])["input_ids"].shape[1] - self._collator.count_text(blank)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What of a decoder decides how much memory a batch takes.

    Attributes:
        value_bytes: of one activation: 2 for bfloat16 and float16, 4 for float32.
        max_tokens: the longest row it can read; None: unknown.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    value_bytes: int = 2
    max_tokens: int | None = None

    def batch_bytes(self, rows: int, tokens: int) -> int:
        """Activations kept for the backward pass, and logits, of `rows` rows padded to `tokens` tokens.

        ``rows x tokens x (34 x value_bytes / 2 x hidden_size x num_layers + 8 x vocab_size)``. Weights, gradients, optimizer and
        the encoder come on top; activation checkpointing leaves about one 17th of the first term.

        Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 1 without
        its attention term (5as/h), because attention keeps no matrix here, https://arxiv.org/abs/2205.05198.
        """
        layers = ACTIVATION_BYTES * self.value_bytes // 2 * self.hidden_size * self.num_layers
        return rows * tokens * (layers + LOGIT_BYTES * self.vocab_size)
