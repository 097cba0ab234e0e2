"""Two models on the same samples: what was lost, whether chance explains it, and how small a loss would have been seen.

It reads stored predictions and knows no model: numpy only. A *loss* is positive where the tuned model is worse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from alula.errors import UserError, nearest
from alula.evaluation.bootstrap import Interval, draw_counts, percentile_interval
from alula.evaluation.scores import check_prompts

Values = Float[np.ndarray, " samples"]
POWER = 0.8  # how often the smallest visible loss would fail the gate, over test sets of the same size
NAMES = ("base_forgetting", "base_bits_increase")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """One task's samples, scored twice. For prose values are bits and weights bytes; else values are scores, weights 1."""

    task: str
    base: Values
    tuned: Values
    weights: Values
    is_prose: bool = False

    @property
    def num_samples(self) -> int:
        """Samples in both."""
        return len(self.base)

    @property
    def is_binary(self) -> bool:
        """Whether every answer is right or wrong."""
        return not self.is_prose and bool(np.isin((self.base, self.tuned), (0.0, 1.0)).all())

    @property
    def losses(self) -> Values:
        """What each sample lost."""
        return self.tuned - self.base if self.is_prose else self.base - self.tuned

    @property
    def loss(self) -> float:
        """The task's loss: score of the base minus score of the tuned model; for prose tuned minus base, in bits per byte."""
        return float(self.losses.sum() / self.weights.sum())

    @property
    def lost(self) -> int:
        """Samples that the tuned model does worse."""
        return int((self.losses > 0).sum())

    @property
    def gained(self) -> int:
        """Samples that the tuned model does better."""
        return int((self.losses < 0).sum())

    @cached_property
    def p_value(self) -> float:
        """One-sided, of no loss at all: exact McNemar where answers are right or wrong, else signs of differences flipped."""
        return mcnemar(self.lost, self.gained) if self.is_binary else sign_flip(self.losses)

    def interval(self, *, level: float = 0.95) -> Interval | None:
        """The paired bootstrap interval of the loss, with the draws of the report."""
        drawn = draw_counts(self.num_samples, resamples=1000, seed=0, name=self.task)
        return percentile_interval(drawn @ self.losses / (drawn @ self.weights), level=level)

    def excess(self, limit: float) -> Values:
        """What each sample adds to the loss above `limit`."""
        return (self.losses - limit * self.weights) / self.weights.sum()

    def estimate(self) -> tuple[float, float]:
        """The loss and its variance, for a bound that few samples cannot make narrow.

        Where answers are right or wrong one more sample lost and one more gained are counted: models that agree on all of
        twenty samples may still differ on the next. Else the variance of a ratio of means.
        Source: Bonett & Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions based on
        paired data, Journal of Educational and Behavioral Statistics 37(4).
        """
        if self.is_binary:
            loss = (self.lost - self.gained) / (self.num_samples + 2)
            return loss, (self._differing - loss**2) / (self.num_samples + 2)
        if self.num_samples < 2:
            return self.loss, math.inf
        residuals = self.excess(self.loss)
        return self.loss, float((residuals**2).sum() * self.num_samples / (self.num_samples - 1))

    def variance_if(self, loss: Float[np.ndarray, " losses"]) -> Float[np.ndarray, " losses"]:
        """The variance of the measured loss if the true one were `loss`: so many samples at least would differ then."""
        if self.is_binary:
            return (np.maximum(self._differing, loss) - loss**2) / self.num_samples
        return np.full_like(loss, self.estimate()[1])

    @property
    def _differing(self) -> float:
        """The share of samples on which the two differ, with one more lost and one more gained."""
        return (self.lost + self.gained + 2) / (self.num_samples + 2)


def mcnemar(lost: int, gained: int) -> float:
    """One-sided exact p-value: how often a fair coin gives `lost` heads or more in `lost + gained` throws.

    Source: McNemar 1947, Psychometrika 12(2), in its exact (binomial, sign test) form.
    """
    total = lost + gained
    return sum(math.comb(total, heads) for heads in range(lost, total + 1)) / 2**total


def sign_flip(excess: Values, *, flips: int = 10_000, seed: int = 0) -> float:
    """One-sided p-value of a sum above 0: how often it is as large when each sample's sign is drawn by a coin.

    Exact up to twelve samples that are not 0, else drawn. For losses of -1, 0 and 1 it is the exact McNemar test.
    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    moved = np.asarray(excess, dtype=float)[np.asarray(excess) != 0]
    observed = moved.sum() - 1e-9 * np.abs(moved).sum()  # sums of the same numbers in another order are equal
    if len(moved) <= 12:
        every = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((every @ moved >= observed).mean())
    sizes, counts = np.unique(np.abs(moved), return_counts=True)  # of k equal samples only the number that is up matters
    generator, as_large, rows = np.random.default_rng(seed), 0, max(1, 2_000_000 // len(sizes))
    for start in range(0, flips, rows):
        up = generator.binomial(counts, 0.5, size=(min(rows, flips - start), len(counts)))
        as_large += int(((2 * up - counts) @ sizes >= observed).sum())
    return (as_large + 1) / (flips + 1)


def match(base: Sequence[dict], tuned: Sequence[dict], *, tasks: Sequence[str] | None = None) -> list[Pairs]:
    """The predictions of two models, paired by task and id; samples that share an id by prompt, reference and then order.

    Args:
        base, tuned: rows with id, task and score (`loss_bits` and `bytes` for prose), as `Prediction.as_row` gives them.
        tasks: the tasks to compare; None for all, which must be the same in both.

    Raises:
        UserError: a task or a sample is in one of them only, asks something else there, in text or in template, or has no usable score.
    """
    sides = {"BASE": _by_task(base), "TUNED": _by_task(tuned)}
    wanted = list(dict.fromkeys(tasks if tasks is not None else [name for rows in sides.values() for name in rows]))
    for side, rows in sides.items():
        for name in wanted:
            if name not in rows:
                raise UserError(
                    f"{side} has no predictions of the task '{name}'. {nearest(name, rows)} Score the task there too, "
                    "or name the tasks to compare with --task."
                )
    if not wanted:
        raise UserError("There are no predictions to compare: one JSON object a line is wanted, as `alula eval` writes them.")
    return [_pair(name, sides["BASE"][name], sides["TUNED"][name]) for name in wanted]


def _by_task(rows: Sequence[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(str(row["task"]), []).append(row)
    return found


def _pair(task: str, base: Sequence[dict], tuned: Sequence[dict]) -> Pairs:
    first, second = _by_id(base), _by_id(tuned)
    for side, missing in (("TUNED", [key for key in first if key not in second]), ("BASE", [key for key in second if key not in first])):
        if missing:
            raise UserError(
                f"{side} lacks {len(missing)} of the samples of '{task}' that the other side has, the first is '{missing[0][0]}'. "
                "Score the same test samples with both models."
            )
    for key, row in first.items():
        for what in ("prompt", "reference", "options"):
            if row.get(what) != second[key].get(what):
                raise UserError(
                    f"Task '{task}', sample '{key[0]}': the {what} is {str(row.get(what))[:60]!r} in BASE and "
                    f"{str(second[key].get(what))[:60]!r} in TUNED. Score the same test samples with both models."
                )
    check_prompts(task, first, second)
    kinds = {"loss_bits" in row for row in (*base, *tuned)}
    if len(kinds) > 1:
        raise UserError(f"Task '{task}' has bits per byte for some samples only. Score it in the same way with both models.")
    is_prose, value = (True, "loss_bits") if kinds == {True} else (False, "score")
    weights, others = (np.array([_number(rows[key], "bytes", task) if is_prose else 1.0 for key in first]) for rows in (first, second))
    if (weights != others).any() or (weights <= 0).any():
        raise UserError(f"Task '{task}': the bytes of a sample are 0, or differ between BASE and TUNED. Score the same text with both.")
    before, after = (np.array([_number(rows[key], value, task) for key in first]) for rows in (first, second))
    return Pairs(task=task, base=before, tuned=after, weights=weights, is_prose=is_prose)


def _by_id(rows: Sequence[dict]) -> dict[tuple[str, int], dict]:
    """Rows by id and, where several share one, their number in the order of prompt and reference."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (str(row.get("prompt")), str(row.get("reference")))):
        groups.setdefault(str(row["id"]), []).append(row)
    return {(name, number): row for name, group in groups.items() for number, row in enumerate(group)}


def _number(row: dict, key: str, task: str) -> float:
    value = row.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"Task '{task}', sample '{row['id']}': {key} is {value!r}, a finite number is wanted. Score the sample again.")
    return float(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Meter:
    """The mean loss over tasks of one unit, held against its limit. All numbers in `unit`.

    Attributes:
        name: ``base_forgetting`` (points) or ``base_bits_increase`` (bits per byte); the two are never averaged.
        base: mean score of the base model.
        p_value: one-sided, of a true loss of at most `limit`; and of none at all, where that is larger.
        upper: what the true loss is below, with the gate's confidence.
        smallest: the smallest true loss that would fail the default gate in four of five such test sets; None where none would.
        enough: samples needed to tell the measured loss from `limit`; None where they are equal.
        changed: samples whose score is not the same.
        level: of its own test: the gate's, shared by the meters unless strict.
    """

    name: str
    unit: str
    tasks: tuple[str, ...]
    num_samples: int
    base: float
    limit: float
    loss: float
    p_value: float
    upper: float
    smallest: float | None
    enough: int | None
    changed: int
    level: float
    passed: bool


def judge(pairs: Sequence[Pairs], *, limits: dict[str, float], level: float = 0.05, strict: bool = False) -> list[Meter]:
    """Each meter and whether it passes; the gate passes when all do. The loss of a meter is the mean over its tasks.

    Default: it fails when the loss is above the limit by more than chance, that is when both "nothing was lost" and "the true
    loss is at most the limit" are rejected (signs of what is above flipped, one-sided). A tolerated loss fails in about
    `level` of test sets at most, two meters together (each gets half of it). What cannot be told from the limit passes, which
    is no proof that nothing was lost: see `smallest`.

    Strict: it passes only when "the true loss is above the limit" is rejected: the upper bound of the loss is at most the
    limit (non-inferiority). A loss that is not tolerated passes in about `level` of test sets. Few samples fail.

    Args:
        limits: of the meters by name, in points and in bits per byte.
    """
    grouped = {name: [one for one in pairs if one.is_prose == (name == "base_bits_increase")] for name in NAMES}
    present = {name: tasks for name, tasks in grouped.items() if tasks}
    return [_meter(name, present[name], limit=limits[name], level=level, share=len(present), strict=strict) for name in present]


def _meter(name: str, pairs: Sequence[Pairs], *, limit: float, level: float, share: int, strict: bool) -> Meter:
    scale, count = 1.0 if pairs[0].is_prose else 100.0, len(pairs)
    tolerated, each = limit / scale, level if strict else level / share
    p_value = max(sign_flip(np.concatenate([one.excess(above) for one in pairs]) / count) for above in (0.0, tolerated))
    estimates = [one.estimate() for one in pairs]
    error = math.sqrt(sum(variance for _, variance in estimates)) / count
    upper = sum(loss for loss, _ in estimates) / count + NormalDist().inv_cdf(1 - level) * error
    loss, num_samples = sum(one.loss for one in pairs) / count, sum(one.num_samples for one in pairs)
    smallest, gap = smallest_visible_loss(pairs, limit=tolerated, level=each), abs(loss - tolerated)
    return Meter(
        name=name,
        unit="bits per byte" if pairs[0].is_prose else "points",
        tasks=tuple(one.task for one in pairs),
        num_samples=num_samples,
        base=scale * sum(float(one.base.sum() / one.weights.sum()) for one in pairs) / count,
        limit=limit,
        loss=scale * loss,
        p_value=p_value,
        upper=scale * upper,
        smallest=None if smallest is None else scale * smallest,
        enough=math.ceil(num_samples * (_errors(each) * error / gap) ** 2) if gap > 1e-9 and math.isfinite(error) else None,
        changed=sum(one.lost + one.gained for one in pairs),
        level=each,
        passed=upper <= tolerated if strict else p_value > each,
    )


def _errors(level: float) -> float:
    """Standard errors between a limit and a loss that is seen with the chance `POWER`."""
    return NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(POWER)


def smallest_visible_loss(pairs: Sequence[Pairs], *, limit: float, level: float) -> float | None:
    """The smallest true mean loss for which `judge` fails in four of five test sets of this size; None where it never does.

    Normal approximation, with one sample more for each task because answers are counted.
    """
    if sum(one.num_samples for one in pairs) < math.log2(1 / level):
        return None  # every sample lost is still a coin's work
    tried = np.linspace(limit, max(limit, 8.0 if pairs[0].is_prose else 1.0), 20_001)  # 8 bits per byte: a model that knows nothing
    step = sum(1 / one.num_samples for one in pairs if one.is_binary) / len(pairs) ** 2
    noise = np.sqrt(sum(one.variance_if(tried) for one in pairs)) / len(pairs)
    seen = np.flatnonzero(tried - limit >= _errors(level) * noise + step)
    return float(tried[seen[0]]) if len(seen) else None
