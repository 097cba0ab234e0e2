"""Real interleaved documents, captions and running text out of the built-in sources: what a multimodal model is pre-trained on.

Pictures and names are those of the built-in tasks' train splits, sentences are true by construction; nothing of a base task is used. A
document is a plain sample (no conversation): its pictures stand in `text` messages, its prose in assistant messages, which alone are
targets.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alula.data.blend import Blend, Source
from alula.data.rendering import TEXT
from alula.data.sample import PLACEHOLDER, ImageSource, Message, Sample
from alula.data.stream import Task
from alula.data.tasks import general_prompts, load_task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import decode, encode, place
from alula.data.tasks.selection import generator
from alula.errors import UserError, nearest

RATIOS = {"captions": 45.0, "documents": 45.0, "text": 10.0}
"""Samples drawn of each kind. Source: MM1 (arXiv 2403.09611, sec. 3.3)."""
SOURCE = "pretraining/"
"""What the kinds' names begin with where a recipe's blend names them."""
HELD_OUT = 30
"""Test samples of each kind."""
SIDE = 96
"""Pixels of a picture."""
Row = dict[str, Any]
Part = str | tuple[ImageSource, str]
"""Prose, or a picture and the prose after it."""


def pretraining_blend(*, ratios: dict[str, float] | None = None, size: int = 2000, text_epochs: float = 4.0, seed: int = 0) -> Blend:
    """Captions, documents and text in the ratios of MM1.

    Args:
        ratios: of `RATIOS`' names, 0 for none of it; None: `RATIOS`.
        size: different captions and different documents, each.
        text_epochs: passes over the 300 texts at most, which end the blend at about 3000 samples a pass. Default 4: up to there
            repeated text is nearly as good as new (Muennighoff et al. 2023, arXiv 2305.16264).
        seed: of everything drawn.

    Raises:
        UserError: an unknown kind, a ratio that is no number from 0 up, or none above 0.

    Example:
        >>> blend = pretraining_blend(size=20, seed=1)
        >>> len(blend), {source.name: count for source, count in zip(blend.sources, blend.counts)}
        (44, {'captions': 20, 'documents': 20, 'text': 4})
    """
    ratios = RATIOS if ratios is None else ratios
    _check_ratios(ratios)
    sources = []
    for name, ratio in ratios.items():
        if ratio > 0:
            samples = captions(size, seed=seed) if name == "captions" else documents(size, seed=seed) if name == "documents" else texts()
            sources.append(Source(name=name, samples=samples, ratio=ratio, epochs=text_epochs if name == "text" else 1.0))
    return Blend(sources, seed=seed)


def captions(count: int, *, seed: int = 0) -> list[Sample]:
    """Pictures, each followed by a sentence on what is there."""
    return [_caption(sample) for sample in load_task("captions", train_size=count, test_size=0, seed=seed).train]


def source_task(name: str, *, size: int = 2000) -> Task:
    """One kind as a source of a recipe's blend, in bits per byte.

    Held out are captions of drawings of another vendor, documents that are put together anew from the same drawings, other texts.

    Args:
        name: `SOURCE` and one of `RATIOS`' names.
        size: captions or documents to learn from.

    Raises:
        UserError: an unknown kind.
    """
    kind = name.removeprefix(SOURCE)
    check_kinds(kind)
    if kind == "captions":
        found = load_task("captions", train_size=size, test_size=HELD_OUT)
        train, test = ([_caption(sample) for sample in part] for part in (found.train, found.test))
    elif kind == "documents":
        train, test = documents(size), documents(HELD_OUT, seed=size)
    else:
        train, test = texts()[:-HELD_OUT], texts()[-HELD_OUT:]
    return Task(name=name, train=train, test=test, scoring="bits_per_byte")


def check_kinds(*kinds: str) -> None:
    """Refuses a kind that is not there.

    Raises:
        UserError: with the nearest known.
    """
    for kind in kinds:
        if kind not in RATIOS:
            raise UserError(f"Unknown kind of data '{kind}'. {nearest(kind, RATIOS)}")


def _check_ratios(ratios: Mapping[str, float]) -> None:
    check_kinds(*ratios)
    for name, ratio in ratios.items():
        if not isinstance(ratio, int | float) or not 0 <= ratio < math.inf:
            raise UserError(f"The ratio of '{name}' is {ratio!r}. A number from 0 up is accepted; 0 takes none of it.")
    if not any(ratios.values()):
        raise UserError(f"The ratios are {dict(ratios)}. One above 0 is wanted, of {', '.join(RATIOS)}.")


def texts() -> list[Sample]:
    """Running text without pictures."""
    found = general_prompts()
    return [
        Sample(id=f"text/{each.id}", messages=(Message(role="assistant", content=f"{each.question} {each.answer}"),), origin="text")
        for each in found
    ]


def documents(count: int, *, seed: int = 0) -> list[Sample]:
    """Documents of two to four pictures with prose before, between and after them.

    By turns: flags of one continent; things with their names in other languages; two scenes.
    """
    flags = _grouped(row for row in read_table("flags") if row["split"] == "train" and row["continent_en"])
    things = [row for row in read_table("emoji") if row["split"] == "train" and row["plural"]]
    scenes = load_task("captions", train_size=2 * (count // 3), test_size=0, seed=seed + 1).train
    made = []
    for index in range(count):
        rng = generator("documents", seed, index)
        kind = index % 3
        if kind == 0:
            parts = _flags(flags, rng)
        elif kind == 1:
            parts = _things(things, rng)
        else:
            first = 2 * (index // 3) % len(scenes)
            parts = _scenes(scenes[first], scenes[first + 1])
        made.append(_document(f"documents/{seed}/{index}", parts))
    return made


def _grouped(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Drawings of flags by continent and country."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["continent_en"], {}).setdefault(row["en"], []).append(row)
    return found


def _flags(continents: dict[str, dict[str, list[Row]]], rng: random.Random) -> list[Part]:
    continent = rng.choice(sorted(continents))
    countries = continents[continent]
    names = rng.sample(sorted(countries), min(rng.randint(2, 4), len(countries)))
    shown: list[Part] = []
    for name in names:
        row = rng.choice(countries[name])
        shown.append((_drawn(row, rng, flip=False), f"This is the flag of {name}. {_called(row)}"))
    return [f"{len(names)} flags of {continent}, one after another.", *shown, f"{_listed(names)} lie in {continent}."]


def _things(rows: Sequence[Row], rng: random.Random) -> list[Part]:
    chosen = {row["en"]: row for row in rng.sample(rows, rng.randint(2, 4))}
    shown = [(_drawn(row, rng), f"Here is one {name}, of several one says {row['plural']}. {_called(row)}") for name, row in chosen.items()]
    return ["Things and what they are called.", *shown, f"There were {_listed(list(chosen))}."]


def _scenes(first: Sample, second: Sample) -> list[Part]:
    return [
        "Two pictures.",
        (first.images[0], f"In the first there is {first.answer}."),
        (second.images[0], f"In the second there is {second.answer}."),
        "That is all there is to see.",
    ]


def _drawn(row: Row, rng: random.Random, *, flip: bool = True) -> bytes:
    return encode(place(decode(row["image"]), side=SIDE, rng=rng, flip=flip))


def _called(row: Row) -> str:
    return f"In Swahili it is called {row['sw']}, in Japanese {row['ja']} and in Urdu {row['ur']}."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _caption(sample: Sample) -> Sample:
    return _document(f"captions/{sample.id}", [(sample.images[0], f"There is {sample.answer}.")])


def _document(name: str, parts: Iterable[Part]) -> Sample:
    """A plain sample: pictures in `TEXT` messages, prose in assistant messages."""
    messages: list[Message] = []
    images: list[ImageSource] = []
    for part in parts:
        shown, prose = ("", part) if isinstance(part, str) else (PLACEHOLDER, part[1])
        messages += [Message(role=TEXT, content=f"\n{shown}" if messages else shown), Message(role="assistant", content=prose)]
        images += [] if isinstance(part, str) else [part[0]]
    return Sample(id=name, messages=tuple(messages), images=tuple(images), origin=name)
