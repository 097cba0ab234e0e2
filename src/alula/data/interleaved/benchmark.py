"""The six settings of the interleaved image-text benchmark over any text and image tasks. It knows no task by name.

Source: WINGS (Zhang et al. 2024), the Interleaved Image-Text benchmark, https://arxiv.org/abs/2406.03496. T is a turn
without, V one with an image; the score is that of the last turn.
Differences: the turns are of the tasks given, not of MMLU, MMMU and the like; connecting sentences are fixed (see
`interleave`); an earlier turn is drawn among the eight most similar samples that do not give the last answer away, where
the paper says no more than "similar".
"""

import random
from collections.abc import Sequence
from itertools import zip_longest

from alula.data.interleaved.conversation import interleave
from alula.data.interleaved.embedding import Embed
from alula.data.interleaved.retrieval import Asked, gives_away, similar_samples
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.errors import UserError

SETTINGS = ("T", "TT", "TTT", "TTV", "TV", "V")
"""In the paper's order; the last letter is the scored turn."""
MOST_EARLIER = 2
NEAREST = 8
"""Earlier turns are drawn among so many, or all samples that are asked the same question would follow the same turn."""


def iit_tasks(text_tasks: Sequence[Task], image_tasks: Sequence[Task], *, size: int | None, seed: int, embed: Embed) -> tuple[Task, ...]:
    """Six tasks, ``iit_t`` to ``iit_v``, evaluated and never trained.

    Settings are paired: those that end in T have the same last turns, those that end in V too, and a longer conversation
    is a shorter one with a turn before it. Earlier turns are from a text task's train split, or from other test samples
    where there is none.

    Args:
        text_tasks: of samples without images, ranked; their options are those of the last turn.
        image_tasks: of samples with images, scored by exact match.
        size: samples of a setting, spread evenly over its tasks; None takes all.
        seed: of the choice of last turns and of the draw of earlier ones.
        embed: gives the vectors by whose cosine questions are similar; see `load_embedder`.

    Raises:
        UserError: no tasks of a kind, a task that does not fit its kind, or too few similar samples.

    Example:
        >>> from alula.data.interleaved import tf_idf
        >>> from alula.data.tasks import load_task
        >>> capital, flags = load_task("capital", test_size=40), load_task("flags", test_size=4)
        >>> tasks = iit_tasks([capital], [flags], size=4, seed=0, embed=tf_idf)
        >>> [(task.name, len(task.test[0].messages)) for task in tasks]
        [('iit_t', 2), ('iit_tt', 4), ('iit_ttt', 6), ('iit_ttv', 6), ('iit_tv', 4), ('iit_v', 2)]
    """
    _check("text", text_tasks, scoring="ranked")
    _check("image", image_tasks, scoring="exact_match")
    asked = {"T": last_turns(text_tasks, size=size, seed=seed), "V": last_turns(image_tasks, size=size, seed=seed)}
    similar = {kind: similar_samples(turns, text_tasks, embed=embed) for kind, turns in asked.items()}
    return tuple(iit_task(setting, asked[setting[-1]], similar[setting[-1]], seed=seed) for setting in SETTINGS)


def last_turns(tasks: Sequence[Task], *, size: int | None, seed: int) -> list[Asked]:
    """The scored turns: the test samples of `tasks` shuffled and taken in turn, so that a smaller choice opens a larger."""
    columns = []
    for task in tasks:
        shuffled = random.Random(f"iit/{task.name}/{seed}").sample(task.test, k=len(task.test))
        columns.append([(task, sample) for sample in shuffled])
    return [asked for row in zip_longest(*columns) for asked in row if asked is not None][:size]


def iit_task(setting: str, asked: Sequence[Asked], similar: Sequence[Sequence[Sample]], *, seed: int) -> Task:
    """One setting over the last turns `asked`.

    Args:
        setting: one of `SETTINGS`.
        asked: last turns with their tasks.
        similar: for each last turn text samples, nearest first; unused where the setting has one turn.

    Raises:
        UserError: fewer than two of the similar samples may come before a last turn.
    """
    count = len(setting) - 1
    test = []
    for (_, last), candidates in zip(asked, similar, strict=True):
        earlier = _draw(last, candidates, seed)[MOST_EARLIER - count :] if count else []
        test.append(interleave(last, earlier))
    ends = "a text question" if setting.endswith("T") else "a question about an image"
    return Task(
        name=f"iit_{setting.lower()}",
        train=[],
        test=test,
        scoring="ranked" if setting.endswith("T") else "exact_match",
        is_base=True,
        is_probe=True,
        max_new_tokens=max((task.max_new_tokens for task, _ in asked), default=12),
        description=f"{ends} after {count} related text turns",
    )


def _draw(last: Sample, candidates: Sequence[Sample], seed: int) -> list[Sample]:
    """Two earlier turns, the same for every setting; a shorter conversation has the second alone."""
    allowed = [sample for sample in candidates if not gives_away(sample, last)][:NEAREST]
    if len(allowed) < MOST_EARLIER:
        raise UserError(
            f"{last.origin or last.id}: {len(allowed)} of the {len(candidates)} similar samples do not give its answer away; "
            f"{MOST_EARLIER} are wanted before it. Give text tasks with more samples."
        )
    return random.Random(f"iit/{last.id}/{seed}").sample(allowed, k=MOST_EARLIER)


def _check(kind: str, tasks: Sequence[Task], *, scoring: str) -> None:
    if not tasks:
        raise UserError(f"No {kind} tasks came; one or more are wanted. Give {kind}_tasks.")
    for task in tasks:
        if task.scoring != scoring:
            raise UserError(f"Task '{task.name}' is scored by {task.scoring}; {kind} tasks want {scoring}. Leave it out.")
        for sample in (*task.train, *task.test):
            if bool(sample.images) != (kind == "image"):
                has = "images" if sample.images else "no image"
                raise UserError(f"{sample.origin or sample.id}: it has {has}, but came in {kind}_tasks. Move the task or drop the row.")
