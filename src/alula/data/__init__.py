"""Samples, tasks and streams, read from files and made into batches. This room knows no model and no method."""

from typing import TYPE_CHECKING

from alula.data.blend import Blend, Source
from alula.data.readers import check_images, read_samples, read_task, stream_samples
from alula.data.sample import ImageSource, Message, Sample
from alula.data.stream import Stream, Task

if TYPE_CHECKING:
    from alula.data.collate import Collator

__all__ = [
    "Blend",
    "Collator",
    "ImageSource",
    "Message",
    "Sample",
    "Source",
    "Stream",
    "Task",
    "check_images",
    "read_samples",
    "read_task",
    "stream_samples",
]


def __getattr__(name: str) -> object:
    # Collator alone needs transformers, whose import takes seconds that reading a file should not cost.
    if name == "Collator":
        from alula.data.collate import Collator

        return Collator
    raise AttributeError(f"module 'alula.data' has no attribute '{name}'")
