"""Referring expressions on the scenes of `scenes`; the answer is a box.

The form of the answer is that of `alula.data.boxes`. Source: the referring group of MoME (arXiv 2407.12709): RefCOCO, RefCOCO+, RefCOCOg.
Difference: things are told apart by name and place alone, and each expression fits one thing by construction.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from alula.data.boxes import Box
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.drawing import encode
from alula.data.tasks.grid_scene import Sprites, draw_scene, read_sprites
from alula.data.tasks.selection import draw_splits
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "referring"
CELLS = (0, 1, 2, 3, 4, 5, 6, 7, 8)
INFO.register(NAME)(
    TaskInfo(
        summary="The box of the thing that is named, is outermost among its like, or is on one side of another thing.",
        languages=("en",),
        licence="CC-BY-4.0, Apache-2.0 and MIT pictures, Unicode-3.0 names",
        blind=0.18,
        held_out="the drawings of a vendor (Noto) that is not in train; the things are among those of emoji_en",
    )
)


class Side(NamedTuple):
    """A direction on the grid, and how it is said of one of many and of one beside another."""

    outermost: str
    beside: str
    axis: int
    sign: int

    def rank(self, cell: int) -> int:
        """Of a cell: the less, the further in this direction."""
        return self.sign * divmod(cell, 3)[self.axis]

    def depth(self, box: Box) -> float:
        """Of a box's centre: the less, the further in this direction."""
        return self.sign * (box[1 - self.axis] + box[3 - self.axis]) / 2


SIDES = (
    Side("leftmost", "to the left of", 1, 1),
    Side("rightmost", "to the right of", 1, -1),
    Side("topmost", "above", 0, 1),
    Side("bottommost", "below", 0, -1),
)


class Layout(NamedTuple):
    """What an expression needs: the cells of the thing that is meant, of others of its name, and of the thing on whose `side` it is."""

    expression: str
    target: int
    others: list[int]
    anchor: int | None = None
    side: Side | None = None

    def fits(self, boxes: Sequence[Box]) -> bool:
        """Whether no other thing is on that side by so much as a pixel; in a column, say, some are a little to the left.

        Args:
            boxes: of the target, the others, the anchor and any more.
        """
        _, *others, anchor = boxes[: len(self.others) + 2]
        return self.side is None or all(self.side.depth(box) >= self.side.depth(anchor) for box in others)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Scenes drawn anew for each seed; all sprites of a scene are one vendor's."""
    splits = draw_splits(NAME, read_sprites, _sample, train_size=train_size, test_size=test_size, seed=seed)
    longest = max((len(sample.answer) for sample in splits["train"] + splits["test"]), default=0)
    return Task(
        name=NAME,
        train=splits["train"],
        test=splits["test"],
        scoring="box_iou",
        max_new_tokens=longest + 2,  # every character of a box is one token of SmolLM2; two more as in `answer_tokens`
        description=str(INFO[NAME]),
    )


def _sample(sprites: Sprites, split: str, index: int, rng: random.Random) -> Sample:
    """Asks the three kinds in turn; things of other names fill the picture."""
    drawn = sprites[rng.choice(sorted(sprites))]
    thing, compared, *fillers = rng.sample(drawn, 4)
    layout = (_alone, _outermost, _beside)[index % 3](rng)
    placed = {layout.target: thing, **dict.fromkeys(layout.others, thing)}
    if layout.anchor is not None:
        placed[layout.anchor] = compared
    free = [cell for cell in CELLS if cell not in placed]
    placed |= {cell: rng.choice(fillers) for cell in rng.sample(free, k=min(rng.randint(2, 4), len(free)))}
    pictures = [sprite for sprite, _, _ in placed.values()]
    picture, boxes = draw_scene(pictures, list(placed), rng)
    while not layout.fits(boxes):
        picture, boxes = draw_scene(pictures, list(placed), rng)
    question = f"Where is the {layout.expression.format(thing=thing[1], compared=compared[1])}? Give its box."
    return Sample.ask(question, boxes[0].text, images=(encode(picture),), id=f"{NAME}/{split}/{index}", origin=NAME)


def _alone(rng: random.Random) -> Layout:
    """The only one of its name."""
    return Layout("{thing}", rng.choice(CELLS), [])


def _outermost(rng: random.Random) -> Layout:
    """All others of its name are in rows or columns further in."""
    side = rng.choice(SIDES)
    target = rng.choice(_cells(lambda cell: side.rank(cell) < max(map(side.rank, CELLS))))
    inner = _cells(lambda cell: side.rank(cell) > side.rank(target))
    return Layout(f"{side.outermost} {{thing}}", target, rng.sample(inner, k=rng.randint(1, 3)))


def _beside(rng: random.Random) -> Layout:
    """In the row or column of the only thing of another name, and on that side of it; no other of its name is in a cell on that side."""
    side = rng.choice(SIDES)
    anchor = rng.choice(_cells(lambda cell: side.rank(cell) > min(map(side.rank, CELLS))))
    line = divmod(anchor, 3)[1 - side.axis]
    target = rng.choice(_cells(lambda cell: side.rank(cell) < side.rank(anchor) and divmod(cell, 3)[1 - side.axis] == line))
    beyond = _cells(lambda cell: side.rank(cell) >= side.rank(anchor) and cell != anchor)
    return Layout(f"{{thing}} {side.beside} the {{compared}}", target, rng.sample(beyond, k=rng.randint(1, 2)), anchor, side)


def _cells(fits: Callable[[int], bool]) -> list[int]:
    return [cell for cell in CELLS if fits(cell)]
