"""Images with their names, and with longer captions that say the same and more (VeCap's role). It knows no model."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from alula.data.sample import Message, Sample
from alula.data.stream import Task
from alula.data.tasks import load_task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.selection import generator
from alula.errors import UserError

SOURCES = ("emoji_en", "flags", "animals", "captions")
"""Built-in tasks whose answers say what an image shows."""
COUNTRY = "/0"
"""How the ids of flags end whose answer is the country; the others' is the continent, which the captions get as metadata."""
CONTINENTS = "continents"
"""Of `TEMPLATES`, those for flags whose answer is the continent."""
TEMPLATES = {
    "emoji_en": (
        "An emoji in the style of {vendor}: {name}.",
        "A small drawing on a light ground. It shows: {name}.",
        "{name}, as {vendor} draws it, in colours.",
    ),
    "flags": (
        "The {shape} flag of {name}, a country in {continent}.",
        "This flag stands for {name} in {continent}.",
        "{name}: the flag of one of the countries of {continent}, in a {shape} drawing.",
    ),
    CONTINENTS: ("The {shape} flag of a country in {name}.", "This flag stands for a country in {name}."),
    "animals": (
        "The silhouette of one animal on a light ground: {name}.",
        "{name}, drawn as a single area in one dark colour.",
        "A shape without inner lines. The animal is: {name}.",
    ),
    "captions": ("The picture shows {name}.", "A composed scene: {name}.", "What one can see here: {name}."),
}
"""Sentences that are true of every image of their source."""
PLAIN = ("An image of this: {name}.",)
"""For sources without templates, or without the metadata that these name."""
VENDORS = {"twemoji": "Twemoji", "noto-v1": "Noto", "noto": "Noto", "fluent-emoji-flat": "Fluent"}
SHAPES = {"wide": "wide", "square": "square", "circle": "round", "public_domain": "wide"}

Teacher = Callable[[Sample], str]
"""Writes what an image shows, knowing the image and its name (`sample.answer`)."""


def name_pairs(*, train_size: int | None = 1500, test_size: int | None = 150, seed: int = 0) -> Task:
    """The built-in images whose answer is a name or a short description, of all `SOURCES`.

    Args:
        train_size: of each source at most; None: all there are.
        test_size: likewise.
        seed: of the choice and of everything drawn.

    Example:
        >>> pairs = name_pairs(train_size=20, test_size=4)
        >>> sorted({sample.origin for sample in pairs.train})
        ['animals', 'captions', 'emoji_en', 'flags']
    """
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for name in SOURCES:
        # About half of the samples of `flags` are about continents.
        sizes = [size if size is None or name != "flags" else 3 * size for size in (train_size, test_size)]
        found = load_task(name, train_size=sizes[0], test_size=sizes[1], seed=seed)
        for split, samples, size in (("train", found.train, train_size), ("test", found.test, test_size)):
            splits[split] += [sample for sample in samples if name != "flags" or sample.id.endswith(COUNTRY)][:size]
    return Task(name="pairs", train=splits["train"], test=splits["test"], description="Built-in images with what they show.")


def enrich(samples: Sequence[Sample], *, write: Teacher | None = None, share: float = 0.5, seed: int = 0) -> list[Sample]:
    """Some of the samples with a longer caption as their answer; the others as they are.

    Source: Lai et al., "VeCLIP: Improving CLIP Training via Visual-enriched Captions", section 3, https://arxiv.org/abs/2310.07699: a
    caption keeps what the text of the web knew (the name), and training mixes both kinds, since captions alone are too much alike.

    Args:
        write: a teacher; a caption without the words of the name gets it in front. None: sentences from templates and metadata.
        share: of the samples that get a caption (0-1). Default: VeCLIP's mixed training, either text with the same probability.
        seed: of the choice and of the templates.

    Raises:
        UserError: another share.

    Example:
        >>> (sample,) = load_task("animals", train_size=1).train
        >>> (caption,) = enrich([sample], write=lambda sample: "It stands on four legs.", share=1.0)
        >>> caption.answer == f"{sample.answer}. It stands on four legs."
        True
    """
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UserError(f"The share of captions is {share!r}. A number from 0 (none) to 1 (all) is accepted; the default is 0.5.")
    continents = {row["code"]: row["continent_en"] for row in read_table("flags")} if write is None else {}
    found = []
    for sample in samples:
        rng = generator("enriched", seed, sample.id)
        if rng.random() < share:
            text = _from_template(sample, rng, continents) if write is None else write(sample)
            kept = text if _words(sample.answer) in _words(text) else f"{sample.answer}. {text}"
            sample = replace(sample, messages=(*sample.prompt, Message(role="assistant", content=kept)))
        found.append(sample)
    return found


def _words(text: str) -> str:
    """Its words without signs, a space around each: an "ant" is in no "elephant"."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def _from_template(sample: Sample, rng: random.Random, continents: Mapping[str, str | None]) -> str:
    """A sentence with what the sample's id says of its source: ``flags/train/wide/KE/0/0``, ``emoji_en/train/noto-v1/...``."""
    known: dict[str, str | None] = {"name": sample.answer}
    source = CONTINENTS if sample.origin == "flags" and not sample.id.endswith(COUNTRY) else sample.origin
    parts = sample.id.split("/")
    if sample.origin == "flags":
        known |= {"shape": SHAPES[parts[2]], "continent": continents[parts[3]]}
    elif sample.origin == "emoji_en":
        known["vendor"] = VENDORS[parts[2]]
    is_complete = all(known.values())  # a country on two continents has none in the table
    return rng.choice(TEMPLATES.get(source, PLAIN) if is_complete else PLAIN).format(**known)
