"""Generative replay: before its first task the model writes conversations of its own, and goes on learning them."""

import contextlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.sample import PLACEHOLDER, Sample
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.additions.aside import evaluating
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method

NAME = "generative_replay"
TRIES = 4
"""Conversations that are begun for each one wanted: those with an empty request or an unfinished answer are dropped."""

logger = logging.getLogger(__name__)


@ADDITIONS.register(NAME)
class GenerativeReplay(Addition):
    """Mixes text-only conversations that the base model wrote itself into the data of each stage that trains.

    The model gets what opens a conversation and writes the user's request (its first line), then answers it; both are
    drawn, not greedy, from its own distribution. Written once, before the first step of the first task.

    Args:
        num_samples: conversations (1 or more). Default 128, ours.
        max_new_tokens: tokens; the longest request and the longest answer. Answers that did not end by then are dropped,
            because a cut answer teaches to stop too early.
        temperature: divides the scores (above 0). Default 1: the model's own distribution.

    Source: Shin et al. 2017, "Continual Learning with Deep Generative Replay" (arXiv 1705.08690); Robins 1995
    (pseudo-rehearsal). That an instruction-tuned model writes the requests as well: Xu et al. 2024, "Magpie"
    (arXiv 2406.08464).

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        collator: Collator,
        num_samples: int = 128,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(method, model, collator=collator)
        if num_samples < 1 or max_new_tokens < 1 or temperature <= 0:
            raise UserError(
                f"num_samples: {num_samples}, max_new_tokens: {max_new_tokens} and temperature: {temperature} came; 1 or more "
                "samples, 1 or more tokens and a temperature above 0 are accepted. Correct them."
            )
        self.num_samples, self.max_new_tokens, self.temperature = num_samples, max_new_tokens, float(temperature)
        self.samples: list[Sample] = []

    def training_data(self, model: nn.Module, task: Task, samples: Sequence[Sample]) -> Sequence[Sample]:
        """`samples` and the model's own; a stage that takes only some of its task's samples takes only such of them."""
        if not self.samples:  # in the very first stage, before its first step; a resumed run has them already
            self.samples = self.write(model)
        return [*samples, *self.method.training_data(replace(task, train=self.samples))]

    @torch.no_grad()
    def write(self, model: nn.Module) -> list[Sample]:
        """The base model's conversations.

        Raises:
            UserError: none came to an end.
        """
        device = next(model.parameters()).device
        found: list[Sample] = []
        opening, closing = self._frame()
        with evaluating(model), self._base(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{self.method.settings.seed}/{NAME}".encode()))
            for _ in range(-(-TRIES * self.num_samples // self.method.settings.batch_size)):
                rows = opening.to(device).expand(self.method.settings.batch_size, -1)
                drawn = self._generate(model, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})
                found += self._answered(model, [_request(text, closing) for text, _ in drawn], start=len(found))
                if len(found) >= self.num_samples:
                    break
        if not found:
            raise UserError(
                f"generative_replay: the model finished no answer within {self.max_new_tokens} tokens. Raise max_new_tokens, "
                "or take generative_replay out: it wants a model that was taught to talk."
            )
        if len(found) < self.num_samples:
            logger.warning("generative_replay: %d of %d conversations came to an end.", len(found), self.num_samples)
        logger.info("generative_replay: %r -> %r, and others", found[0].question, found[0].answer)
        return found[: self.num_samples]

    def _answered(self, model: nn.Module, requests: Sequence[str], *, start: int) -> list[Sample]:
        asked = [Sample.ask(request, "?") for request in requests if request]
        if not asked:
            return []
        prompts = {key: value.to(next(model.parameters()).device) for key, value in self.collator.prompts(asked).items()}
        answers = zip(asked, self._generate(model, prompts), strict=True)
        pairs = [(sample.question, answer) for sample, (answer, has_ended) in answers if has_ended and answer]
        return [_sample(number, *pair) for number, pair in enumerate(pairs, start)]

    def _generate(self, model: Any, inputs: dict[str, Tensor]) -> list[tuple[str, bool]]:
        """What the model goes on with, and whether it came to an end."""
        tokenizer = self.collator.tokenizer
        whole: Int[Tensor, "batch tokens"] = model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = whole[:, inputs["input_ids"].shape[1] :]
        ends = _endings(model, tokenizer)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(_plain(text, tokenizer), not ends.isdisjoint(row)) for text, row in zip(texts, new.tolist(), strict=True)]

    def _frame(self) -> tuple[Int[Tensor, "1 tokens"], str]:
        """The tokens that open every text-only prompt, and the text that closes it."""
        one, two = (self.collator.prompts([Sample.ask(word, "?")])["input_ids"][0].tolist() for word in ("yes", "12"))
        head, tail = _common(one, two), _common(one[::-1], two[::-1])[::-1]
        if not head:
            raise UserError("generative_replay: this chat template opens a prompt with nothing that could be gone on with. Take it out.")
        return torch.tensor([head]), self.collator.tokenizer.decode(tail).strip()

    def _base(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        try:
            return self.method.base_model(model)
        except UserError:  # it trains the base's own weights, in which no step was taken yet
            return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """The conversations, as the bytes of a JSON text."""
        if not self.samples:
            return {}
        text = json.dumps([[sample.question, sample.answer] for sample in self.samples])
        return {"conversations": torch.tensor(list(text.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts them back."""
        pairs = json.loads(bytes(state["conversations"].tolist())) if state else []
        self.samples = [_sample(number, *pair) for number, pair in enumerate(pairs)]


def _sample(number: int, question: str, answer: str) -> Sample:
    return Sample.ask(question, answer, id=f"{NAME}/{number}", origin=NAME)


def _request(text: str, closing: str) -> str:
    """The first line of `text`, without the header of an answer that the model went on to."""
    first = text.split("\n")[0]
    return (first.split(closing)[0] if closing else first).strip()


def _plain(text: str, tokenizer: Any) -> str:
    """`text` without what would be read as a special token or an image."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for word in (PLACEHOLDER, *sorted(special | set(tokenizer.all_special_tokens))):
        text = text.replace(word, "")
    return text.strip()


def _endings(model: Any, tokenizer: Any) -> set[int]:
    return set(_ids(model.generation_config.eos_token_id)) | set(_ids(tokenizer.eos_token_id))


def _ids(found: int | list[int] | None) -> Iterator[int]:
    yield from [] if found is None else [found] if isinstance(found, int) else found


def _common(one: list[int], two: list[int]) -> list[int]:
    """The items both begin with."""
    same = next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:same]
