"""Which samples may come before which, nearest first. It knows no setting of the benchmark."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from alula.data.interleaved.embedding import Embed
from alula.data.sample import Sample
from alula.data.stream import Task

Asked = tuple[Task, Sample]
"""A sample and the task it is from."""
STEM = 5
"""Letters; words with the same first ones count as the same ("empirical", "empirically")."""
KEPT = 32
"""Neighbours of a sample that are kept."""


def retrieval_text(task: Task, sample: Sample) -> str:
    """What stands for `sample` when similar ones are sought: what can be known without looking and without the answer.

    That is its question; where a task asks one question of every picture ("What is this?"), followed by all its answers.
    """
    if not sample.images or len({other.question for other in task.test}) > 1:
        return sample.question
    return f"{sample.question} {', '.join(sorted({other.answer for other in task.test}))}"


def nearest_texts(asked: Sequence[str], corpus: Sequence[str], *, embed: Embed, count: int = KEPT) -> list[list[int]]:
    """For each of `asked` the indices of the `count` most similar of `corpus`, nearest first, by cosine.

    Cosines are rounded to four places and ties go to the first in `corpus`, so that machines agree.
    """
    if not asked or not corpus:
        return [[] for _ in asked]
    rows = np.asarray(embed([*corpus, *asked]), dtype=np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = np.round(rows[len(corpus) :] @ rows[: len(corpus)].T, 4)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :count].tolist()


def text_corpus(text_tasks: Iterable[Task]) -> list[Sample]:
    """The samples that may be earlier turns: of each task the train split, or the test split where there is no other."""
    return [sample for task in text_tasks for sample in (task.train or task.test)]


def similar_samples(asked: Sequence[Asked], text_tasks: Sequence[Task], *, embed: Embed) -> list[list[Sample]]:
    """For each of `asked` the most similar text samples, nearest first."""
    corpus = text_corpus(text_tasks)
    texts = [retrieval_text(task, sample) for task, sample in asked]
    found = nearest_texts(texts, [sample.question for sample in corpus], embed=embed)
    return [[corpus[index] for index in indices] for indices in found]


def gives_away(other: Sample, last: Sample) -> bool:
    """Whether `other` names an answer or an option of `last`, or is `last`.

    Options too: a distractor that was the answer before could be ruled out, or come to mind first.
    """
    if other.id == last.id or other.question == last.question:
        return True
    told = "\n".join(message.content for message in other.messages).casefold()
    stems = {text.strip().casefold()[:STEM] for text in (*last.references, *last.options)}
    # No letter before it; after a sign of another script a stem may begin anywhere.
    return any(re.search(rf"(?<![a-z0-9]){re.escape(stem)}", told) for stem in stems)
