"""What a text asks about each of its images, and that sentence as a vector. It knows no model but a sentence encoder."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from alula.errors import UserError

if TYPE_CHECKING:
    from alula.data.interleaved.encoder import SentenceEncoder

EMBEDDED = "minilm"
REMEMBERED = 16_384
"""Sentences; in training the same ones come back in every epoch."""
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


def instructions_of(text: str, *, image_token: str) -> list[str]:
    """For each image of a chat the text of the turn that it stands in.

    That turn is there in training and in generation alike, and holds no answer. An image in an assistant's turn (running text) has
    the empty instruction: all that stands beside it is a target.

    Args:
        text: rendered by a ChatML template.

    Raises:
        UserError: an image stands outside of any turn, where nothing tells a question from its answer.
    """
    found: list[str] = []
    turns = list(TURN.finditer(text))
    for match in re.finditer(re.escape(image_token), text):
        turn = next((turn for turn in turns if turn.start() <= match.start() < turn.end()), None)
        if turn is None:
            raise UserError(
                f"The text {text[:60]!r} has an {image_token} outside of any <|im_start|> turn, so nothing tells its question from its "
                "answer. Render it with processor.apply_chat_template, or give instructions=[...], one for each text."
            )
        is_question = turn.group(1) != "assistant"
        found.append(" ".join(turn.group(2).replace(image_token, " ").split()) if is_question else "")
    return found


class InstructionEncoder:
    """Sentences to vectors by a pretrained sentence encoder, which is read at the first sentence and remembers what it said.

    The vectors are standardised (ours). Of a unit vector 384 wide no entry is far from zero, so that a fresh router's biases would choose
    one expert for every sentence, and a hard choice that never varies teaches a router nothing about the other experts.

    Args:
        name: `minilm`, the packaged all-MiniLM-L6-v2 (384 wide), or the folder or hub name of another sentence encoder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._encoder: SentenceEncoder | None = None
        self._known: OrderedDict[str, Float[np.ndarray, " dim"]] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """One row for each text; zeros for one without words.

        Raises:
            UserError: the package is not installed, or there is no sentence encoder under that name.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, _standardised(self._read()(new)), strict=True))
        rows = np.stack([self._known[text] for text in texts])
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return rows

    def _read(self) -> "SentenceEncoder":
        if self._encoder is None:
            from alula.data.interleaved.encoder import SentenceEncoder, minilm_folder

            self._encoder = SentenceEncoder(minilm_folder() if self.name == EMBEDDED else self.name)
        return self._encoder

    def __getstate__(self) -> dict:
        return {"name": self.name, "_encoder": None, "_known": OrderedDict()}  # workers and copies read it anew


def _standardised(rows: Float[np.ndarray, "texts dim"]) -> Float[np.ndarray, "texts dim"]:
    """Of mean 0 and variance 1 each; zeros stay zeros."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-12)
