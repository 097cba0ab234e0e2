"""The methods a recommendation chooses from, and the rule it chooses by: plain numbers in, one name out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alula.config import MethodChoice
from alula.evaluation.bootstrap import Interval
from alula.models import anatomy
from alula.report.format import show, show_bytes, show_time
from alula.report.series import Series
from alula.training import TrainSettings
from alula.training.settings import MM1

RULE = (
    "A method is out if it needs data that may not be kept, wants more memory than is allowed, would train for longer in full than "
    "is allowed, or if the 95 % interval of its base forgetting is not wholly under the limit. Of the others the highest average "
    "score wins; among those that cannot be told apart from it, the one that trains fastest in full, where times within a quarter of "
    "each other count as equal and less memory decides."
)
SAME_TIME = 1.25


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method that may be recommended.

    Attributes:
        needs_old_data: training samples of earlier tasks must be kept.
        trains_decoder: all of the decoder trains; False: one LoRA expert at a time.
        keeps_experts: one expert stays for each task; False: one in all.
    """

    choice: MethodChoice
    needs_old_data: bool = False
    trains_decoder: bool = False
    keeps_experts: bool = False

    @property
    def name(self) -> str:
        """As it is called in the pilot's folder."""
        return self.choice.shown


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a user allows.

    Attributes:
        keeps_old_data: samples of earlier tasks may be kept and learnt again.
        memory: bytes; None: any.
        seconds: of training in full; None: any.
        base_forgetting: points of mean score that may be lost on base tasks.
    """

    keeps_old_data: bool = False
    memory: int | None = None
    seconds: float | None = None
    base_forgetting: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a loaded model: all of it, its decoder, and one LoRA expert on every linear of the decoder."""

    model: int
    decoder: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is known of one candidate; scores and forgetting from 0 to 1, NaN where nothing was measured.

    Attributes:
        memory: bytes, estimated (see `estimate_memory`).
        seconds: of training in full, extrapolated from the pilot (see `extrapolate_seconds`).
        out: why it is not recommended; empty where it may be.
    """

    name: str
    memory: int
    out: str = ""
    score: float = math.nan
    score_interval: Interval | None = None
    num_samples: int = 0
    lost: float = math.nan
    lost_interval: Interval | None = None
    seconds: float = math.nan


def candidates(settings: TrainSettings) -> list[Candidate]:
    """Every method that is considered; full fine-tuning takes a tenth of the rate (see `TrainSettings`)."""
    tenth = {} if settings.learning_rate == MM1 else {"learning_rate": settings.rate / 10}
    rehearsal = {"name": "finetune", "label": "rehearsal", "with": [{"name": "rehearsal", "options": {"ratio": 0.1}}]}
    return [
        Candidate(choice=MethodChoice(name="finetune")),
        Candidate(choice=MethodChoice(name="routed"), keeps_experts=True),
        Candidate(choice=MethodChoice.model_validate(rehearsal), needs_old_data=True),
        Candidate(choice=MethodChoice(name="joint"), needs_old_data=True),
        Candidate(choice=MethodChoice(name="finetune_full", train=tenth), trains_decoder=True),
        Candidate(choice=MethodChoice(name="joint_full", train=tenth), trains_decoder=True, needs_old_data=True),
    ]


def measure_sizes(model: nn.Module, *, rank: int = 8) -> Sizes:
    """The sizes of a model that is loaded.

    Args:
        rank: of the expert; its default is that of the methods.
    """
    parts = anatomy(model)
    decoder = sum(_bytes(parameter) for path, parameter in model.named_parameters() if parts.part_of(path) == "decoder")
    low_rank = sum(rank * (linear.in_features + linear.out_features) for linear in parts.linears(model).values())
    return Sizes(model=sum(map(_bytes, model.parameters())), decoder=decoder, expert=4 * low_rank)


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def estimate_memory(candidate: Candidate, sizes: Sizes, *, num_tasks: int) -> int:
    """Bytes of weights and experts, and of gradients and AdamW's two moments of what trains; activations come on top."""
    experts = 0 if candidate.trains_decoder else sizes.expert * (num_tasks if candidate.keeps_experts else 1)
    return sizes.model + experts + 3 * (sizes.decoder if candidate.trains_decoder else sizes.expert)


def constrain(candidate: Candidate, sizes: Sizes, limits: Limits, *, num_tasks: int) -> Line:
    """The candidate's line before anything is measured."""
    line = Line(name=candidate.name, memory=estimate_memory(candidate, sizes, num_tasks=num_tasks))
    if candidate.needs_old_data and not limits.keeps_old_data:
        return replace(line, out="needs data of earlier tasks, which may not be kept")
    if limits.memory is not None and line.memory > limits.memory:
        wanted = f"{show_bytes(line.memory)} for weights, gradients and AdamW's moments"
        return replace(line, out=f"wants {wanted}, and {show_bytes(limits.memory)} are allowed")
    return line


def extrapolate_seconds(costs: Sequence[dict[str, Any]], *, batch_size: int, factor: float) -> float:
    """Seconds of training in full, from the pilot's lines of cost.jsonl.

    Optimizer steps become `factor` times as many. Samples of forward-only stages count as a third of one that is learnt, since
    they go through no backward pass, and stay as many: what such a stage sees is bounded by its method, not by the steps.
    """
    seconds = 0.0
    for row in costs:
        learnt = row["steps"] * batch_size
        observed = (row["samples_seen"] - learnt) / 3
        seconds += row["seconds"] * (factor * learnt + observed) / (learnt + observed)
    return seconds


def measure(line: Line, series: Series | None, *, batch_size: int, factor: float, error: str = "") -> Line:
    """The line with what the pilot says of it.

    Args:
        factor: steps in full for each step of the pilot.
        error: why there is no finished series.
    """
    if series is None:
        return replace(line, out=f"crashed in the pilot: {error}" if error else "did not finish the pilot")
    return replace(
        line,
        score=series.spread("average_score").mean,
        score_interval=series.interval("average_score"),
        num_samples=series.num_samples("average_score"),
        lost=series.spread("base_forgetting").mean,
        lost_interval=series.interval("base_forgetting"),
        seconds=extrapolate_seconds(series.members[0].cell.cost, batch_size=batch_size, factor=factor),
    )


def judge(line: Line, limits: Limits) -> Line:
    """The line with the reason why it is out, if what was measured gives one."""
    if line.out:
        return line
    if limits.seconds is not None and line.seconds > limits.seconds:
        return replace(line, out=f"would train for {show_time(line.seconds)}, and {show_time(limits.seconds)} are allowed")
    if math.isnan(line.lost):  # no base task, so no limit on them
        return line
    limit, interval = limits.base_forgetting / 100, line.lost_interval
    if interval is None or interval.low > limit:
        return replace(line, out=f"loses {show(100 * line.lost)} points on base tasks, more than {limits.base_forgetting:g}")
    if interval.high > limit:
        return replace(line, out=f"may lose {show(100 * interval.high)} points on base tasks, more than {limits.base_forgetting:g}")
    return line


def decide(lines: Sequence[Line], *, is_clear: Callable[[str, str], bool]) -> tuple[str | None, list[str]]:
    """The recommended method by `RULE`, and those that cannot be told apart from the best one (the best one among them).

    Args:
        lines: judged.
        is_clear: whether the difference of two methods' average scores is more than noise.
    """
    left = [line for line in lines if not line.out]
    if not left:
        return None, []
    best = max(left, key=lambda line: line.score)
    close = [line for line in left if line is best or not is_clear(best.name, line.name)]
    fastest = min(line.seconds for line in close)
    cheap = [line for line in close if line.seconds <= SAME_TIME * fastest]
    return min(cheap, key=lambda line: (line.memory, line.seconds)).name, [line.name for line in close]
