"""Claims about the score matrix and its noise, with the arithmetic written out."""

import numpy as np
import pytest

from alula.evaluation.bootstrap import (
    TaskSamples,
    bootstrap_interval,
    paired_interval,
    percentile_interval,
    resample_rows,
    spread,
)
from alula.evaluation.matrix import ScoreMatrix

#              a    b    c    base  prose (bits per byte)
ROWS = [
    [0.1, 0.2, 0.3, 0.8, 1.00],
    [0.9, 0.4, 0.3, 0.7, 1.10],
    [0.6, 0.7, 0.5, 0.6, 1.05],
    [0.5, 0.8, 0.6, 0.5, 1.30],
]
TASKS = {"tasks": ("a", "b", "c"), "base_tasks": ("base", "prose"), "bits_tasks": frozenset({"prose"})}


def matrix(rows: list[list[float]] = ROWS) -> ScoreMatrix:
    return ScoreMatrix(rows=np.array(rows), counts=np.full(5, 100), **TASKS)


def test_average_score_is_the_mean_of_the_last_row_over_tasks_seen() -> None:
    assert matrix().average_score == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert matrix(ROWS[:3]).average_score == pytest.approx((0.6 + 0.7) / 2)


def test_average_over_stages_counts_each_stage_once() -> None:
    assert matrix().average_over_stages == pytest.approx((0.9 + (0.6 + 0.7) / 2 + (0.5 + 0.8 + 0.6) / 3) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert matrix().learning_accuracy == pytest.approx((0.9 + 0.7 + 0.6) / 3)


def test_backward_transfer_is_negative_where_tasks_got_worse() -> None:
    assert matrix().backward_transfer == pytest.approx(((0.5 - 0.9) + (0.8 - 0.7)) / 2)


def test_forward_transfer_compares_with_the_base_model() -> None:
    assert matrix().forward_transfer == pytest.approx(((0.4 - 0.2) + (0.5 - 0.3)) / 2)


def test_forgetting_takes_the_best_earlier_stage_without_base_and_last_row() -> None:
    # a: max(0.9, 0.6) - 0.5 = 0.4; b: max(0.4, 0.7) - 0.8 = -0.1, it may be negative
    assert matrix().forgetting == pytest.approx((0.4 - 0.1) / 2)


def test_forgetting_and_backward_transfer_differ_where_a_task_got_better_on_the_way() -> None:
    rows = [list(row) for row in ROWS]
    rows[2][0] = 0.95  # task a rises after task b, before it falls
    assert matrix(rows).backward_transfer == matrix().backward_transfer
    assert matrix(rows).forgetting == pytest.approx(((0.95 - 0.5) + (0.7 - 0.8)) / 2)
    assert matrix(rows).forgetting > -matrix(rows).backward_transfer


def test_forgetting_ignores_a_base_model_that_was_better() -> None:
    rows = [list(row) for row in ROWS]
    rows[0][0] = 1.0
    assert matrix(rows).forgetting == matrix().forgetting


def test_base_forgetting_is_positive_where_the_base_model_was_better_and_holds_no_bits() -> None:
    assert matrix().base_forgetting == pytest.approx(0.8 - 0.5)
    assert matrix().base_bits_increase == pytest.approx(1.30 - 1.00)


def test_one_task_has_no_backward_transfer_and_no_forgetting() -> None:
    first = matrix(ROWS[:2])
    assert np.isnan([first.backward_transfer, first.forgetting, first.forward_transfer]).all()
    assert first.average_score == pytest.approx(0.9)


def test_an_untrained_model_has_no_average_but_no_warning_either() -> None:
    assert np.isnan(matrix(ROWS[:1]).average_score)
    assert matrix(ROWS[:1]).base_forgetting == 0


def test_what_was_not_measured_is_not_guessed() -> None:
    rows = [list(row) for row in ROWS]
    rows[1][0] = float("nan")
    assert np.isnan(matrix(rows).backward_transfer)
    assert matrix(rows).forgetting == pytest.approx(((0.6 - 0.5) + (0.7 - 0.8)) / 2)  # the best of what was measured


def test_a_published_six_task_matrix_gives_its_published_backward_transfer() -> None:
    # Means given in the literature for one method: after learning 78.54, at the end 73.49 -> BWT -6.06 with six tasks.
    rows = np.full((7, 6), 0.7854)
    rows[-1] = 0.7854 - (0.7854 - 0.7349) * 6 / 5
    rows[-1, -1] = 0.7854
    found = ScoreMatrix(tasks=tuple("abcdef"), rows=rows, counts=np.full(6, 3000))
    assert 100 * found.average_score == pytest.approx(73.49)
    assert 100 * found.backward_transfer == pytest.approx(-6.06, abs=0.001)


def test_a_matrix_of_the_wrong_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"rows \(4, 4\).*wanted|Wanted: rows"):
        ScoreMatrix(rows=np.zeros((4, 4)), counts=np.zeros(5, dtype=int), **TASKS)


def test_summaries_of_many_matrices_equal_those_of_each() -> None:
    many = np.random.default_rng(0).random((7, 4, 5))
    together = matrix().summarise(many)
    for index, rows in enumerate(many):
        alone = matrix(rows.tolist()).summarise()
        assert all(together[name][index] == pytest.approx(float(alone[name]), nan_ok=True) for name in alone)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.random(80) < 0.3, resamples=400, seed=i) for i in range(300)]
    covered = sum(interval is not None and interval.low <= 0.3 <= interval.high for interval in intervals)
    assert 0.90 < covered / 300 < 0.98  # 95 % promised; the standard error of the share is 1.3 %


def test_the_interval_is_as_wide_as_the_standard_error_says() -> None:
    scores = np.arange(200) % 2
    interval = bootstrap_interval(scores, resamples=4000)
    assert interval is not None
    assert interval.half_width == pytest.approx(1.96 * 0.5 / np.sqrt(200), rel=0.06)


def test_equal_seeds_give_equal_intervals() -> None:
    scores = np.arange(50) % 3 / 2
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_a_paired_interval_is_narrower_than_two_separate_ones() -> None:
    first = np.arange(100) % 2
    second = first.copy()
    second[:6] = 1
    paired, alone = paired_interval(second, first), bootstrap_interval(first)
    assert paired is not None and alone is not None
    assert paired.low <= 0.03 <= paired.high and paired.half_width < alone.half_width / 2
    assert paired_interval(first, first) == paired_interval(second, second)
    with pytest.raises(ValueError, match="100 and 99"):
        paired_interval(first, second[1:])


def test_no_scores_have_no_interval() -> None:
    assert bootstrap_interval([]) is None
    assert percentile_interval([0.1, float("nan")]) is None


def test_rows_of_a_task_are_resampled_together() -> None:
    right = (np.arange(40) % 2).astype(float)
    drawn = resample_rows([TaskSamples(name="a", values=np.stack([right, 1 - right, right]))])
    assert drawn.shape == (1000, 3, 1)
    assert np.allclose(drawn[:, 0] + drawn[:, 1], 1) and np.array_equal(drawn[:, 0], drawn[:, 2])


def test_series_and_seeds_share_their_draws_by_task_name() -> None:
    values = np.random.default_rng(0).random((2, 30))
    one, two = TaskSamples(name="a", values=values), TaskSamples(name="b", values=values)
    assert np.array_equal(resample_rows([one, two])[..., 0], resample_rows([two, one])[..., 1])
    assert not np.array_equal(resample_rows([one])[..., 0], resample_rows([two])[..., 0])


def test_bits_per_byte_weigh_samples_by_their_bytes() -> None:
    sizes = np.array([10.0, 90.0])
    drawn = resample_rows([TaskSamples(name="prose", values=np.array([[1.0, 2.0]]), weights=sizes)])[:, 0, 0]
    # Two samples drawn: (short, short) 1.0; (long, long) 2.0; one of each (10 + 180) / 100 bits per byte
    assert {round(float(value), 6) for value in drawn} == {1.0, 1.9, 2.0}


def test_spread_over_seeds_is_the_sample_deviation() -> None:
    found = spread([0.4, 0.6, 0.8])
    assert (found.min, found.max, found.count) == (0.4, 0.8, 3)
    assert found.mean == pytest.approx(0.6) and found.sd == pytest.approx(0.2)
    assert np.isnan(spread([0.4]).sd)
