"""Predictions, scores, the score matrix and its noise. Here without torch; `evaluate_task` is in `evaluation.evaluate`."""

from alula.evaluation.bootstrap import bootstrap_interval, paired_interval
from alula.evaluation.matrix import ScoreMatrix
from alula.evaluation.scores import Prediction, exact_match, normalise, score_task

__all__ = [
    "Prediction",
    "ScoreMatrix",
    "bootstrap_interval",
    "exact_match",
    "normalise",
    "paired_interval",
    "score_task",
]
