"""Conversations whose last turn is scored: the interleaved image-text benchmark. It knows no model but a sentence encoder."""

from alula.data.interleaved.benchmark import SETTINGS, iit_task, iit_tasks, last_turns
from alula.data.interleaved.conversation import interleave
from alula.data.interleaved.embedding import Embed, load_embedder, tf_idf

__all__ = ["SETTINGS", "Embed", "iit_task", "iit_tasks", "interleave", "last_turns", "load_embedder", "tf_idf"]
