"""Turns rows of an answer and its distractors into samples for ranking. It knows no task."""

from collections.abc import Iterable

from alula.data.sample import Sample
from alula.data.tasks.selection import generator


def ranked_samples(items: Iterable[tuple[str, str, list[str]]], *, name: str, seed: int) -> list[Sample]:
    """One sample per (question, answer, distractors): the options are the answer and its distractors, shuffled."""
    samples = []
    for question, answer, distractors in items:
        options = [answer, *distractors]
        generator(name, question, seed).shuffle(options)
        samples.append(Sample.ask(question, answer, options=tuple(options), id=f"{name}/test/{question}", origin=name))
    return samples
