"""What the trainer's step costs more than the same forward, backward and optimizer step in a bare PyTorch loop.

The bare loop takes the same batches through the same model (LoRA by `attach`) and nothing else: no clipping, no gradient
norm, no log, no schedule. The trainer does all that a user's run does, losses.jsonl included. A step lasts from the start of
one forward to the start of the next, so that all that happens between two forwards counts; what is done once a task
(optimizer, checkpoint) does not. Both take turns within each repeat. The losses must agree to one part in 100,000: the trainer
leaves out the logits that no target needs, which a bare loop has all of, and matrix products of other sizes round otherwise. The
bare loop runs twice per repeat: its ratio to itself is what this machine's noise alone does.

    python benchmarks/trainer.py --out docs/trainer_speed.json
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from small_vlm import make_model, make_processor
from torch import Tensor, nn

from alula import Collator, Sample, Stream, Task, Trainer, TrainSettings
from alula.files import read_jsonl, write_json
from alula.methods import Finetune
from alula.objectives.next_token import next_token_loss
from alula.training.order import Steps
from alula.training.trainable import set_modes, trainable

FORMS = ("bare", "trainer", "bare_again")
LIMIT = 1.05
TOLERANCE = 1e-5
Batch = dict[str, Tensor]
Collate = Callable[[list[Sample]], Batch]
Found = tuple[dict[str, list[float]], list[float]]


class Clock:
    """Wall and processor time at the start of each forward."""

    def __init__(self, model: nn.Module) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        model.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, args: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def steps(self) -> dict[str, list[float]]:
        """The length of each step but the last, whose end no forward marks; and the first, which warms up."""
        found = {"wall": self.wall, "cpu": self.cpu}
        return {kind: [after - before for before, after in pairwise(times[1:])] for kind, times in found.items()}


def make_task(size: int, words: int) -> Task:
    """Squares of one colour each, with a question of about `words` words; every row is equally long."""
    colours = [(20 * (i % 12), 255 - 20 * (i % 11), 10 * (i % 25)) for i in range(size)]
    asked = " ".join(["what is the colour of the square ?"] * max(1, words // 8))
    samples = [
        Sample.ask(asked, f"{colour[0]:03d} {colour[1]:03d}", images=(Image.new("RGB", (96, 96), colour),), id=str(i))
        for i, colour in enumerate(colours)
    ]
    return Task(name="colours", train=samples, test=[])


def prepared(collate: Collate, task: Task, settings: TrainSettings) -> tuple[list[list[Sample]], Collate]:
    """The samples of each step in the trainer's order, and a collator that only hands out batches made before."""
    steps = Steps(
        task.train, collate, batch_size=settings.batch_size, micro_batch_size=None, seed=settings.seed, task=task.name, stage="train"
    )
    chosen = [[task.train[index] for index in steps.indices(step)] for step in range(settings.steps)]
    made = {tuple(sample.id for sample in samples): collate(samples) for samples in chosen}
    return chosen, lambda samples: made[tuple(sample.id for sample in samples)]


def fresh(options: argparse.Namespace, settings: TrainSettings) -> tuple[nn.Module, Finetune]:
    """The model with one new LoRA expert; the same values every time."""
    model = make_model(hidden=options.hidden, num_layers=options.layers)
    return model, Finetune(model, settings=settings, rank=options.rank)


def run_bare(options: argparse.Namespace, settings: TrainSettings, chosen: list[list[Sample]], collate: Collate) -> Found:
    """The bare loop: step lengths and losses."""
    model, method = fresh(options, settings)
    method.mixtures.train_expert("shared")
    set_modes(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    clock, losses = Clock(model), []
    for samples in chosen:
        batch = collate(samples)
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        loss = next_token_loss(logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return clock.steps(), [float(loss) for loss in losses]


def run_trainer(options: argparse.Namespace, settings: TrainSettings, task: Task, collate: Collate) -> Found:
    """The trainer, in a folder as always: step lengths and losses."""
    model, method = fresh(options, settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, method, collate, settings=settings, folder=Path(folder))  # type: ignore[arg-type]
        clock = Clock(model)
        list(trainer.learn(Stream(tasks=(task,))))
        return clock.steps(), [row["loss"] for row in read_jsonl(Path(folder) / "losses.jsonl")]


def compare(options: argparse.Namespace, *, with_loading: bool) -> dict[str, Any]:
    """One row of the table: each form's step as a ratio to the bare one's, median over repeats of medians over steps."""
    settings = TrainSettings(
        steps=options.steps, batch_size=options.batch_size, learning_rate=1e-3, schedule="constant", warmup_ratio=0, gradient_clip=None
    )
    task, collator = make_task(options.batch_size * options.steps // 2 or 1, options.words), Collator(make_processor())
    chosen, from_memory = prepared(collator, task, settings)
    collate = collator if with_loading else from_memory
    ratios: dict[str, dict[str, list[float]]] = {form: {"wall": [], "cpu": []} for form in FORMS[1:]}
    for repeat in range(options.repeats):
        lengths = {}
        losses = {}
        for form in FORMS if repeat % 2 else FORMS[::-1]:
            if form == "trainer":
                lengths[form], losses[form] = run_trainer(options, settings, task, collate)
            else:
                lengths[form], losses[form] = run_bare(options, settings, chosen, collate)
        assert losses["bare"] == losses["bare_again"], f"the bare loop differs from itself: {losses}"
        agree = (math.isclose(one, two, rel_tol=TOLERANCE) for one, two in zip(losses["trainer"], losses["bare"], strict=True))
        assert all(agree), f"losses differ: {losses}"
        for form, found in ratios.items():
            for kind, kept in found.items():
                kept.append(statistics.median(lengths[form][kind]) / statistics.median(lengths["bare"][kind]))
    return {"with_loading": with_loading, "losses_equal": True} | {
        form: {kind: {"median": statistics.median(values), "repeats": values} for kind, values in found.items()}
        for form, found in ratios.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios to the bare loop's step, with the smallest and largest of the repeats."""

    def cell(found: dict[str, Any]) -> str:
        return f"{found['median']:.3f} ({min(found['repeats']):.3f} to {max(found['repeats']):.3f})"

    lines = ["| step, as a ratio to the bare loop's | wall time | processor time | the bare loop again: wall time | processor time |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        label = "with loading and collation on both sides" if row["with_loading"] else "batches made before, on both sides"
        cells = [cell(row[form][kind]) for form in FORMS[1:] for kind in ("wall", "cpu")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576, help="width of the decoder; 576 is SmolLM2-135M's")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--words", type=int, default=16, help="words of a question, about five tokens each; an image is 16 tokens")
    parser.add_argument("--steps", type=int, default=12, help="per form and repeat; the first and the last are not timed")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps {options.steps} leaves no step to time: 3 or more are wanted")
    torch.set_num_threads(options.threads)
    rows = [compare(options, with_loading=with_loading) for with_loading in (False, True)]
    print(table(rows))
    worst = max(row["trainer"][kind]["median"] for row in rows for kind in ("wall", "cpu"))
    print(f"Largest ratio {worst:.3f}; at most {LIMIT} is wanted. Losses agree to {TOLERANCE:g}.")
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key != "out"}
        write_json(options.out, {"rows": rows, "limit": LIMIT, **sizes, "torch": torch.__version__})


if __name__ == "__main__":
    main()
