"""What makes texts comparable, by name. It knows no samples; the neural encoder is imported only when named."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from alula.errors import UserError, nearest

Embed = Callable[[Sequence[str]], Float[np.ndarray, "texts dim"]]
"""Texts to vectors; cosine is the similarity."""
BUCKETS = 4096
NAMES = ("minilm", "tf_idf")


def load_embedder(name_or_path: str | Path) -> Embed:
    """The embedder of that name; there is no default and no fallback, because retrieval decides what is in a benchmark.

    Args:
        name_or_path: ``minilm`` (all-MiniLM-L6-v2 from an installed package), ``tf_idf`` (needs nothing), or the folder or
            hub name (with a slash) of any sentence encoder that Transformers loads and whose tokens are averaged.

    Raises:
        UserError: an unknown name, a missing package, or a folder that is no model.

    Example:
        >>> load_embedder("tf_idf")(["hot", "cold"]).shape
        (2, 4096)
    """
    name = str(name_or_path)
    if name == "tf_idf":
        return tf_idf
    if name != "minilm" and "/" not in name and not Path(name).is_dir():
        raise UserError(f"Unknown embedder '{name}'. {nearest(name, NAMES)} A folder or a hub name with a slash is taken too.")
    from alula.data.interleaved.encoder import SentenceEncoder, minilm_folder  # torch and transformers: seconds

    return SentenceEncoder(minilm_folder() if name == "minilm" else name_or_path)


def tf_idf(texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
    """Unit rows of hashed words and letter trigrams, rare ones weighing more; the same on every machine.

    Rarity is counted over `texts`, so what is to be compared must come in one call. Dense: 16 kB a text.

    Source: Salton and Buckley, "Term-weighting approaches in automatic text retrieval" (1988), with the smoothed
    inverse document frequency of scikit-learn, ln((1 + n) / (1 + df)) + 1.
    """
    counted = [Counter(zlib.crc32(feature.encode()) % BUCKETS for feature in _features(text)) for text in texts]
    found_in = Counter(bucket for counts in counted for bucket in counts)
    rows = np.zeros((len(texts), BUCKETS), dtype=np.float32)
    for row, counts in zip(rows, counted, strict=True):
        for bucket, count in counts.items():
            row[bucket] = (1 + math.log(count)) * (1 + math.log((1 + len(texts)) / (1 + found_in[bucket])))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _features(text: str) -> list[str]:
    """Words, and the trigrams of each with a blank at both ends."""
    words = re.findall(r"\w+", text.casefold())
    return words + [f"#{padded[i : i + 3]}" for padded in (f" {word} " for word in words) for i in range(len(padded) - 2)]
