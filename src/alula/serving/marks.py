"""Marks that only the chat template may write: a user who could would speak as the system, or as an image. It knows no HTTP."""

from transformers import ProcessorMixin

from alula.data.sample import PLACEHOLDER, Sample


class Marks:
    """The special tokens of a processor's tokenizer, and its image token."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._tokenizer = processor.tokenizer
        special = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        image = self._tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None) or [])
        self._ids = (special | set(self._tokenizer.all_special_ids) | {image}) - {self._tokenizer.unk_token_id}

    def first_in(self, sample: Sample) -> str | None:
        """The first of them in what the prompt of `sample` says, as the tokenizer reads it; None: there is none."""
        for message in sample.prompt:
            for text in message.content.split(PLACEHOLDER):
                for index in self._tokenizer(text, add_special_tokens=False)["input_ids"]:
                    if index in self._ids:
                        return self._tokenizer.convert_ids_to_tokens(index)
        return None
