"""Text and images -> the tensors `ComposedVLM` takes. PIL and numpy only; it knows no weights."""

from typing import Any

from PIL.Image import Resampling
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput

from alula.errors import UserError

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


class ComposedImageProcessor(PilBackend):
    """RGB, squeezed to one square size, then normalised; the defaults are those of ImageNet encoders at 128 pixels.

    The whole image is kept (no crop): questions ask about borders too.
    """

    resample = Resampling.BICUBIC
    image_mean = (0.485, 0.456, 0.406)  # of ImageNet, https://pytorch.org/vision/stable/models.html
    image_std = (0.229, 0.224, 0.225)
    size = {"height": 128, "width": 128}  # noqa: RUF012 - the form Transformers reads class defaults in
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True


class ComposedProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; each `<image>` of a text becomes `image_seq_length` placeholder tokens.

    Args:
        image_seq_length: tokens per image, as in the model's configuration.
        image_token: the placeholder; one token of the tokenizer.

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
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

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
