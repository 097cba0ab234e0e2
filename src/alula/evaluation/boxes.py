"""What a box in an answer is worth. It knows no model.

Source: accuracy of referring expression comprehension at an IoU of 0.5 (Yu et al. 2016, arXiv 1608.00272), which MoME, LLaVA and others
report. Difference: a box whose edges are in the wrong order has no area and an IoU of 0; it is not turned round.
"""

from collections.abc import Sequence

from alula.data.boxes import Box, read_box
from alula.evaluation.scores import Scored

RIGHT = 0.5
"""The least IoU of a right box."""
ROUNDING = 1e-9
"""Edges are decimal fractions, and an IoU of one half may come out a little less."""


def intersection_over_union(one: Box, other: Box) -> float:
    """The area that two boxes share, over the area that they cover together; 0 where both have none.

    Example:
        >>> intersection_over_union(Box(0, 0, 0.5, 1), Box(0.25, 0, 1, 1))
        0.25
    """
    shared = Box(max(one.left, other.left), max(one.top, other.top), min(one.right, other.right), min(one.bottom, other.bottom)).area
    covered = one.area + other.area - shared
    return shared / covered if covered else 0.0


def box_match(output: str, references: Sequence[str], *, ended: bool = True) -> Scored:
    """1 where the box in the output and that of a reference have an IoU of 0.5 or more, else 0; with the best IoU beside it.

    An answer is *unparsed* when there is no box in it (`read_box`), or one that is wrong and no fraction of the image, as in pixels.

    Args:
        references: boxes (see `check_boxes`).
        ended: False when generation stopped at the token limit.
    """
    said = read_box(output, ended=ended)
    if said is None:
        return Scored(score=0.0, parsed=False, iou=0.0)
    iou = max(intersection_over_union(said, box) for reference in references if (box := read_box(reference)) is not None)
    is_right = iou >= RIGHT - ROUNDING
    return Scored(score=float(is_right), parsed=is_right or said.is_inside, iou=iou)
