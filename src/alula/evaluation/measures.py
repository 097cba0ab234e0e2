"""Every measure of a score matrix. numpy only.

A new measure is one decorated function here; tables, definitions and documentation take it from `MEASURES`. Its docstring is
data: the first paragraph is the definition people read, the one that begins with ``Source:`` the citation.

The functions take `rows` (row i = after i tasks, row 0 = base model; a column for each task, then for each base task) with
any axes before it, so that a thousand resampled matrices cost one call, and the 0-based `columns` that count: task j of the
papers, learnt in row j, is column j - 1. What was not measured is NaN, and so is what needs it.
"""

import numpy as np
from jaxtyping import Float

from alula.evaluation.measure import MEASURES, OVER, Columns, Measure, Reference, Rows, Values, measure

__all__ = ["MEASURES", "OVER", "Columns", "Measure", "Reference", "Rows", "Values", "harmonic_mean"]

EPSILON = 1e-3
"""What stands for a score of zero in a harmonic mean: a tenth of a point."""


def harmonic_mean(values: Float[np.ndarray, "*resamples columns"], *, epsilon: float = EPSILON) -> Values:
    """n / sum(1 / value), values under `epsilon` counted as `epsilon`; NaN of nothing.

    Source: Srivastava et al. 2025 (arXiv 2410.19925), the authors' evaluation code. One zero among n scores bounds it at
    n times `epsilon`: show the arithmetic mean beside it.
    """
    return 1 / _mean(1 / np.maximum(values, epsilon))


def _mean(values: Float[np.ndarray, "*resamples columns"]) -> Values:
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _learnt(rows: Rows, columns: Columns) -> Float[np.ndarray, "*resamples columns"]:
    """The diagonal: R[j, j], the score on a task right after it was learnt."""
    return rows[..., columns + 1, columns]


def _last(rows: Rows, columns: Columns) -> Float[np.ndarray, "*resamples columns"]:
    return rows[..., -1, columns]


def _best_before_last(rows: Rows, columns: Columns) -> Float[np.ndarray, "*resamples columns"]:
    """max_{j <= l < T} R[l, j] over the rows in which j was measured; NaN where it was in none."""
    if rows.shape[-2] < 3:
        return np.full((*rows.shape[:-2], len(columns)), np.nan)
    row = np.arange(1, rows.shape[-2] - 1)[:, None]
    since_learnt = np.where(row > columns, rows[..., 1:-1, :][..., columns], np.nan)  # column j is learnt in row j + 1
    return np.fmax.reduce(since_learnt, axis=-2)


@measure("Average score", "mean over j of R[T, j]", better="higher", also_called=("ACC", "Last", "MFN", "arithmetic mean"))
def average_score(rows: Rows, columns: Columns) -> Values:
    """Mean score over the tasks seen, after the last one: what the model can do now.

    Source: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840), ACC; Last in HiDe-LLaVA (arXiv 2503.12941), MFN in MCITlib
    (arXiv 2508.07307).
    """
    return _mean(_last(rows, columns))


@measure("Backward transfer", "mean over j < T of R[T, j] - R[j, j]", better="higher", over="earlier", is_signed=True, also_called=("BWT",))
def backward_transfer(rows: Rows, columns: Columns) -> Values:
    """Mean over all tasks but the last: score at the end minus score right after learning. Negative = worse.

    Source: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840), BWT.
    """
    return _mean(_last(rows, columns) - _learnt(rows, columns))


@measure("Forgetting", "mean over j < T of max R[l, j], j <= l < T, - R[T, j]", better="lower", over="earlier")
def forgetting(rows: Rows, columns: Columns) -> Values:
    """Mean over all tasks but the last: best score since it was learnt and before the end, minus score at the end. Positive =
    lost; may be negative. With few samples it is above zero by chance alone.

    Source: Chaudhry et al. 2018 (arXiv 1801.10112), equation 3.

    The last row is not in the maximum, nor are rows from before the task was learnt (a_k,j is defined for j <= k there), so that
    scoring tasks to come changes nothing. Difference: nor are rows in which a task was not measured.
    A maximum over noisy rows is biased upwards: with few samples forgetting is above -BWT by chance alone.
    """
    return _mean(_best_before_last(rows, columns) - _last(rows, columns))


@measure("Base forgetting", "mean over b of R[0, b] - R[T, b]", better="lower", over="base")
def base_forgetting(rows: Rows, columns: Columns) -> Values:
    """Mean over base tasks (never trained): score of the base model minus score at the end. Positive = lost.

    Source: linguistic forgetting, Srivastava et al. 2025 (arXiv 2410.19925), in the arithmetic mean.
    """
    return _mean(rows[..., 0, columns] - _last(rows, columns))


@measure("Base bits", "mean over b of R[T, b] - R[0, b]", better="lower", over="base_bits", unit="bits", is_signed=True)
def base_bits_increase(rows: Rows, columns: Columns) -> Values:
    """Mean over prose base tasks: bits per byte at the end minus those of the base model. Positive = lost.

    Source: ours; bits per byte as in The Pile (Gao et al. 2020, arXiv 2101.00027).

    Bits are never averaged with scores of 0 to 1.
    """
    return -base_forgetting(rows, columns)


@measure("Unparsed", "unparsed answers / answers, in row T", better="lower", over="answers", unit="%")
def unparsed_share(unparsed: Float[np.ndarray, " columns"], counts: Float[np.ndarray, " columns"]) -> Values:
    """Share of the answers on tasks seen, after the last one, whose form could not be read: none of the task's known
    answers, or empty, or without an end. They score 0.

    Source: superficial forgetting, Chen et al. 2025 (SEFE, arXiv 2505.02486).
    """
    return unparsed.sum(-1) / counts.sum(-1) if len(counts) else np.array(np.nan)


@measure("Average over stages", "mean over t of mean over j <= t of R[t, j]", better="higher", also_called=("Avg", "MAA"))
def average_over_stages(rows: Rows, columns: Columns) -> Values:
    """Mean over all stages of the average score on the tasks seen by then.

    Source: average incremental accuracy, Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725); MAA in CoIN (arXiv 2403.08350) and
    MCITlib (arXiv 2508.07307), Avg in HiDe-LLaVA (arXiv 2503.12941).

    Difference: every row counts, the first one too.
    """
    stages = [(row, columns[columns < row]) for row in range(1, rows.shape[-2])]
    means = [_mean(rows[..., row, seen]) for row, seen in stages if len(seen)]
    return _mean(np.stack(means, axis=-1)) if means else np.full(rows.shape[:-2], np.nan)


@measure("Harmonic score", "n / sum over j of 1 / max(R[T, j], 0.001)", better="higher")
def harmonic_score(rows: Rows, columns: Columns) -> Values:
    """Harmonic mean of the scores on the n tasks seen, after the last one; a zero counts as 0.1 points, so that one task at
    zero pulls it to almost nothing.

    Source: Srivastava et al. 2025 (arXiv 2410.19925), omega; its arithmetic mean is the average score.
    """
    return harmonic_mean(_last(rows, columns))


@measure("Learning accuracy", "mean over j of R[j, j]", better="higher", also_called=("LA", "MFT"))
def learning_accuracy(rows: Rows, columns: Columns) -> Values:
    """Mean score on each task right after learning it.

    Source: Riemer et al. 2019 (arXiv 1810.11910), LA; MFT in MCITlib (arXiv 2508.07307).
    """
    return _mean(_learnt(rows, columns))


@measure("Forward transfer", "mean over j > 1 of R[j-1, j] - R[0, j]", better="higher", over="later", is_signed=True, also_called=("FWT",))
def forward_transfer(rows: Rows, columns: Columns) -> Values:
    """Mean over all tasks but the first: score just before learning it minus score of the base model. Positive = earlier
    tasks helped.

    Source: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840), FWT; there the reference is a randomly initialised model.
    """
    return _mean(rows[..., columns, columns] - rows[..., 0, columns])


@measure("Forgetting, last row included", "mean over j < T of max R[l, j], j <= l <= T, - R[T, j]", better="lower", over="earlier")
def forgetting_with_last_row(rows: Rows, columns: Columns) -> Values:
    """As forgetting, with the score at the end among the best: a task that got better counts as 0, and it is never negative.

    Source: mammoth (Boschini et al. 2022, arXiv 2201.00766), utils/metrics.py.
    """
    last = _last(rows, columns)
    return _mean(np.maximum(_best_before_last(rows, columns), last) - last)


@measure("Forgetting since learnt", "mean over j < T of R[j, j] - R[T, j]", better="lower", over="earlier")
def forgetting_since_learnt(rows: Rows, columns: Columns) -> Values:
    """Mean over all tasks but the last: score right after learning minus score at the end. Positive = lost; it is backward
    transfer with the other sign.

    Source: Avalanche (Lomonaco et al. 2021, arXiv 2104.00405), StreamForgetting.
    """
    return -backward_transfer(rows, columns)


@measure("Intransigence", "mean over j of joint[j] - R[j, j]", better="lower", against="joint", is_signed=True)
def intransigence(rows: Rows, columns: Columns, reference: Reference) -> Values:
    """Mean over tasks: score of joint training minus score right after learning. Positive = learnt less than it could be.

    Source: Chaudhry et al. 2018 (arXiv 1801.10112), I_k; there for one k and against a joint model of the tasks up to k.

    Difference: the mean over k, against one joint model of all tasks.
    """
    return _mean(reference[..., columns] - _learnt(rows, columns))


@measure("Gap to joint", "mean over j of joint[j] - R[T, j]", better="lower", against="joint", is_signed=True)
def gap_to_joint(rows: Rows, columns: Columns, reference: Reference) -> Values:
    """Average score of joint training (all tasks at once) minus that of the series, on the tasks seen. Positive = behind.

    Source: ours; a paired difference of average scores.
    """
    return _mean(reference[..., columns] - _last(rows, columns))


@measure("Gap to specialist", "mean over j of specialist[j] - R[T, j]", better="lower", against="specialist", is_signed=True)
def gap_to_specialist(rows: Rows, columns: Columns, reference: Reference) -> Values:
    """Average score of one expert per task, told which task it is, minus that of the series, on the tasks seen. Positive =
    behind.

    Source: ours; a paired difference of average scores.
    """
    return gap_to_joint(rows, columns, reference)


@measure("Base forgetting, understanding", "mean over ranked b of R[0, b] - R[T, b]", better="lower", over="base_ranked")
def base_forgetting_understanding(rows: Rows, columns: Columns) -> Values:
    """Base forgetting over the base tasks in which the model ranks given options. Positive = lost.

    Source: NLU forgetting, Srivastava et al. 2025 (arXiv 2410.19925), in the arithmetic mean.
    """
    return base_forgetting(rows, columns)


@measure("Base forgetting, generation", "mean over generated b of R[0, b] - R[T, b]", better="lower", over="base_generated")
def base_forgetting_generation(rows: Rows, columns: Columns) -> Values:
    """Base forgetting over the base tasks in which the model writes the answer; prose is in base bits. Positive = lost.

    Source: NLG forgetting, Srivastava et al. 2025 (arXiv 2410.19925), in the arithmetic mean.
    """
    return base_forgetting(rows, columns)


@measure("Base forgetting, harmonic", "hmean over b of R[0, b] - hmean over b of R[T, b]", better="lower", over="base")
def base_forgetting_harmonic(rows: Rows, columns: Columns) -> Values:
    """Harmonic mean of the base model's scores on base tasks minus that at the end; a zero counts as 0.1 points. Positive =
    lost.

    Source: Srivastava et al. 2025 (arXiv 2410.19925), Delta.
    """
    return harmonic_mean(rows[..., 0, columns]) - harmonic_mean(_last(rows, columns))
