"""Answers of a live model, one at a time, piece by piece, each with who gave it. It knows no HTTP."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.errors import UserError, nearest
from alula.evaluation.generation import ending_tokens, on_device
from alula.running.learn import Opened
from alula.serving.choosing import Shares, ways
from alula.serving.images import packed
from alula.serving.limits import Limits, RequestError
from alula.serving.marks import Marks
from alula.serving.text import Pieces

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be answered, and how.

    Attributes:
        sample: its images are the bytes of files.
        model: one of `Answerer.models`.
        new_tokens: tokens of the answer; None for the server's limit.
        temperature: 0 is greedy.
        top_p: the share of probability that is drawn from.
        stops: texts before which the answer ends.
    """

    sample: Sample
    model: str
    new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of an answer.

    Attributes:
        reason: ``stop``, or ``length`` where tokens or time ran out.
        experts: mean weight of each expert, and of the base model, over tokens of prompt and answer and over sites.
    """

    reason: str
    prompt_tokens: int
    answer_tokens: int
    experts: dict[str, float]


@dataclass(kw_only=True, eq=False)
class Job:
    """One question on its way: queued, begun, ended or given up."""

    question: Question
    deadline: float
    given_up: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    items: asyncio.Queue[str | Ended | RequestError] = field(default_factory=asyncio.Queue)
    future: Future | None = None

    def give_up(self) -> None:
        """Ends the generation after its present token, or takes it out of the queue."""
        self.given_up.set()
        if self.future is not None and self.future.cancel():
            self.items.put_nowait(RequestError(503, "The request was given up.", code="cancelled"))

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for more."""
        return self.given_up.is_set() or time.monotonic() > self.deadline


class Answerer:
    """A model, its experts and a queue before them.

    Args:
        name: what the pool (or the model) is called in requests.
    """

    def __init__(self, opened: Opened, *, name: str, limits: Limits) -> None:
        self.opened, self.limits = opened, limits
        self.models = ways(opened, name)
        self._collator, self._marks = Collator(opened.processor), Marks(opened.processor)
        self._device = next(opened.model.parameters()).device
        self._most: int | None = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="alula-answers")
        self._jobs: set[Job] = set()

    @property
    def num_jobs(self) -> int:
        """Questions that are being answered or wait."""
        return len(self._jobs)

    def check_room(self) -> None:
        """Refuses a question where too many wait already.

        Raises:
            RequestError: 429.
        """
        if self.num_jobs > self.limits.max_waiting:
            message = f"{self.num_jobs} requests are being answered or wait. Try again later."
            raise RequestError(429, message, code="queue_full")

    def ask(self, question: Question) -> Job:
        """Queues a question.

        Raises:
            RequestError: 404, no such model or expert; 429, the queue is full; 400, more tokens than the limit.
        """
        if question.model not in self.models:
            message = f"No model '{question.model}' here. {nearest(question.model, self.models)}"
            raise RequestError(404, message, code="model_not_found", param="model")
        if question.new_tokens is not None and question.new_tokens > self.limits.max_new_tokens:
            message = f"{question.new_tokens} tokens are asked for; {self.limits.max_new_tokens} are allowed. Ask for fewer."
            raise RequestError(400, message, code="invalid_value", param="max_tokens")
        self.check_room()
        loop = asyncio.get_running_loop()
        job = Job(question=question, deadline=time.monotonic() + self.limits.timeout)
        self._jobs.add(job)
        job.future = self._worker.submit(self._run, job, lambda item: loop.call_soon_threadsafe(job.items.put_nowait, item))
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._jobs.discard, job))
        return job

    async def follow(self, job: Job) -> AsyncGenerator[str | Ended, None]:
        """The pieces of an answer as they come, then its end. Left early, it gives the job up.

        Raises:
            RequestError: 400, the model cannot take the conversation; 503, its turn did not come in time; 500, it failed.
        """
        try:
            while True:
                item = await self._next(job)
                if isinstance(item, RequestError):
                    raise item
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            job.give_up()

    def close(self) -> None:
        """Gives every job up and waits for the present token."""
        for job in list(self._jobs):
            job.give_up()
        self._worker.shutdown(cancel_futures=True)

    async def _next(self, job: Job) -> str | Ended | RequestError:
        while not job.begun.is_set():
            try:
                return await asyncio.wait_for(job.items.get(), max(0.01, job.deadline - time.monotonic()))
            except TimeoutError:
                if not job.begun.is_set():
                    return RequestError(503, f"No answer began within {self.limits.timeout:g} s. Try again later.", code="timeout")
        return await job.items.get()

    def _run(self, job: Job, tell: Callable[[str | Ended | RequestError], object]) -> None:
        """The worker's part: whatever happens, the one who asked is told."""
        job.begun.set()
        try:
            tell(self._generate(job, tell))
        except UserError as error:
            tell(RequestError(400, str(error), code="invalid_value", param="messages"))
        except RequestError as error:
            tell(error)
        except Exception:  # the server must go on, and the caller must not wait for ever
            log.exception("A request failed.")
            tell(RequestError(500, "The model failed on this request; the server's log says more.", code="internal_error"))

    @torch.no_grad()
    def _generate(self, job: Job, tell: Callable[[str], object]) -> Ended:
        question, model, tokenizer = job.question, self.opened.model, self._collator.tokenizer
        prompt = self._prompt(question)
        size = prompt["input_ids"].shape[1]
        room = min(self.limits.max_new_tokens, self._most - size) if self._most else self.limits.max_new_tokens
        watcher = _Watcher(job, tokenizer, size, tell)
        shares = Shares(self.opened.mixtures)
        torch.manual_seed(secrets.randbits(63) if question.seed is None else question.seed)
        with ExitStack() as around:
            around.enter_context(self.models[question.model]())
            if self.opened.mixtures is not None:
                around.enter_context(self.opened.mixtures.director.recording(recorder=shares))
            whole = model.generate(
                **prompt,
                max_new_tokens=question.new_tokens or room,
                stopping_criteria=StoppingCriteriaList([watcher]),
                pad_token_id=tokenizer.pad_token_id,
                **_sampling(question),
            )
        said = whole[0, size:].tolist()
        last = watcher.pieces.grow(tokenizer.decode(said, skip_special_tokens=True), is_last=True)
        if last:
            tell(last)
        is_whole = watcher.pieces.is_stopped or not ending_tokens(model, tokenizer).isdisjoint(said)
        experts = {} if self.opened.learners is not None else shares.mean()
        return Ended(reason="stop" if is_whole else "length", prompt_tokens=size, answer_tokens=len(said), experts=experts)

    def _prompt(self, question: Question) -> dict[str, Tensor]:
        """The prompt's batch of one.

        Raises:
            RequestError: 400, prompt and answer are longer than the model can read, or a text holds a mark of the model's own.
        """
        most, wanted = self._most, question.new_tokens or 1
        letters = sum(len(message.content) for message in question.sample.prompt)
        if most and letters > 64 * most:  # refused without reading it: no tokenizer makes so few tokens of so much text
            message = f"The conversation has {letters:,} characters; the model reads {most:,} tokens. Shorten it."
            raise RequestError(400, message, code="context_length_exceeded", param="messages")
        if mark := self._marks.first_in(question.sample):
            message = f"'{mark}' in a text is one of this model's own marks, which tell turns and images apart. Write it otherwise."
            raise RequestError(400, message, code="invalid_value", param="messages")
        unpacking = replace(question.sample, images=tuple(map(packed, question.sample.image_bytes())))
        prompt = on_device(self._collator.prompts([unpacking]), self._device)
        size = prompt["input_ids"].shape[1]
        if most and size + wanted > most:
            message = f"The conversation has {size:,} tokens and {wanted:,} are to come; the model reads {most:,}. Shorten it."
            raise RequestError(400, message, code="context_length_exceeded", param="messages")
        return prompt


class _Watcher(StoppingCriteria):
    """Sees every new token: tells what is certain of the text, and stops when there is a reason to."""

    def __init__(self, job: Job, tokenizer: Any, prompt_size: int, tell: Callable[[str], object]) -> None:
        self.pieces = Pieces(job.question.stops)
        self._job, self._tokenizer, self._prompt_size, self._tell = job, tokenizer, prompt_size, tell

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        said = self._tokenizer.decode(input_ids[0, self._prompt_size :], skip_special_tokens=True)
        piece = self.pieces.grow(said)
        if piece:
            self._tell(piece)
        is_over = self.pieces.is_stopped or self._job.is_over
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)


def _sampling(question: Question) -> dict[str, Any]:
    if not question.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": question.temperature, "top_p": question.top_p, "top_k": 0}
