"""What one more task costs, and what a large pool costs: routed experts against joint training anew at each arrival.

Part 1: samples, seconds, FLOPs (torch.utils.flop_counter) and peak memory of each arriving task. `routed` trains one expert
on the new task's data, once more with the tasks in reverse order; `joint` trains one LoRA from the beginning on the data of
all tasks so far. The row ``once`` is what a new pool does before its first task: general text goes through the model, so that
foreign prompts stay with it. FLOPs are counted in a pass of their own, because that takes time; on a CPU the counter does not
know fused attention. Part 2: milliseconds per token and stored bytes against the number of (random) experts, and what the
formulas say, alone beyond them.

    python benchmarks/cost_of_routing.py --out docs/cost_of_routing.json       # writes docs/cost_of_routing.md beside it
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from routing_tables import ARMS, Row, markdown
from small_vlm import make_model, make_processor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria, StoppingCriteriaList

from alula import METHODS, Collator, Method, Mixtures, Stream, Task, Trainer, TrainSettings, attach, load_task, observe
from alula.context import BASE, OFF, Routing
from alula.data.tasks import TASKS, general_prompts
from alula.files import write_json, write_text
from alula.methods.routed import Routed
from alula.routers.named import ROUTINGS


def make_tasks(options: argparse.Namespace) -> list[Task]:
    """Built-in tasks with training data, sub-sampled; their number is what there is."""
    tasks: list[Task] = []
    for name in options.names or TASKS:
        if len(tasks) < options.tasks:
            task = load_task(name, train_size=options.samples, test_size=0)
            tasks += [task] if task.train else []
    return tasks


def resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Gives freed memory back and lets the peak start anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def arrivals(
    method: str, start: nn.Module, collator: Collator, tasks: list[Task], settings: TrainSettings, *, general: int | None
) -> Iterator[Callable[[], int]]:
    """For each arriving task (for `routed` first for a new pool) what learns it and gives the samples that went through the model."""
    if method == "routed":
        model = copy.deepcopy(start)
        mixtures = attach(model)
        yield lambda: see_general_text(mixtures, collator, batch_size=settings.batch_size, count=general)
        learner: Method = Routed(model, settings=settings, mixtures=mixtures)
        learning = Trainer(model, learner, collator, settings=settings, folder=None).learn(Stream(tasks=tuple(tasks)))
        for _ in tasks:
            yield lambda: next(learning).cost.samples_seen
        return
    for count in range(1, len(tasks) + 1):
        model = copy.deepcopy(start)
        learner = METHODS[method](model, settings=settings)
        learning = Trainer(model, learner, collator, settings=settings, folder=None).learn(Stream(tasks=tuple(tasks[:count])))
        yield lambda learning=learning: next(learning).cost.samples_seen  # type: ignore[misc]
        del model, learner, learning


def see_general_text(mixtures: Mixtures, collator: Collator, *, batch_size: int, count: int | None) -> int:
    """Lets the prompt router see text that belongs to no task; gives the number of samples."""
    samples = general_prompts()[:count]
    for start in range(0, len(samples), batch_size):
        observe(mixtures, BASE, collator(samples[start : start + batch_size]))
    return len(samples)


def cost_per_arrival(method: str, tasks: list[Task], options: argparse.Namespace, floor: float | None) -> list[Row]:
    """One row per arriving task.

    Args:
        floor: MB that the process had before there was a model; None: memory is not measured.
    """
    settings = TrainSettings(steps=options.steps, batch_size=options.batch_size)
    start, collator = make_model(hidden=options.hidden, num_layers=options.layers), Collator(make_processor())
    rows: list[Row] = []
    names = [*(["once"] if method == "routed" else []), *(task.name for task in tasks)]
    for name, train in zip(names, arrivals(method, start, collator, tasks, settings, general=options.general), strict=True):
        if floor is not None:
            forget_peak()
        started = time.perf_counter()
        samples = train()
        seconds = time.perf_counter() - started
        peak = None if floor is None else round(resident("VmHWM") - floor, 1)
        number = len(rows) + (names[0] != "once")
        rows.append({"task": number, "name": name, "samples": samples, "seconds": seconds, "peak_megabytes": peak})
        print(f"{method}, task {number} ({name}): {samples} samples, {seconds:.2f} s", file=sys.stderr, flush=True)
    for row, train in zip(rows, arrivals(method, start, collator, tasks, settings, general=options.general), strict=True):
        with FlopCounterMode(display=False) as counter:
            train()
        row["flops"] = counter.get_total_flops()
    return rows


def make_pool(options: argparse.Namespace) -> tuple[nn.Module, Mixtures, Collator, Task]:
    """A model with mixtures and no expert yet, and prompts to ask it."""
    model = make_model(hidden=options.hidden, num_layers=options.layers)
    model.generation_config.eos_token_id = None  # every answer is as long as it may be
    model.generation_config.suppress_tokens = [model.config.image_token_index]
    task = load_task((options.names or ["easy_vqa"])[0], train_size=options.prompts, test_size=0)
    return model, attach(model, routers=("gate",)), Collator(make_processor()), task


@torch.no_grad()
def grow_to(mixtures: Mixtures, count: int, *, rank: int) -> None:
    """Random experts, gates and descriptions of prompts, until there are `count`."""
    router = mixtures.prompt_router
    width = router.width or router.statistics[0].dim
    for number in range(len(mixtures.names), count):
        name, draw = f"expert{number:04d}", torch.Generator().manual_seed(number)
        mixtures.grow(name, rank=rank, generator=draw)
        for mixture in mixtures.sites.values():
            mixture.experts.B[number].normal_(std=1e-2, generator=draw)
            mixture.named_routers()["gate"].gates[number].normal_(generator=draw)  # type: ignore[index, union-attr]
        seen = torch.randn(8, width, generator=draw) + torch.randn(width, generator=draw)
        described = torch.cat([seen, torch.ones(8, 1)], dim=1)  # the last column: they had images
        for known in (name, BASE) if number == 0 else (name,):
            router.observe(known, [described] * len(router.layers))
    mixtures.freeze()  # as they are in a pool that is opened: what routers derive from gates that train is made anew for each token


def routing_of(arm: str, mixtures: Mixtures) -> Routing:
    """The base model alone, the last expert told, or one of `ROUTINGS`."""
    return {"base": OFF, "oracle": Routing(fixed={mixtures.names[-1]: 1.0})}.get(arm) or ROUTINGS[arm]


class Stamps(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def answer(model: nn.Module, mixtures: Mixtures, prompts: dict[str, torch.Tensor], arm: str, *, tokens: int) -> tuple[float, list[float]]:
    """Milliseconds of the prompt with an answer's first token, and of each of `tokens` further ones."""
    stamps = Stamps()
    with mixtures.using(routing_of(arm, mixtures)), torch.no_grad():
        model.generate(**prompts, max_new_tokens=1 + tokens, do_sample=False, stopping_criteria=StoppingCriteriaList([stamps]))  # type: ignore[operator]
    first, *further = (1e3 * (after - before) for before, after in pairwise(stamps.times))
    assert len(further) == tokens, "an answer ended early"
    return first, further


def pool_row(parts: tuple[nn.Module, Mixtures, Collator, Task], count: int, options: argparse.Namespace) -> Row:
    """Milliseconds per prompt and per further token of one answer at a time, and stored bytes, with `count` experts."""
    model, mixtures, collator, task = parts
    grow_to(mixtures, count, rank=options.rank)
    first: dict[str, list[float]] = {arm: [] for arm in ARMS}
    further: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(options.repeats + 1):
        for arm in ARMS if repeat % 2 else ARMS[::-1]:
            prompts = collator.prompts([task.train[repeat % len(task.train)]])
            one, others = answer(model, mixtures, prompts, arm, tokens=options.tokens)
            if repeat:  # the first is warm-up
                first[arm].append(one)
                further[arm] += others
    stored = [stored_bytes(mixtures, name) for name in mixtures.names]
    row: Row = {"experts": count, "stored_bytes": {kind: sum(one[kind] for one in stored) for kind in stored[0]}}
    for what, found in (("milliseconds_per_prompt", first), ("milliseconds_per_token", further)):
        row[what] = {arm: statistics.median(values) for arm, values in found.items()}
    print(f"{count} experts measured", file=sys.stderr, flush=True)
    return row | {"on_paper": on_paper(mixtures, count, options)}


def stored_bytes(mixtures: Mixtures, name: str) -> dict[str, int]:
    """What one expert's tensors take, by what they are for."""
    index, found = mixtures.names.index(name), {"expert": 0, "gate": 0, "analytic": 0}
    for mixture in mixtures.sites.values():
        found["expert"] += sum(part[index].numel() * part[index].element_size() for part in (mixture.experts.A, mixture.experts.B))
    for key, tensor in mixtures.router_tensors(name).items():
        found["analytic" if key.startswith("prompt.") else "gate"] += tensor.numel() * tensor.element_size()
    return found


def on_paper(mixtures: Mixtures, count: int, options: argparse.Namespace) -> Row:
    """`routing_tables.FORMULAS` with numbers: bytes, and multiply-adds per token as a share of those of the base model's linears."""
    shapes = [(mixture.host.in_features, mixture.host.out_features) for mixture in mixtures.sites.values()]
    linears, inputs = sum(n * d for n, d in shapes), sum(n for n, _ in shapes)
    low_rank = sum(options.rank * (n + d) for n, d in shapes)
    router = mixtures.prompt_router
    width, layers = router.width or router.statistics[0].dim, len(router.layers)
    analytic = 4 * layers * width * (width + 1) // 2 + 8 * layers * (width + 1) + 8
    shares = {"analytic": low_rank, "gate": count * inputs + min(count, 2) * low_rank}
    return {
        "stored_bytes": {"expert": 4 * low_rank * count, "gate": 4 * inputs * count, "analytic": analytic * count},
        "extra_share_per_token": {name: extra / linears for name, extra in shares.items()},
        "scores_per_prompt": count * layers * width,
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20, help="tasks that arrive")
    parser.add_argument("--names", nargs="+", default=None, help="built-in tasks in order; default: all that have training data")
    parser.add_argument("--samples", type=int, default=24, help="training samples per task")
    parser.add_argument("--general", type=int, default=None, help="samples of general text at most; default: all")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per task; joint takes as many for each task it sees")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="sizes of the pool that are measured")
    parser.add_argument("--beyond", type=int, nargs="*", default=[1024, 4096, 16384], help="sizes on paper only")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer after its first")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="a .json file; the tables go into the .md file beside it")
    options = parser.parse_args()
    if any(later <= before for before, later in pairwise(options.experts)):
        parser.error("--experts must rise: the pool only grows")
    return options


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    tasks = make_tasks(options)
    floor = resident("VmRSS") if Path("/proc/self/clear_refs").exists() else None
    found: Row = {"arrivals": {method: cost_per_arrival(method, tasks, options, floor) for method in ("routed", "joint")}}
    found["routed_reversed"] = cost_per_arrival("routed", tasks[::-1], options, None)
    parts = make_pool(options)
    found["pools"] = [pool_row(parts, count, options) for count in options.experts]
    found["pools"] += [{"experts": count, "on_paper": on_paper(parts[1], count, options)} for count in options.beyond]
    text = markdown(found)
    print(text)
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key != "out"}
        write_json(options.out, {**found, **sizes, "torch": torch.__version__})
        write_text(options.out.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
