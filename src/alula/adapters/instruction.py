"""The instruction of each row as a vector, from the tokens of its prompt. It knows no adapter and no router."""

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from alula.models.instructions import InstructionEncoder
from alula.routers.base import standardise

Ids = Int[Tensor, "batch tokens"]
Marks = Bool[Tensor, "batch tokens"]


class Instructions(Protocol):
    """Token ids, and which of them are the prompt's text, to one vector for each row."""

    width: int

    def __call__(self, ids: Ids, text: Marks) -> Float[Tensor, "batch width"]:
        """The vectors, without a gradient."""


class MeanEmbedding:
    """The mean of the model's own input embeddings over a prompt's text tokens, standardised: it needs nothing but the model.

    Source: ours; a bag of words in place of the paper's sentence encoder.
    """

    def __init__(self, model: Any) -> None:
        self._table: nn.Module = model.get_input_embeddings()
        self.width = int(model.config.get_text_config(decoder=True).hidden_size)

    @torch.no_grad()
    def __call__(self, ids: Ids, text: Marks) -> Float[Tensor, "batch width"]:
        """Zeros for a row without text."""
        rows = self._table(ids.masked_fill(~text, 0)).float()  # an image token's id may lie outside of the table
        total = (rows * text.unsqueeze(-1)).sum(dim=1)
        return standardise(total / text.sum(dim=1, keepdim=True).clamp(min=1))


class SentenceEmbedding:
    """A sentence encoder's vector of the prompt's text, without special tokens.

    Args:
        name: as for `InstructionEncoder`.
        tokenizer: the model's own, which reads the tokens back.

    Source: MoME takes Sentence-BERT (https://arxiv.org/abs/2407.12709).

    Raises:
        UserError: as `InstructionEncoder`.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self._encoder, self._tokenizer = InstructionEncoder(name), tokenizer
        self.width = int(self._encoder(["a"]).shape[-1])

    def __call__(self, ids: Ids, text: Marks) -> Float[Tensor, "batch width"]:
        """Zeros for a row without text."""
        rows = [row[mark].tolist() for row, mark in zip(ids, text, strict=True)]
        texts = [" ".join(line.split()) for line in self._tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return torch.from_numpy(self._encoder(texts)).to(ids.device)
