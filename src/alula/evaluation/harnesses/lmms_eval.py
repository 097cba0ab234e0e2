"""lmms-eval on a live model: its image and text tasks, each question asked as a conversation and routed by itself."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from alula.data.collate import Collator
from alula.data.sample import PLACEHOLDER, Sample
from alula.errors import UserError
from alula.evaluation.generation import Around, generate_answers, untouched
from alula.evaluation.harnesses.names import check_names
from alula.models import load_model
from alula.pool import Pool

MAX_NEW_TOKENS = 128
"""Where a task names no number."""


class LiveModel(lmms):
    """A model that is in memory already, with whatever is attached to it, as lmms-eval wants its models.

    Answers are greedy, and ranked tasks are refused: lmms-eval's own image tasks generate.

    Args:
        around: gives a context for each batch, entered around `generate`.
        batch_size: questions in one forward.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, around: Around = untouched, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.around, self.batch_size_per_gpu = model, around, batch_size
        self.collator = Collator(processor)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, up to its first stop string.

        Raises:
            UserError: a task samples its answers, or shows something else than images.
        """
        order = sorted(range(len(requests)), key=lambda i: (repr(sorted(requests[i].args[1].items())), -len(requests[i].args[0])))
        answers: dict[int, str] = {}
        for _, group in groupby(order, key=lambda i: repr(sorted(requests[i].args[1].items()))):
            places = list(group)
            for start in range(0, len(places), self.batch_size_per_gpu):
                batch = places[start : start + self.batch_size_per_gpu]
                answers |= dict(zip(batch, self._answers([requests[i] for i in batch]), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _answers(self, requests: Sequence[Instance]) -> list[str]:
        options = requests[0].args[1]
        if options.get("do_sample") or options.get("num_beams", 1) not in (None, 1):
            raise UserError(f"The task {requests[0].task_name} asks for {options}; answers are greedy here. Change its generation_kwargs.")
        until = options.get("until") or ()
        said = generate_answers(
            self.model,
            self.collator,
            [self._sample(request) for request in requests],
            max_new_tokens=options.get("max_new_tokens") or MAX_NEW_TOKENS,
            device=self.device,
            around=self.around,
        )
        return [_cut(text, [until] if isinstance(until, str) else until) for text, _ in said]

    def _sample(self, request: Instance) -> Sample:
        """The question of a request with its images before it, or where it marks them."""
        text, _, visuals_of, doc_id, task, split = request.args
        found = visuals_of(self.task_dict[task][split][doc_id])
        visuals = found if isinstance(found, list | tuple) else [] if found is None else [found]
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise UserError(f"The task {task} shows a {type(visual).__name__}; images are accepted. Choose a task of images or text.")
        if text.count(PLACEHOLDER) == len(visuals) > 0:
            sample = Sample.ask(text.replace(PLACEHOLDER, ""), "?", id=f"{task}:{doc_id}")
            asked = replace(sample.messages[0], content=text)
            return replace(sample, messages=(asked, *sample.messages[1:]), images=tuple(visuals))
        return Sample.ask(text.replace(PLACEHOLDER, "").strip(), "?", images=tuple(visuals), id=f"{task}:{doc_id}")

    def clean(self) -> None:
        """Keeps the model, where lmms-eval would drop it: it is the caller's."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError("lmms-eval's ranked tasks are not supported. Rank options with --harness lm-eval, or with alula's own tasks.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError("Tasks of several rounds are not supported. Choose a task of one question and one answer.")


class PoolModel(LiveModel):
    """What ``lmms-eval --model alula --model_args pool=my-pool`` makes: a pool, or with ``model=`` a model as it is."""

    def __init__(
        self, pool: str | None = None, model: str | None = None, batch_size: int | str = 1, device: str | None = None, **rest: Any
    ) -> None:
        if pool is None and model is None:
            raise UserError("--model_args names neither a pool nor a model. Give pool=FOLDER or model=NAME.")
        if unknown := {name for name, value in rest.items() if value is not None}:
            raise UserError(f"--model_args has unknown keys: {', '.join(sorted(unknown))}. Known: pool, model, batch_size, device.")
        opened = Pool.open(pool) if pool else None
        found, processor = load_model(model or opened.base, device=device)  # type: ignore[union-attr]
        mixtures = opened.attach(found) if opened else None
        if opened is not None:
            opened.attach_learners(found)
        super().__init__(found, processor, around=mixtures.director.on_prompts if mixtures else untouched, batch_size=int(batch_size))


def manifests() -> ModelManifest:
    """What the entry point ``lmms_eval.models`` gives lmms-eval: the name ``alula``."""
    return ModelManifest(model_id="alula", simple_class_path=f"{PoolModel.__module__}.{PoolModel.__name__}")


def run_tasks(
    model: LiveModel, tasks: Sequence[str], *, include_path: Path | None = None, limit: int | None = None, **unused: Any
) -> dict[str, Any]:
    """What ``lmms_eval.evaluator.simple_evaluate`` returns.

    Args:
        include_path: a folder of task files (YAML).
        limit: samples per task; None for all.

    Raises:
        UserError: an unknown task, or an option that this harness does not have.
    """
    if given := sorted(name for name, value in unused.items() if value):
        raise UserError(f"{', '.join(given)} came; lmms-eval has no such option here. Leave it out.")
    manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=include_path is None)
    check_names(tasks, manager.all_tasks, harness="lmms-eval", include_path=include_path)
    found = evaluator.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, batch_size=model.batch_size_per_gpu, limit=limit, device=str(model.device)
    )
    samples = {task: [_as_lm_eval(sample) for sample in rows] for task, rows in found.get("samples", {}).items()}
    return {**found, "samples": samples}


def _as_lm_eval(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample in the form of the older harness: its metrics by name, and one tuple of arguments."""
    metrics = [name for name, value in sample.items() if isinstance(value, int | float) and name != "doc_id"]
    return {**sample, "arguments": [tuple(sample["arguments"])], "filter": "none", "metrics": metrics}


def _cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first of the strings that end it."""
    return text[: min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=len(text))].strip()
