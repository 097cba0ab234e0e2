"""Several samples in one row without a look at one another: no padding is computed. It knows no model.

Every sample keeps positions that begin at 0. In form ``mask`` a block-diagonal mask of four axes tells the samples apart, for SDPA only.
In form ``positions`` the positions alone do: Transformers makes the mask of them for SDPA, eager and flex attention, and lengths for
flash attention, which all want one row without padding and no mask. It does so only in a forward without a cache: with one, which is the
default of most models, samples silently see one another. alula's loop and TRL ask for none; Transformers' `Trainer` says so to the model's
config, but not to its language model's: say ``model.config.get_text_config(decoder=True).use_cache = False`` before it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from alula.data.collate import IGNORED, Collator
from alula.data.sample import Sample
from alula.errors import UserError

Batch = dict[str, Tensor]
PADDING = -1
"""The number of no sample."""
OF_TOKENS = {"input_ids", "labels", "position_ids", "mm_token_type_ids", "token_type_ids"}
"""What a batch holds for each token; the rest belongs to images."""


def fill(lengths: Sequence[int], *, size: int) -> list[list[int]]:
    """Which samples share a row of at most `size` tokens: each, the longest first, goes into the first row with room for it.

    Source: first-fit decreasing (Johnson 1973): at most 11/9 of the fewest rows possible, and 6/9 of a row.

    Raises:
        UserError: a sample is longer than a row.

    Example:
        >>> fill([3, 5, 2, 4], size=8)
        [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > size:
            raise UserError(f"A sample has {lengths[index]} tokens, a row {size}. Samples are never cut: make rows longer or drop it.")
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(size)
        rows[place].append(index)
        room[place] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def block_mask(owner: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows 1 tokens tokens"]:
    """True where a token may look: at itself and at what its own sample has before it.

    Args:
        owner: the sample of each token; each token of padding has a number of its own.
    """
    same = owner.unsqueeze(1) == owner.unsqueeze(2)
    return (same & torch.ones_like(same).tril()).unsqueeze(1)


class PackingCollator:
    """Makes packed training batches; takes the place of the collator in `Trainer`.

    Args:
        collator: makes each sample's own row.
        max_length: tokens of a row in form ``mask``. In form ``positions`` all samples of a micro-batch stand in one row.
        form: ``mask``, right in any call of a model with SDPA, or ``positions``, right in a call without a cache: see the module.
        positions: the positions of one row on several axes (axes x 1 x tokens), of models whose images have places in two
            dimensions (M-RoPE: Qwen-VL); None: 0, 1, 2 ... on one axis.

    Raises:
        UserError: another form; when called, images whose positions are not told, or inputs that cannot stand one after another.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        max_length: int = 2048,
        form: Literal["positions", "mask"] = "mask",
        positions: Callable[[Batch], Int[Tensor, "axes 1 tokens"]] | None = None,
    ) -> None:
        if form not in ("positions", "mask"):
            raise UserError(f"Unknown form of packing '{form}'. Known: mask, positions.")
        self.collator, self.max_length, self.form, self.positions = collator, max_length, form, positions

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch.

        Returns:
            what the model's forward takes, with ``position_ids`` and ``labels``; the first token of each sample is no target.
        """
        rows = [self._row(sample) for sample in samples]
        lengths = [row["input_ids"].shape[1] for row in rows]
        size = sum(lengths) if self.form == "positions" else self.max_length
        packs = fill(lengths, size=size)
        width = max(sum(lengths[index] for index in pack) for pack in packs)
        names = {name for row in rows for name in row}
        order = [rows[index] for pack in packs for index in pack]
        # Where a row has images of its own and a mask of them (Idefics 3), they follow one another on the second axis.
        dim = 1 if "pixel_attention_mask" in names else 0
        batch = {name: _joined(name, [row[name] for row in order if name in row], dim=dim) for name in names - OF_TOKENS}
        for name in names & OF_TOKENS:
            filler = IGNORED if name == "labels" else 0
            batch[name] = _lines([[rows[index][name] for index in pack] for pack in packs], width, filler)
        if self.form == "mask":
            owners = _lines([[torch.full((1, lengths[index]), index) for index in pack] for pack in packs], width, PADDING)
            batch["attention_mask"] = block_mask(torch.where(owners == PADDING, PADDING - torch.arange(width), owners))
        return batch

    def _row(self, sample: Sample) -> Batch:
        """The sample alone, with its positions and without a mask."""
        row = self.collator([sample])
        tokens = row["input_ids"].shape[1]
        plain = torch.arange(tokens)[None]
        if self.positions is not None:
            # Before the axes of M-RoPE stands one that only tells samples apart (Transformers' Qwen-VL).
            row["position_ids"] = torch.cat([plain[None], self.positions(row).cpu()])
        elif "image_grid_thw" in row:
            raise UserError(
                f"{sample.origin or sample.id}: this model's images have positions on several axes. Give `positions`, for Qwen-VL "
                "lambda row: model.model.get_rope_index(...)[0] (docs/pretraining.md shows it)."
            )
        else:
            row["position_ids"] = plain
        del row["attention_mask"]
        return row


def _lines(packs: Sequence[Sequence[Tensor]], width: int, filler: int) -> Tensor:
    """What belongs to tokens, one line a pack; the axis before the last is that of rows."""
    lines = [torch.cat(list(parts), dim=-1) for parts in packs]
    return torch.cat([torch.nn.functional.pad(line, (0, width - line.shape[-1]), value=filler) for line in lines], dim=-2)


def _joined(name: str, values: Sequence[Tensor], *, dim: int) -> Tensor:
    """What belongs to images, one after another."""
    try:
        return torch.cat(list(values), dim=dim)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in values[:4])
        raise UserError(
            f"Samples whose '{name}' have the shapes {shapes} cannot be packed. Use images of one size, or no packing."
        ) from error
