"""Where the time of a training step and of an evaluation goes, and what each part of the pipeline saves.

The parts are measured on the embedded model, or another ComposedVLM, with real pictures. Forms: ``before`` makes each batch when it is
wanted, all logits, and encodes every image; ``logits`` makes only those that somebody reads; ``ahead`` makes batches in a thread;
``images`` finds the features of the frozen encoder on disk (they were put there before); ``all`` does all three, as a run with
``cache_images`` does. Each form trains the same LoRA, or gives the same answers, from the same start; the forms take turns in each repeat.

Processor time is that of the whole process (of a part: of the thread that does it), which other load on the machine hardly changes; run it
with one thread. ``ahead`` saves none: it saves wall time, where a second core is free.

    python benchmarks/pipeline.py --threads 1 --out pipeline.json      # prints the tables of docs/pipeline.md
"""

import argparse
import contextlib
import functools
import io
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from alula import METHODS, Collator, Sample, Stream, Task, Trainer, TrainSettings, load_model, load_task
from alula.evaluation.evaluate import evaluate_task
from alula.files import read_jsonl, write_json
from alula.models.composed import ComposedVLM
from alula.models.image_cache import cache_images

FORMS = {"before": set(), "logits": {"logits"}, "ahead": {"ahead"}, "images": {"images"}, "all": {"logits", "ahead", "images"}}
PARTS = ("collation", "encoder", "decoder", "head", "backward", "optimizer", "writing", "the rest")
Row = dict[str, Any]


class Watch:
    """Processor seconds by part, each in the thread that works on it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, part: str, function: Callable) -> Callable:
        """`function`, timed."""

        @functools.wraps(function)  # `generate` looks at signatures
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.thread_time() - start

        return timed

    def modules(self, part: str, *modules: nn.Module) -> None:
        """Times their forwards."""
        starts: list[float] = []

        def begin(*_: Any) -> None:
            starts.append(time.thread_time())

        def end(*_: Any) -> None:
            self.seconds[part] += time.thread_time() - starts.pop()

        for module in modules:
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)

    def model(self, model: Any) -> None:
        """The forwards of a `ComposedVLM`'s parts; reading features from disk counts as the encoder's."""
        model.get_image_features = self.wrap("encoder", model.get_image_features)
        self.modules("decoder", model.get_decoder())
        self.modules("head", model.get_output_embeddings())

    def collator(self, processor: Any) -> Collator:
        """A collator whose every kind of batch is timed."""
        watch = self

        class Watched(Collator):
            def _encode(self, *args: Any, **kwargs: Any) -> Any:
                return watch.wrap("collation", super()._encode)(*args, **kwargs)

        return Watched(processor)


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """A block in which only what `name` has is at work (but for the images, which are the model's)."""
    with contextlib.ExitStack() as stack:
        if "logits" not in FORMS[name]:
            for place in ("alula.methods.base", "alula.evaluation.ranking"):
                stack.enter_context(patch(f"{place}.keeping", lambda model, number: {}))
            stack.enter_context(patch.object(ComposedVLM, "_supports_logits_to_keep", lambda self: False))
        if "ahead" not in FORMS[name]:
            for place in ("alula.training.order", "alula.evaluation.evaluate"):
                stack.enter_context(patch(f"{place}.made_ahead", lambda make, keys: (make(key) for key in keys)))
        yield


def enlarged(samples: Sequence[Sample], side: int) -> list[Sample]:
    """The samples with their pictures as JPEG files of `side` x `side` pixels in memory."""
    found = []
    for sample in samples:
        files = []
        for image in sample.open_images():
            out = io.BytesIO()
            image.resize((side, side)).save(out, format="JPEG")
            files.append(out.getvalue())
        found.append(replace(sample, images=tuple(files)))
    return found


def make_tasks(options: argparse.Namespace) -> dict[str, Task]:
    """What is learnt, and one task for each kind of scoring."""
    learnt = load_task(options.task, train_size=max(8, options.steps * options.batch_size // 2), test_size=options.samples)
    answers = sorted({sample.answer for sample in learnt.train})[:4]
    test = enlarged(learnt.test, options.side) if options.side else list(learnt.test)
    ranked = [replace(sample, options=tuple(dict.fromkeys([*answers, sample.answer]))) for sample in test]
    return {
        "train": replace(learnt, train=enlarged(learnt.train, options.side) if options.side else learnt.train),
        "generated": Task(name="generated", train=[], test=test, max_new_tokens=learnt.max_new_tokens),
        "ranked": Task(name="ranked", train=[], test=ranked, scoring="ranked"),
        "prose": load_task("prose", train_size=0, test_size=options.samples),
    }


def prepared(name: str, tasks: dict[str, Task], options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The model of a form; its features are on disk already."""
    model, processor = load_model(options.model)
    model.requires_grad_(False)
    if "images" in FORMS[name]:
        cache_images(model, folder)
        samples = {sample.id: sample for task in tasks.values() for sample in (*task.train, *task.test) if sample.images}
        collator = Collator(processor)
        with torch.no_grad():
            for sample in samples.values():
                model.get_image_features(collator([sample])["pixel_values"])
    return model, processor


def measured(work: Callable[[], Any], watch: Watch, *, count: int) -> Row:
    """Milliseconds of one of `count` units, by part."""
    watch.seconds.clear()
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    spent = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    parts = {part: watch.seconds[part] for part in PARTS[:-1]}
    parts["the rest"] = spent["cpu"] - sum(parts.values())
    return {"found": found, "parts": {part: 1e3 * value / count for part, value in parts.items()}} | {
        kind: 1e3 * value / count for kind, value in spent.items()
    }


def train(name: str, tasks: dict[str, Task], options: argparse.Namespace, cache: Path) -> Row:
    """Steps of one form, each in milliseconds; found are the losses."""
    model, processor = prepared(name, tasks, options, cache)
    settings = TrainSettings(steps=options.steps, batch_size=options.batch_size, learning_rate=1e-4)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, form(name):
        method = METHODS["finetune"](model, settings=settings, rank=8)
        trainer = Trainer(model, method, watch.collator(processor), settings=settings, folder=Path(folder))
        watch.model(model)
        trainer.accelerator.backward = watch.wrap("backward", trainer.accelerator.backward)  # type: ignore[method-assign]
        trainer.log.append = watch.wrap("writing", trainer.log.append)  # type: ignore[method-assign]
        trainer.archive.save = watch.wrap("writing", trainer.archive.save)  # type: ignore[method-assign]

        def work() -> list[float]:
            list(trainer.learn(Stream(tasks=(tasks["train"],))))
            return [row["loss"] for row in read_jsonl(Path(folder) / "losses.jsonl")]

        with patch.object(torch.optim.AdamW, "step", watch.wrap("optimizer", torch.optim.AdamW.step)):
            return measured(work, watch, count=options.steps)


def score(name: str, tasks: dict[str, Task], options: argparse.Namespace, cache: Path) -> dict[str, Row]:
    """Each kind of scoring in one form, a sample in milliseconds; found are outputs or bits."""
    model, processor = prepared(name, tasks, options, cache)
    watch = Watch()
    collator = watch.collator(processor)
    watch.model(model)

    def work(task: Task) -> list[Any]:
        found = evaluate_task(model, collator, task, batch_size=options.batch_size * 2)
        return [row.output if row.loss_bits is None else row.loss_bits for row in found]

    with form(name):
        return {
            kind: measured(lambda kind=kind: work(tasks[kind]), watch, count=len(tasks[kind].test))  # type: ignore[misc]
            for kind in ("generated", "ranked", "prose")
        }


def check_same(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Forms give the same answers; numbers up to the last bits of fp32 sums."""
    for kind, row in found.items():
        for one, two in zip(row["found"], other[kind]["found"], strict=True):
            is_same = math.isclose(one, two, rel_tol=1e-3) if isinstance(one, float) else one == two
            assert is_same, f"{kind}: {one} and {two}"


def run(options: argparse.Namespace) -> dict[str, dict[str, list[Row]]]:
    """For each kind of work and form, a row per repeat."""
    tasks, found = make_tasks(options), defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as cache:
        for repeat in range(options.repeats):
            first: dict[str, Any] = {}
            for name in FORMS if repeat % 2 == 0 else reversed(FORMS):
                rows = {"train": train(name, tasks, options, Path(cache)), **score(name, tasks, options, Path(cache))}
                first = first or rows
                check_same(rows, first)
                for kind, row in rows.items():
                    found[kind][name].append({key: value for key, value in row.items() if key != "found"})
    return {kind: dict(forms) for kind, forms in found.items()}


def tables(found: dict[str, dict[str, list[Row]]]) -> str:
    """Markdown: processor time by part before and after, and each form as a ratio to ``before``."""
    units = {"train": "training, a step", "generated": "generation, a sample", "ranked": "ranking, a sample", "prose": "prose, a sample"}

    def middle(rows: list[Row], *path: str) -> float:
        values: list[Any] = rows
        for key in path:
            values = [value[key] for value in values]
        return statistics.median(values)

    lines = [f"| ms of processor time | | {' | '.join(PARTS)} | all |", f"|---|---|{'---:|' * (len(PARTS) + 1)}"]
    for kind, forms in found.items():
        for name in ("before", "all"):
            cells = [f"{middle(forms[name], 'parts', part):.1f}" for part in PARTS] + [f"{middle(forms[name], 'cpu'):.1f}"]
            lines.append(f"| {units[kind]} | {'before' if name == 'before' else 'after'} | {' | '.join(cells)} |")
    others = [name for name in FORMS if name != "before"]
    lines += ["", f"| as a ratio to before | {' | '.join(others)} |", f"|---|{'---:|' * len(others)}"]
    for kind, forms in found.items():
        for measure, label in (("cpu", "processor time"), ("wall", "wall time")):
            cells = [f"{middle(forms[name], measure) / middle(forms['before'], measure):.3f}" for name in others]
            lines.append(f"| {units[kind]}, {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol", help="smol or a folder with a ComposedVLM")
    parser.add_argument("--task", default="easy_vqa", help="a built-in task with pictures")
    parser.add_argument("--side", type=int, default=0, help="pictures as JPEG of so many pixels a side; 0: as the task has them")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4, help="of training; scoring takes twice as many rows")
    parser.add_argument("--samples", type=int, default=16, help="scored, per kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = run(options)
    print(tables(found))
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key != "out"}
        write_json(options.out, {"rows": found, **sizes, "torch": torch.__version__})


if __name__ == "__main__":
    main()
