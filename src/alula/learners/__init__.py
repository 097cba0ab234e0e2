"""Learners beside a model's attention (WINGS): what they see, how they join, the handle. The seam for attention modules."""

from alula.learners.columns import carrying_columns
from alula.learners.handle import LearnerConfig, Learners, attach_learners

__all__ = ["LearnerConfig", "Learners", "attach_learners", "carrying_columns"]
