"""The tasks of a run asked again with solved examples before each question, each as a task of its own; see `alula.evaluation.few_shot`."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from alula.data.collate import Collator
from alula.data.interleaved.embedding import load_embedder
from alula.data.stream import Stream, Task
from alula.evaluation.few_shot import CHAT, WAYS, Budget, FewShot, asks, context_of, few_shot

logger = logging.getLogger(__name__)
BY_SEED, BY_SIMILARITY = WAYS


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task of a run with shots.

    Attributes:
        task: as it is scored; no measure of continual learning counts it.
        found: its shots.
        parent: the task without them.
    """

    task: Task
    found: FewShot
    parent: Task

    @property
    def is_plain(self) -> bool:
        """Whether it asks just what its parent asks, so that nothing has to be measured again."""
        return self.found.shots == 0 and self.found.form == CHAT

    @property
    def about(self) -> dict[str, float]:
        """Shots wanted, and the mean number that there was room for."""
        counts = self.found.counts
        return {"shots": self.found.shots, "shots_given": round(sum(counts) / max(len(counts), 1), 3)}


def shot_family(shots: int) -> str:
    """What the names of tasks with so many shots begin with, and what reports call the mean over them."""
    return f"{shots}shot"


def shot_name(task: str, shots: int) -> str:
    """The name under which a task with so many shots is scored.

    Example:
        >>> shot_name("easy_vqa", 4)
        '4shot_easy_vqa'
    """
    return f"{shot_family(shots)}_{task}"


def scored_names(stream: Stream, shots: Iterable[int], *, form: str = CHAT) -> list[str]:
    """The names of all that a run scores."""
    tasks = (*stream.tasks, *stream.base_tasks)
    return [*(task.name for task in tasks), *(shot_name(task.name, count) for count in shots for task in tasks if _asked(task, form))]


def ask_with_shots(
    stream: Stream, model: nn.Module, collator: Collator, *, shots: Sequence[int], by: str = BY_SEED, form: str = CHAT
) -> dict[str, Asked]:
    """Every task that asks something, with each number of shots that is wanted, by name.

    The shots of a question are the same in every cell of a run, as far as the model has room for them.

    Raises:
        UserError: as `few_shot`.
    """
    found: dict[str, Asked] = {}
    context = context_of(model, collator) if shots else None
    embed = load_embedder("minilm") if any(shots) and by == BY_SIMILARITY else None
    for task in (task for task in (*stream.tasks, *stream.base_tasks) if _asked(task, form)):
        budget = Budget(collator, context=context) if context else None  # one a task: it knows images by their samples' ids
        for count in shots:
            made = few_shot(task, shots=count, by=by, form=form, embed=embed, budget=budget)
            if made.num_dropped or made.num_too_long:
                logger.warning("%s", made.describe())
            name = shot_name(task.name, count)
            asked = replace(made.task, name=name, train=(), is_base=True, is_probe=True)
            found[name] = Asked(task=asked, found=made, parent=task)
    return found


def _asked(task: Task, form: str) -> bool:
    """Whether shots can be put before its samples: it asks something, and its score is of the last answer alone."""
    return len(task.test) > 0 and asks(task) and (form != CHAT or task.scoring != "bits_per_byte")
