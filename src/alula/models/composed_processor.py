"""Text and images -> the tensors `ComposedVLM` takes. PIL and numpy only; it knows no weights but a sentence encoder's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs

from alula.errors import UserError
from alula.models.instructions import InstructionEncoder, instructions_of

IMAGE_TOKEN = "<image>"

# ChatML as SmolLM2 was trained on, with two differences: content may be typed parts, and there is no default system
# prompt (SmolLM2's own template puts one in front of every conversation: 20 tokens that say nothing about a task).
# The `generation` block lets trainers mask everything but the assistant's tokens.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('Content parts are of type image or text, not ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def count_views(crops: int) -> int:
    """How many times an image is encoded: as a whole, and in `crops` x `crops` parts.

    Args:
        crops: 0 (the whole image only), 2, 3 ...

    Raises:
        UserError: 1, which would be the whole image twice, less than 0, or no whole number.
    """
    if type(crops) is not int or crops < 0 or crops == 1:
        raise UserError(f"crops={crops!r} came. An image is cut in 2 x 2 parts or more, or with 0 not at all. Set crops=0 or crops=2.")
    return 1 + crops * crops


def count_image_tokens(num_tokens: int, *, crops: int = 0) -> int:
    """The placeholders of one image: the tokens of its views add up.

    Source: McKinzie et al., "MM1", section 4, https://arxiv.org/abs/2403.09611: 4 crops and 1 down-sampled image of 144 tokens are 720.

    Args:
        num_tokens: what the connector gives for one view.
        crops: as in `count_views`.

    Example:
        >>> count_image_tokens(144, crops=2)
        720
    """
    return num_tokens * count_views(crops)


class ComposedImagesKwargs(ImagesKwargs, total=False):
    """As for any image processor, and `crops`."""

    crops: int | None


class ComposedImageProcessor(PilBackend):
    """RGB, squeezed to one square size, then normalised; the defaults are those of ImageNet encoders at 128 pixels.

    The whole image is kept (no crop): questions ask about borders too. With `crops` = n it is seen in 1 + n x n views: squeezed to the
    square, and squeezed to n times its sides and cut in n x n parts, row by row; the pixels then have an axis for the views.
    """

    valid_kwargs = ComposedImagesKwargs
    resample = Resampling.BICUBIC
    image_mean = (0.485, 0.456, 0.406)  # of ImageNet, https://pytorch.org/vision/stable/models.html
    image_std = (0.229, 0.224, 0.225)
    size = {"height": 128, "width": 128}  # noqa: RUF012 - the form Transformers reads class defaults in
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    crops = 0

    def _preprocess(  # type: ignore[override] # it hands on what it does not read
        self, images: list[np.ndarray], size: SizeDict, crops: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        if not crops:
            return super()._preprocess(images, size=size, **kwargs)
        count_views(crops)
        assert size.height and size.width, "crops are of a square"
        tensor_type = kwargs.pop("return_tensors", None)
        large = SizeDict(height=size.height * crops, width=size.width * crops)
        whole, enlarged = (
            super(ComposedImageProcessor, self)._preprocess(images, size=one, return_tensors=None, **kwargs)["pixel_values"]
            for one in (size, large)
        )
        views = [np.stack([small, *_cut(big, crops)]) for small, big in zip(whole, enlarged, strict=True)]
        return BatchFeature(data={"pixel_values": views}, tensor_type=tensor_type)


def _cut(image: np.ndarray, crops: int) -> list[np.ndarray]:
    """The `crops` x `crops` parts of a (channels, height, width) image, row by row."""
    return [part for band in np.split(image, crops, axis=1) for part in np.split(band, crops, axis=2)]


class ComposedProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; each `<image>` of a text becomes `image_seq_length` placeholder tokens.

    Args:
        image_seq_length: tokens per image, as in the model's configuration; see `count_image_tokens`.
        image_token: the placeholder; one token of the tokenizer.
        instruction_encoder: `minilm` or the folder of a sentence encoder, for a model that weighs its encoders by the instruction: a
            batch with images then has `instruction_embedding`, one row for each image, of the text of the turn that it stands in.

    Raises:
        UserError: the tokenizer does not know `image_token` as one token.
    """

    def __init__(
        self,
        image_processor: ComposedImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int = 16,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
        instruction_encoder: str | None = None,
    ) -> None:
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"The tokenizer splits the image placeholder {image_token!r} into {len(ids)} tokens. One token is wanted: "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}}), or name another one."
            )
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = ids[0]
        self.instruction_encoder = instruction_encoder
        self._embed = InstructionEncoder(instruction_encoder) if instruction_encoder else None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        instructions: Sequence[str | Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The batch, as any processor of Transformers makes it, with `instruction_embedding` if there is an instruction encoder.

        Args:
            instructions: in place of what turns say, for texts that are no chats: of each text one for all its images, or one for each.

        Raises:
            UserError: images and placeholders do not match; another number of instructions than of texts, or of a
                text's images; an image outside of any turn.
        """
        batch = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if self._embed is None or text is None or "pixel_values" not in batch:
            return batch
        rows = self._embed(self._instructions([text] if isinstance(text, str) else text, given=instructions))
        batch["instruction_embedding"] = torch.from_numpy(rows) if isinstance(batch["pixel_values"], torch.Tensor) else rows
        return batch

    def _instructions(self, texts: list[str], *, given: Sequence[str | Sequence[str]] | None) -> list[str]:
        """The instruction of each image, in reading order."""
        if given is None:
            return [one for text in texts for one in instructions_of(text, image_token=self.image_token)]
        if len(given) != len(texts):
            raise UserError(f"{len(given)} instructions came with {len(texts)} texts. Give one for each text.")
        counts = [text.count(self.image_token) for text in texts]
        listed = [[one] * count if isinstance(one, str) else list(one) for one, count in zip(given, counts, strict=True)]
        if [len(row) for row in listed] != counts:
            raise UserError(f"{[len(row) for row in listed]} instructions came for {counts} images, text by text. Give one for each image.")
        return [one for row in listed for one in row]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image."""
        return self.image_token * self.image_seq_length

    def validate_inputs(
        self, images: ImageInput | None = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Counts `<image>` against images, row by row where images are nested.

        Raises:
            UserError: the counts differ; the message has the row.
        """
        rows = [text] if isinstance(text, str) else list(text or [])
        wanted = [row.count(self.image_token) for row in rows]
        given: list[Any] = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
        is_nested = any(isinstance(row, list | tuple) for row in given)
        if text is None:
            pass
        elif is_nested and [len(row) for row in given] != wanted:
            raise UserError(
                f"The texts have {wanted} {self.image_token} placeholders, but {[len(row) for row in given]} images came, "
                f"row by row. Write {self.image_token} once in a text for each of its images."
            )
        elif not is_nested and len(given) != sum(wanted):
            raise UserError(
                f"The texts have {sum(wanted)} {self.image_token} placeholders in all, but {len(given)} images came. "
                f"Write {self.image_token} once in a text for each of its images."
            )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
