"""Several samples to one conversation. It knows neither tasks nor how the samples were found."""

import re
from collections.abc import Sequence
from dataclasses import replace

from alula.data.sample import PLACEHOLDER, Message, Sample
from alula.errors import UserError

TO_TEXT = "Thank you. Here is a related question."
TO_IMAGE = "Thank you. Now look at this picture."
SEPARATOR = " > "
"""Between the ids of the samples; what follows the last one is the id of the scored turn."""
LEADING_IMAGES = re.compile(rf"(?:{PLACEHOLDER}\s*)*")


def interleave(last: Sample, earlier: Sequence[Sample]) -> Sample:
    """`earlier`, each with its right answer, and then `last`, as one conversation that is scored as `last`.

    A fixed sentence connects each sample to the one before; it stands after the images that open a question. A
    conversation has one system message: that of `last`, if any; those of `earlier` are left out.

    Source: WINGS, the Interleaved Image-Text benchmark, https://arxiv.org/abs/2406.03496.
    Difference: there GPT-3.5 polishes the connecting sentences; ours are two, English, the same for all samples.

    Raises:
        UserError: a sample is running text, which asks nothing.

    Example:
        >>> kenya = Sample.ask("What is the capital of Kenya?", "Nairobi")
        >>> flag = Sample.ask("Which country is this?", "Uganda", images=(b"...",))
        >>> for message in interleave(flag, [kenya]).messages:
        ...     print(message.role, "|", message.content.replace("\\n", " "))
        user | What is the capital of Kenya?
        assistant | Nairobi
        user | <image> Thank you. Now look at this picture. Which country is this?
        assistant | Uganda
    """
    samples = [*earlier, last]
    turns: list[Message] = [message for message in last.messages if message.role == "system"]
    for number, sample in enumerate(samples):
        own = [message for message in sample.messages if message.role != "system"]
        if own[0].role != "user":
            raise UserError(
                f"{sample.origin or sample.id}: the sample opens with the assistant and asks nothing, so it cannot be a turn of a "
                "conversation. Give samples that start with a user message."
            )
        turns += own if number == 0 else [_connected(own[0]), *own[1:]]
    return replace(
        last,
        id=SEPARATOR.join(sample.id for sample in samples),
        messages=tuple(turns),
        images=tuple(image for sample in samples for image in sample.images),
    )


def _connected(asked: Message) -> Message:
    """The question after a connecting sentence, which stands after the images that open it."""
    opening = LEADING_IMAGES.match(asked.content)
    cut = opening.end() if opening else 0
    sentence = TO_IMAGE if PLACEHOLDER in asked.content else TO_TEXT
    return replace(asked, content=f"{asked.content[:cut]}{sentence} {asked.content[cut:]}")
