"""lm-evaluation-harness on a live model: text tasks and image tasks, each request routed as it would be for a user."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.utils import replace_placeholders
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from alula.data.sample import PLACEHOLDER
from alula.errors import UserError
from alula.evaluation.generation import Around, untouched
from alula.evaluation.harnesses.names import check_names

IGNORED = -100
FEWSHOT_SEED = 1234
"""lm-eval's own: the same examples are shown as by its command line."""


class LiveModel(HFMultimodalLM):
    """A model that is in memory already, with whatever is attached to it, as lm-eval wants its models.

    Its numbers are those of lm-eval's own ``hf`` and ``hf-multimodal`` classes, which load a copy from a folder. Beyond
    them: options of image tasks can be ranked, one call may mix requests with and without images, and a prompt that does
    not fit is an error where ``hf-multimodal`` cuts image tokens off.

    Args:
        processor: the model's; its chat template is used where lm-eval is asked to apply one.
        around: gives a context for each batch, entered around its forward; the batch's labels mark what is scored, so
            that experts are chosen by the prompt alone. Generation needs none: experts are chosen as it begins.
        batch_size: requests in one forward.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, around: Around = untouched, batch_size: int = 8) -> None:
        self.around = around
        super().__init__(model, tokenizer=processor, batch_size=batch_size)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it, with the template's own mark for each image."""
        self.chat_applied = True
        turns = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in chat_history]
        # The tokenizer's method, not the processor's: SmolVLM's touches a video processor that may be absent.
        return self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_batch_multimodal_encode(
        self,
        strings: Sequence[str],
        images: Sequence[Sequence[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> dict[str, Tensor]:
        """Prompts with their images as one padded batch.

        Raises:
            UserError: longer than the model allows; a prompt with images cannot be cut.
        """
        if not self.chat_applied:
            strings = [replace_placeholders(text, PLACEHOLDER, self.image_token, self.max_images) for text in strings]
        before, self.tokenizer.padding_side = self.tokenizer.padding_side, padding_side
        try:
            # images as one list a row, which all processors read
            rows = [[image.convert("RGB") for image in row] for row in images]
            made = self.processor(text=list(strings), images=rows, padding=True, return_tensors="pt", **self._opening(strings))
        finally:
            self.tokenizer.padding_side = before
        width, most = made["input_ids"].shape[1], left_truncate_len or self.max_length
        if width > most:
            raise UserError(f"A prompt with images has {width} tokens; {most} are allowed. Use fewer examples, or smaller images.")
        return dict(made.to(self.device, self.model.dtype))

    def _opening(self, strings: Sequence[str]) -> dict[str, bool]:
        """No second <bos> before a text that has one (from its chat template)."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in strings) else {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether greedy decoding would say it."""
        return self._split(requests, super().loglikelihood, self._loglikelihood_with_images, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, up to its first stop string."""
        return self._split(requests, super().generate_until, super().generate_until, disable_tqdm)

    def _split(self, requests: Sequence[Instance], on_text: Any, on_images: Any, disable_tqdm: bool) -> list[Any]:
        """Answers in the order of `requests`; their classes look at the first request alone to see whether all have images."""
        found: dict[int, Any] = {}
        for has_images, answer in ((False, on_text), (True, on_images)):
            places = [i for i, request in enumerate(requests) if bool(_images(request)) == has_images]
            chosen = [requests[i] if has_images else _without_images(requests[i]) for i in places]
            found |= dict(zip(places, answer(chosen, disable_tqdm=disable_tqdm) if chosen else [], strict=True))
        return [found[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}  # options of one token share a forward
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(f"A continuation has {len(continuation)} tokens; the model reads {self.max_length}. Leave this task out.")
            fed = (context + continuation)[-(self.max_length + 1) : -1]
            rows.setdefault((tuple(fed), len(continuation)), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(rows, key=lambda row: -len(row[0]))
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in _slices(order, override_bs or self.batch_size):
                logits = self._logits(*_padded([row for row, _ in batch], [count for _, count in batch], device=self.device))
                for row, (fed, count) in zip(logits, batch, strict=True):
                    logs = row[len(fed) - count : len(fed)].float().log_softmax(-1)
                    for i in rows[fed, count]:
                        found[i] = _cost(logs, torch.tensor(requests[i][2], device=logs.device))
                    bar.update(len(rows[fed, count]))
        return [found[i] for i in range(len(requests))]

    def _loglikelihood_with_images(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for batch in tqdm(list(_slices(requests, self.batch_size)), desc="loglikelihood with images", disable=disable_tqdm):
            contexts = [request.args[0].rstrip() for request in batch]
            wholes = [request.args[0] + request.args[1] for request in batch]
            images = [_images(request) for request in batch]
            heads = self.tok_batch_multimodal_encode(contexts, images, "right")["attention_mask"].sum(-1).tolist()
            inputs = self.tok_batch_multimodal_encode(wholes, images, "right")
            ends = inputs["attention_mask"].sum(-1).tolist()
            labels = torch.full_like(inputs["input_ids"], IGNORED)
            for label, ids, head, end in zip(labels, inputs["input_ids"], heads, ends, strict=True):
                label[head:end] = ids[head:end]
            logits = self._logits(inputs, labels)
            for row, label, head, end in zip(logits, labels, heads, ends, strict=True):
                found.append(_cost(row[head - 1 : end - 1].float().log_softmax(-1), label[head:end]))
        return found

    @torch.no_grad()
    def _logits(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """batch x tokens x vocab, routed by what precedes the labels."""
        with self.around({**inputs, "labels": labels}):
            return self.model(**inputs).logits


def run_tasks(
    model: LiveModel,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """What ``lm_eval.evaluate`` returns: results, configurations, versions, numbers of samples, and every sample.

    Args:
        tasks: names of tasks, groups or tags; those of `include_path` come first, then lm-eval's own.
        include_path: a folder of task files (YAML).
        num_fewshot: examples before each question; None is the task's own number, 0 where it has none.
        chat_template: writes each prompt as a conversation. lm-eval's default is not to.
        limit: samples per task; None for all.

    Raises:
        UserError: an unknown task, or one whose data cannot be had.
    """
    found = _manager(tasks, include_path)
    try:
        loaded = found.load(list(tasks))
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(
            f"The data of {', '.join(tasks)} cannot be loaded: {error} Check the task's dataset_path and your network, or write a "
            "task file over local files and name its folder with --include-path."
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 keeps it, as in lm-eval's command line
            task.set_config(key="num_fewshot", value=num_fewshot if num_fewshot is not None else own or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit, apply_chat_template=chat_template)


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """The table of tasks; lm-eval's thousands of own ones are read only if they are asked for."""
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    check_names(tasks, manager.all_tasks, harness="lm-eval", include_path=include_path)
    return manager


def _images(request: Instance) -> list[Any]:
    return list(request.args[2].get("visual") or []) if len(request.args) > 2 else []


def _without_images(request: Instance) -> Instance:
    if len(request.args) < 3:
        return request
    metadata = (request.task_name, request.doc_id, request.repeats)
    return Instance(request.request_type, request.doc, request.args[:2], request.idx, metadata)


def _parts(content: str) -> list[dict[str, str]]:
    """The typed parts of a text with ``<image>`` in it."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(content.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _padded(rows: Sequence[Sequence[int]], counts: Sequence[int], *, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids padded on the right, and labels on what is scored of them: the last ``count - 1`` (the very last is not fed)."""
    shape = (len(rows), max(map(len, rows)))
    ids, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, len(row) - count + 1 : len(row)] = ids[i, len(row) - count + 1 : len(row)]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)


def _slices(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _cost(logs: Tensor, targets: Tensor) -> tuple[float, bool]:
    """Log-probabilities (tokens x vocab) and the tokens that came: their sum, and whether each was the likeliest."""
    return float(logs.gather(-1, targets[:, None]).sum()), bool((logs.argmax(-1) == targets).all())
