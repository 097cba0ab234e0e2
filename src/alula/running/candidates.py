"""The methods a recommendation chooses from, and the rule it chooses by: plain numbers in, one name out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alula.config import MethodChoice
from alula.evaluation.bootstrap import Interval
from alula.report.format import show, show_bytes, show_time
from alula.report.series import Series
from alula.running.memory import Sizes, estimate_memory
from alula.training import TrainSettings
from alula.training.settings import MM1

RULE = (
    "A method is out if it needs data that may not be kept, wants more memory than is allowed, would train for longer in full than "
    "is allowed, or if the 95 % interval of its base forgetting is wholly above the limit; it is only possible if the limit is inside "
    "that interval. Of those left the highest average score wins; among those that cannot be told apart from it, one that keeps the "
    "limit goes before one that is only possible, then the one that trains fastest in full, where times within a quarter of each other "
    "count as equal and less memory decides."
)
SAME_TIME = 1.25


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method that may be recommended.

    Attributes:
        needs_old_data: training samples of earlier tasks must be kept.
        rank: of the LoRA expert that trains; None: all of the decoder trains.
        keeps_experts: one expert stays for each task; False: one in all.
    """

    choice: MethodChoice
    needs_old_data: bool = False
    rank: int | None = 8
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
class Line:
    """What is known of one candidate; scores and forgetting from 0 to 1, NaN where nothing was measured.

    Attributes:
        memory: bytes, estimated (see `estimate_memory`).
        seconds: of training in full, extrapolated from the pilot (see `extrapolate_seconds`).
        num_base: samples of base tasks behind `lost`, as `num_samples` are behind `score`.
        out: why it is not recommended; empty where it may be.
        unsure: why it may still break the limit on base forgetting; empty where it keeps it.
        enough: samples of base tasks that would tell; None where nothing is unsure, or no number would.
    """

    name: str
    memory: int
    out: str = ""
    score: float = math.nan
    score_interval: Interval | None = None
    num_samples: int = 0
    lost: float = math.nan
    lost_interval: Interval | None = None
    num_base: int = 0
    seconds: float = math.nan
    unsure: str = ""
    enough: int | None = None

    @property
    def verdict(self) -> str:
        """``out``, ``possible`` or ``fits``."""
        return "out" if self.out else "possible" if self.unsure else "fits"


def candidates(settings: TrainSettings) -> list[Candidate]:
    """Every method that is considered; training the whole decoder takes a tenth of the rate (see `TrainSettings`).

    Source: ``soft_targets``, ``msgm`` and ``msgm_rehearsal`` are the methods of Srivastava et al. 2025 (arXiv 2410.19925).
    """
    tenth = {} if settings.learning_rate == MM1 else {"learning_rate": settings.rate / 10}
    soft, rehearsal = {"name": "soft_targets"}, {"name": "rehearsal", "options": {"ratio": 0.1}}
    return [
        Candidate(choice=_choice("finetune")),
        Candidate(choice=_choice("routed"), keeps_experts=True),
        Candidate(choice=_choice("lora", soft, label="msgm"), rank=32),
        Candidate(choice=_choice("finetune", rehearsal, label="rehearsal"), needs_old_data=True),
        Candidate(choice=_choice("lora", soft, rehearsal, label="msgm_rehearsal"), rank=32, needs_old_data=True),
        Candidate(choice=_choice("joint"), needs_old_data=True),
        Candidate(choice=_choice("finetune_full", train=tenth), rank=None),
        Candidate(choice=_choice("finetune_full", soft, label="soft_targets", train=tenth), rank=None),
        Candidate(choice=_choice("joint_full", train=tenth), rank=None, needs_old_data=True),
    ]


def _choice(name: str, *additions: dict[str, Any], label: str | None = None, train: dict[str, Any] | None = None) -> MethodChoice:
    return MethodChoice.model_validate({"name": name, "label": label, "with": list(additions), "train": train or {}})


def constrain(candidate: Candidate, sizes: Sizes, limits: Limits, *, num_tasks: int) -> Line:
    """The candidate's line before anything is measured."""
    memory = estimate_memory(sizes, rank=candidate.rank, num_experts=num_tasks if candidate.keeps_experts else 1)
    line = Line(name=candidate.name, memory=memory)
    if candidate.needs_old_data and not limits.keeps_old_data:
        return replace(line, out="needs data of earlier tasks, which may not be kept")
    if limits.memory is not None and line.memory > limits.memory:
        wanted = f"{show_bytes(line.memory)} for weights, gradients, AdamW's moments and a batch"
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
        num_base=series.num_samples("base_forgetting"),
        seconds=extrapolate_seconds(series.members[0].cell.cost, batch_size=batch_size, factor=factor),
    )


def judge(line: Line, limits: Limits) -> Line:
    """The line with the reason why it is out, or why that is not sure, if what was measured gives one."""
    if line.out:
        return line
    if limits.seconds is not None and line.seconds > limits.seconds:
        return replace(line, out=f"would train for {show_time(line.seconds)}, and {show_time(limits.seconds)} are allowed")
    if math.isnan(line.lost):  # no base task, so no limit on them
        return line
    limit, interval = limits.base_forgetting / 100, line.lost_interval or Interval(low=line.lost, high=line.lost)
    allowed = f"points on base tasks, and {limits.base_forgetting:g} may be lost"
    if interval.low > limit:
        return replace(line, out=f"loses {show(100 * line.lost)} {allowed}")
    if interval.high > limit:
        enough = samples_to_tell(line.lost, interval, limit=limit, num_samples=line.num_base)
        tell = f"; about {_two_digits(enough)} of their samples would tell, here were {line.num_base:,}" if enough else ""
        return replace(line, unsure=f"may lose up to {show(100 * interval.high)} {allowed}{tell}", enough=enough)
    return line


def samples_to_tell(value: float, interval: Interval, *, limit: float, num_samples: int) -> int | None:
    """How many samples that show the same `value` have an interval that leaves `limit` out; None where `value` is the limit.

    An interval narrows with the square root of its samples. Its wider side counts: of few samples the other one may be cut off at zero.
    """
    gap, side = abs(limit - value), max(interval.high - value, value - interval.low)
    return math.ceil(num_samples * (side / gap) ** 2) if gap > 1e-9 else None


def _two_digits(number: int) -> str:
    """More digits would promise too much."""
    return f"{float(f'{number:.2g}'):,.0f}"


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
    sure = [line for line in close if not line.unsure] or close
    fastest = min(line.seconds for line in sure)
    cheap = [line for line in sure if line.seconds <= SAME_TIME * fastest]
    return min(cheap, key=lambda line: (line.memory, line.seconds)).name, [line.name for line in close]
