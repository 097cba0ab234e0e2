"""Samples to tensors through the model's own processor; targets are the assistant's tokens. It knows no model."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from alula.data.rendering import ChatRenderer, Rendered, Turn, image_instructions
from alula.data.sample import Message, Sample
from alula.errors import UserError

IGNORED = -100
"""The label of a token that is no target (the convention of torch's and Transformers' losses)."""


class Collator:
    """Makes batches for any Hugging Face vision-language model out of samples.

    Text-only rows, rows with one image and rows with several may share a batch. Rows are never cut: one that is too
    long is an error, because a cut answer teaches a wrong one.

    Args:
        processor: the model's processor, with a chat template and a fast tokenizer that can pad.
        max_length: tokens, image tokens included; the longest row allowed. None: no limit.

    Raises:
        UserError: the processor lacks a chat template, a padding token or a fast tokenizer.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
        >>> words = ["<pad>", "</s>", "USER:", "BOT:", "Capital", "of", "Kenya?", "Nairobi"]
        >>> table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        >>> table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>")
        >>> turns = "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': ' BOT: '}[m.role] + m.content[0].text }}{% endfor %}"
        >>> processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=turns)
        >>> batch = Collator(processor)([Sample.ask("Capital of Kenya?", "Nairobi")])
        >>> tokenizer.decode(batch["input_ids"][batch["labels"] != -100])
        'Nairobi </s>'
    """

    def __init__(self, processor: ProcessorMixin, *, max_length: int | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self._renderer = ChatRenderer(processor)
        if self.tokenizer.pad_token is None:
            raise UserError(
                f"The tokenizer of {type(processor).__name__} has no padding token, so rows cannot share a batch. "
                "Set processor.tokenizer.pad_token = processor.tokenizer.eos_token."
            )
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} cannot tell where its tokens are in the text. "
                "Load the processor with a fast tokenizer (use_fast=True)."
            )
        # PaliGemma: the prompt is read in both directions; the processor itself writes <bos> and a final line break.
        self._is_prefix_lm = _takes_suffix(type(processor))
        # A composed model may weigh its encoders by what is asked.
        self._wants_instructions = "instructions" in inspect.signature(type(processor).__call__).parameters
        self._opening = "" if self._is_prefix_lm else self._added_opening()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A right-padded batch to train on.

        Returns:
            what the model's forward takes, and ``labels``: the tokens of every assistant turn with its end-of-turn
            token, -100 elsewhere. Of running text (a single assistant message) every token but the first is a target.

        Raises:
            UserError: a row is too long, its images are broken, or its answer cannot be found among its tokens.
        """
        rows = [self._opened(self._renderer.conversation(sample)) for sample in samples]
        return self._with_labels(samples, rows, [row.turns for row in rows])

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A left-padded batch to generate from: everything before the last answer, and that answer's header.

        Raises:
            UserError: a sample has no prompt, is too long, or its images are broken.
        """
        texts = [self._open(self._renderer.prompt(sample)) for sample in samples]
        return self._encode(samples, texts, side="left")

    def continuations(self, samples: Sequence[Sample], options: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """A right-padded batch to rank answers with: one row per sample and option, in that order.

        Args:
            options: the candidate answers of each sample.

        Returns:
            as a training batch, with the tokens of the option alone as targets (no end-of-turn token).

        Raises:
            UserError: another number of option lists than of samples, an empty option, or as in training.
        """
        if len(samples) != len(options):
            raise UserError(f"{len(options)} lists of options came for {len(samples)} samples. Give one list a sample.")
        answered = [_answered(sample, option) for sample, several in zip(samples, options, strict=True) for option in several]
        rows = [self._opened(self._renderer.conversation(sample)) for sample in answered]
        last = [row.turns[-1] for row in rows]
        return self._with_labels(answered, rows, [(replace(turn, end=turn.content_end),) for turn in last])

    def count_text(self, sample: Sample) -> int:
        """Tokens of a training row in which each image still is the one mark that the chat template writes.

        Raises:
            UserError: the template refuses the messages or changes an answer.
        """
        text = self._opened(self._renderer.conversation(sample)).text
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_labels(self, samples: Sequence[Sample], rows: Sequence[Rendered], targets: Sequence[tuple[Turn, ...]]) -> dict[str, Tensor]:
        batch = self._encode(samples, [row.text for row in rows], side="right")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, (sample, row, turns) in enumerate(zip(samples, rows, targets, strict=True)):
            length = int(batch["attention_mask"][i].sum())
            tokens = batch["input_ids"][i, :length].tolist()
            for start, end in self._located(sample, row.text, turns, tokens):
                labels[i, start:end] = batch["input_ids"][i, start:end]
        if self._is_prefix_lm:  # without this the answer would see itself: type 0 is read in both directions
            batch["token_type_ids"] = ((labels != IGNORED).cumsum(-1) > 0).to(batch["input_ids"].dtype)
        return {**batch, "labels": labels}

    def _located(self, sample: Sample, text: str, turns: tuple[Turn, ...], tokens: list[int]) -> list[tuple[int, int]]:
        """Where `turns` are in `tokens`, the row of `text` in which each image mark grew to many tokens."""
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = plain["input_ids"], plain["offset_mapping"]
        head, tail = _common_head(ids, tokens), _common_head(ids[::-1], tokens[::-1])
        shift, cursor = len(tokens) - len(ids), 0
        places: list[tuple[int, int]] = []
        for turn in turns:
            inside = [i for i, (start, end) in enumerate(offsets) if end > turn.start and start < turn.end]
            start, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
            if end > head and start >= len(ids) - tail:
                start, end = start + shift, end + shift
            elif end > head:  # between two images: the turn with its header, the first after the turn before
                first = next(i for i, (_, stop) in enumerate(offsets) if stop > turn.header)
                at = _find(ids[first:end], tokens, cursor)
                start, end = (at + start - first, at + end - first) if at >= 0 else (0, 0)
            if start == end:
                raise UserError(
                    f"{sample.origin or sample.id}: the answer {text[turn.start : turn.end][:60]!r} is not among the "
                    f"tokens that {type(self.processor).__name__} made. Check that processor.chat_template fits it."
                )
            places.append((max(start, 1), end))  # nothing predicts a row's first token
            cursor = end
        return places

    def _encode(self, samples: Sequence[Sample], texts: list[str], *, side: Literal["left", "right"]) -> dict[str, Tensor]:
        images = [sample.open_images() for sample in samples]
        with _padded(self.tokenizer, side):
            if self._is_prefix_lm and not all(images):
                batch = self._encode_prefix_lm(samples, texts, images)
            else:
                batch = self._process(samples, texts, images)
        batch.pop("labels", None)  # PaliGemma gives some of its own
        self._check_lengths(samples, batch["attention_mask"])
        return batch

    def _process(self, samples: Sequence[Sample], texts: list[str], images: list[list[Image.Image]]) -> dict[str, Tensor]:
        """One call of the processor; images as one list a row, which all processors read, or None for text only."""
        told = {"instructions": [image_instructions(sample) for sample in samples]} if self._wants_instructions else {}
        try:
            made = self.processor(
                text=[text[:-1] for text in texts] if self._is_prefix_lm else texts,  # it adds the line break again
                images=images if any(images) else None,
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
                **told,
            )
        except (ValueError, IndexError) as error:
            names = ", ".join(sample.origin or sample.id for sample in samples)
            raise UserError(
                f"{type(self.processor).__name__} refuses the rows {names}: {error} "
                "Check that the texts hold no image token of this model, and that processor.chat_template fits it."
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _encode_prefix_lm(self, samples: Sequence[Sample], texts: list[str], images: list[list[Image.Image]]) -> dict[str, Tensor]:
        """As `_process`, but text-only rows bypass the processor, which would write <bos> into their middle."""
        rows: list[list[int]] = []
        pixels: list[Tensor] = []
        for sample, text, shown in zip(samples, texts, images, strict=True):
            if shown:
                made = self._process([sample], [text], [shown])
                pixels.append(made["pixel_values"])
                rows.append(made["input_ids"][0].tolist())
            else:
                rows.append(self.tokenizer(self.tokenizer.bos_token + text, add_special_tokens=False)["input_ids"])
        batch = dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return {**batch, "pixel_values": torch.cat(pixels)} if pixels else batch

    def _check_lengths(self, samples: Sequence[Sample], mask: Tensor) -> None:
        for sample, length in zip(samples, mask.sum(-1).tolist(), strict=True):
            if self.max_length is not None and length > self.max_length:
                raise UserError(
                    f"{sample.origin or sample.id}: {length} tokens, but max_length is {self.max_length}. Rows are "
                    "never cut: a cut answer teaches a wrong one. Raise max_length, use smaller images or drop the row."
                )

    def _added_opening(self) -> str:
        """What the tokenizer by itself puts before every text (usually nothing or its <bos> token)."""
        first = self.tokenizer("x")["input_ids"][:1]
        return self.tokenizer.bos_token if first == [self.tokenizer.bos_token_id] and first[0] is not None else ""

    def _open(self, text: str) -> str:
        final = "\n" if self._is_prefix_lm and not text.endswith("\n") else ""
        return f"{'' if text.startswith(self._opening) else self._opening}{text}{final}"

    def _opened(self, row: Rendered) -> Rendered:
        text = self._open(row.text)
        return Rendered(text=text, turns=tuple(turn.moved(text.index(row.text)) for turn in row.turns))


def _takes_suffix(kind: type[ProcessorMixin]) -> bool:
    """Whether its prompts are read in both directions, as PaliGemma's; before Transformers 5.23 suffixes are keywords of the text."""
    text = getattr(getattr(kind, "valid_processor_kwargs", None), "__annotations__", {}).get("text_kwargs")
    return "suffix" in inspect.signature(kind.__call__).parameters or "suffix" in getattr(text, "__annotations__", {})


def _answered(sample: Sample, option: str) -> Sample:
    return replace(sample, messages=(*sample.prompt, Message(role="assistant", content=option)))


@contextlib.contextmanager
def _padded(tokenizer: PreTrainedTokenizerBase, side: str) -> Iterator[None]:
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def _common_head(left: list[int], right: list[int]) -> int:
    """How many leading items are equal."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _find(part: list[int], whole: list[int], start: int) -> int:
    """The first position from `start` on at which `part` is in `whole`, or -1."""
    return next((i for i in range(start, len(whole) - len(part) + 1) if whole[i : i + len(part)] == part), -1)
