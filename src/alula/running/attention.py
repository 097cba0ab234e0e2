"""The attention shift of a cell, before and after learning, for the report."""

import contextlib
import logging
from pathlib import Path

from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.evaluation.attention_shift import diagnose
from alula.files import read_json, write_json
from alula.methods import Arm

logger = logging.getLogger(__name__)
FILE = "attention_shift.json"


def keep_attention_shift(
    model: nn.Module, collator: Collator, stream: Stream, *, folder: Path, row: int, arm: Arm | None, num_samples: int
) -> None:
    """Adds the shift of row `row` to the cell's file; what is there already is not measured again.

    Args:
        arm: the way of using what was learnt; None: the model as it is.
        num_samples: test samples with images, in equal parts from the tasks of the stream; 0 measures nothing.
    """
    path = folder / FILE
    rows = read_json(path) if path.exists() else []
    if not num_samples or row in [known["row"] for known in rows]:
        return
    each = -(-num_samples // len(stream.tasks))
    samples = [sample for task in stream.tasks for sample in [s for s in task.test if s.images][:each]]
    mixed = Task(name="mixed", train=[], test=samples)
    try:
        with arm.enter(mixed) if arm else contextlib.nullcontext():
            found = diagnose(model, collator, samples, around=arm.around) if arm else diagnose(model, collator, samples)
    except UserError as error:
        logger.warning("The attention shift is left out: %s", error)
        return
    write_json(path, [*rows, found.row(row=row, arm=arm.name if arm else "default")])
