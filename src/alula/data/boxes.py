"""Boxes as text: how one is written, found in what a model says, and checked in data. It knows no model and no score.

A box is ``[x1, y1, x2, y2]``: left, top, right and bottom edge as fractions of the image's width and height, from its top left corner.
Source: LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744), whose boxes of RefCOCO have two decimals; MoME (arXiv 2407.12709, figure 6) has three
and no blanks. Both are read.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from alula.data.sample import BadRow, Sample

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
CLOSED = re.compile(rf"[\[(]\s*({NUMBER})[\s,;]+({NUMBER})[\s,;]+({NUMBER})[\s,;]+({NUMBER})\s*[\])]")
BETWEEN = r"[\s,;()\[\]]+"
ALONE = re.compile(rf"[\s\[(]*({NUMBER}){BETWEEN}({NUMBER}){BETWEEN}({NUMBER}){BETWEEN}({NUMBER})[\s\])]*\.?\s*")


class Box(NamedTuple):
    """The edges of a box; fractions of the image's width and height.

    Example:
        >>> Box(0.125, 0, 0.5, 1).text
        '[0.12, 0.00, 0.50, 1.00]'
    """

    left: float
    top: float
    right: float
    bottom: float

    @property
    def text(self) -> str:
        """As it is written, with two decimals."""
        return "[" + ", ".join(f"{edge:.2f}" for edge in self) + "]"

    @property
    def area(self) -> float:
        """A fraction of the image; 0 where the edges are in the wrong order."""
        return max(self.right - self.left, 0.0) * max(self.bottom - self.top, 0.0)

    @property
    def is_inside(self) -> bool:
        """Whether all edges are fractions; pixels and thousandths are not."""
        return all(0 <= edge <= 1 for edge in self)


def read_box(text: str, *, ended: bool = True) -> Box | None:
    """The first four numbers of `text` that stand in brackets; or `text` itself, if it is nothing but four numbers.

    Args:
        ended: whether the text is whole. The last number of one that was cut off may lack digits: without a closing bracket it is no box.

    Example:
        >>> read_box("It is at [0.1,0.25,0.5,.75].")
        Box(left=0.1, top=0.25, right=0.5, bottom=0.75)
        >>> read_box("(0.1, 0.2), (0.3, 0.4)")
        Box(left=0.1, top=0.2, right=0.3, bottom=0.4)
        >>> read_box("bottom left") is None
        True
    """
    found = CLOSED.search(text) or (ALONE.fullmatch(text) if ended else None)
    return None if found is None else Box(*map(float, found.groups()))


def check_boxes(samples: Iterable[Sample], *, others_allowed: bool = False) -> None:
    """Refuses samples whose answers are no boxes.

    Args:
        others_allowed: answers without any box pass, as in training data that mixes boxes with words.

    Raises:
        BadRow: an answer is no box, its edges are in the wrong order, or no fractions of the image.
    """
    for sample in samples:
        for answer in sample.references:
            box = read_box(answer)
            if box is None and others_allowed:
                continue
            if box is None:
                wrong, advice = "is no box", "or score the task by exact_match"
            elif not box.is_inside:
                wrong, advice = "is not within 0 and 1", "divide pixels by the image's width and height"
            elif box.area == 0:
                wrong, advice = "has no area, or its edges are in the wrong order", "or drop the row"
            else:
                continue
            raise BadRow(
                f"{sample.origin or sample.id}: the answer '{answer[:60]}' {wrong}. box_iou wants [x1, y1, x2, y2]: left, top, right "
                f"and bottom edge as fractions of the image, x1 < x2 and y1 < y2. Correct it, {advice}."
            )
