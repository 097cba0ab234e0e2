"""What a model reads, as a hash: scores change with the prompt, so what was asked is kept beside them. It knows no model."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import ProcessorMixin

from alula.data.rendering import ChatRenderer
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.evaluation.scores import Prediction, hash_of


def prompt_hashes(processor: ProcessorMixin, samples: Sequence[Sample], *, with_answers: bool) -> list[str]:
    """The hash of each sample as the chat template of `processor` writes it; an image is the mark that stands for it there.

    Args:
        with_answers: the whole conversation, as where the model is given answers (ranked options, prose); else the prompt alone.

    Raises:
        UserError: the template refuses a sample, or there is none.
    """
    renderer = ChatRenderer(processor)
    return [hash_of(renderer.conversation(sample).text if with_answers else renderer.prompt(sample)) for sample in samples]


def with_prompt_hashes(found: Sequence[Prediction], task: Task, processor: ProcessorMixin) -> list[Prediction]:
    """The predictions of the first samples of `task`, in order, with the hashes of what the model read."""
    hashes = prompt_hashes(processor, list(task.test)[: len(found)], with_answers=not task.is_generated)
    return [replace(prediction, prompt_hash=own) for prediction, own in zip(found, hashes, strict=True)]
