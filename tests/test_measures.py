"""Claims about every measure, each with its arithmetic written out: value, sign, row 0, what was not measured, references."""

import numpy as np
import pytest

from alula.evaluation.bootstrap import TaskSamples, percentile_interval, resample_rows
from alula.evaluation.matrix import ScoreMatrix
from alula.evaluation.measures import MEASURES, OVER, harmonic_mean

NAN = float("nan")
#              a    b    c    ranked written prose (bits per byte)
ROWS = [
    [0.1, 0.2, 0.3, 0.80, 0.50, 1.00],
    [0.9, 0.4, 0.3, 0.70, 0.40, 1.10],
    [0.6, 0.7, 0.5, 0.60, 0.30, 1.05],
    [0.5, 0.8, 0.6, 0.50, 0.35, 1.30],
]
REFERENCES = {"joint": np.array([0.8, 0.9, 0.7, NAN, NAN, NAN]), "specialist": np.array([0.85, 0.75, 0.65, NAN, NAN, NAN])}
EXPECTED = {
    "average_score": (0.5 + 0.8 + 0.6) / 3,
    "average_over_stages": (0.9 + (0.6 + 0.7) / 2 + (0.5 + 0.8 + 0.6) / 3) / 3,
    "harmonic_score": 3 / (1 / 0.5 + 1 / 0.8 + 1 / 0.6),
    "learning_accuracy": (0.9 + 0.7 + 0.6) / 3,
    "backward_transfer": ((0.5 - 0.9) + (0.8 - 0.7)) / 2,
    "forward_transfer": ((0.4 - 0.2) + (0.5 - 0.3)) / 2,
    "forgetting": ((0.9 - 0.5) + (0.7 - 0.8)) / 2,
    "forgetting_with_last_row": ((0.9 - 0.5) + (0.8 - 0.8)) / 2,
    "forgetting_since_learnt": ((0.9 - 0.5) + (0.7 - 0.8)) / 2,
    "intransigence": ((0.8 - 0.9) + (0.9 - 0.7) + (0.7 - 0.6)) / 3,
    "gap_to_joint": ((0.8 - 0.5) + (0.9 - 0.8) + (0.7 - 0.6)) / 3,
    "gap_to_specialist": ((0.85 - 0.5) + (0.75 - 0.8) + (0.65 - 0.6)) / 3,
    "base_forgetting": ((0.8 - 0.5) + (0.5 - 0.35)) / 2,
    "base_forgetting_understanding": 0.8 - 0.5,
    "base_forgetting_generation": 0.5 - 0.35,
    "base_forgetting_harmonic": 2 / (1 / 0.8 + 1 / 0.5) - 2 / (1 / 0.5 + 1 / 0.35),
    "base_bits_increase": 1.30 - 1.00,
}
LOWER_IS_BETTER = {
    *("forgetting", "forgetting_with_last_row", "forgetting_since_learnt", "intransigence", "gap_to_joint", "gap_to_specialist"),
    *("base_forgetting", "base_forgetting_understanding", "base_forgetting_generation", "base_forgetting_harmonic"),
    *("base_bits_increase", "unparsed_share"),
}


def matrix(rows=ROWS):
    return ScoreMatrix(
        tasks=("a", "b", "c"),
        base_tasks=("ranked", "written", "prose"),
        rows=np.array(rows, dtype=float),
        counts=np.full(6, 100),
        bits_tasks=frozenset({"prose"}),
        ranked_tasks=frozenset({"ranked"}),
    )


def changed(row, column, value, rows=ROWS):
    """The rows with one entry replaced."""
    copy = [list(line) for line in rows]
    copy[row][column] = value
    return copy


def test_every_measure_has_a_hand_computed_value():
    assert set(EXPECTED) | {"unparsed_share"} == set(MEASURES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_measure_equals_its_arithmetic(name):
    assert matrix().value(name, references=REFERENCES) == pytest.approx(EXPECTED[name])
    assert float(matrix().summarise(references=REFERENCES)[name]) == pytest.approx(EXPECTED[name])


def test_unparsed_answers_are_pooled_over_tasks():
    assert MEASURES["unparsed_share"].function(np.array([3, 1]), np.array([10, 30])) == pytest.approx(4 / 40)
    assert np.isnan(MEASURES["unparsed_share"].function(np.array([]), np.array([])))


def test_every_measure_says_what_it_is_which_way_is_better_and_where_it_is_from():
    for name, one in MEASURES.items():
        assert one.name == name and one.function.__name__ == name
        assert one.label and one.formula and one.meaning.endswith(".") and one.over in OVER, name
        assert "arXiv" in one.source or one.source.startswith("ours"), name
        assert one.unit in ("points", "bits", "%") and one.against in ("", "joint", "specialist")
        assert one.higher_is_better == (name not in LOWER_IS_BETTER), name
        assert (one.better, one.scale) == ("higher" if one.higher_is_better else "lower", 1.0 if one.unit == "bits" else 100.0)
    assert len({one.label for one in MEASURES.values()}) == len(MEASURES)


@pytest.mark.parametrize("name", [name for name in EXPECTED if MEASURES[name].over in ("tasks", "earlier")])
def test_a_better_end_never_looks_worse(name):
    before, after = (matrix(rows).value(name, references=REFERENCES) for rows in (ROWS, changed(-1, 0, 0.55)))
    gain = after - before if MEASURES[name].higher_is_better else before - after
    assert gain > 0 or name in ("learning_accuracy", "intransigence")  # those two look at the diagonal


@pytest.mark.parametrize(
    ("name", "base"), [("base_forgetting", 3), ("base_forgetting_understanding", 3), ("base_forgetting_generation", 4)]
)
def test_base_tasks_that_got_worse_are_forgotten_with_a_plus(name, base):
    assert matrix().value(name) > 0
    assert matrix(changed(-1, base, 0.95)).value(name) < matrix().value(name)


def test_more_bits_are_forgotten_with_a_plus():
    assert matrix().value("base_bits_increase") > 0 > matrix(changed(-1, 5, 0.9)).value("base_bits_increase")


def test_understanding_and_generation_are_apart_and_prose_is_in_neither():
    moved = matrix(changed(-1, 3, 0.0))
    assert moved.value("base_forgetting_understanding") == pytest.approx(0.8)
    assert moved.value("base_forgetting_generation") == pytest.approx(EXPECTED["base_forgetting_generation"])
    moved = matrix(changed(-1, 5, 9.0))
    for name in ("base_forgetting", "base_forgetting_understanding", "base_forgetting_generation", "base_forgetting_harmonic"):
        assert moved.value(name) == pytest.approx(EXPECTED[name])


def test_the_base_model_counts_only_where_the_definition_has_row_0():
    moved = matrix([[0.99, 0.99, 0.99, *ROWS[0][3:]], *ROWS[1:]])
    for name in set(EXPECTED) - {"forward_transfer"}:
        assert moved.value(name, references=REFERENCES) == pytest.approx(EXPECTED[name]), name
    assert moved.value("forward_transfer") == pytest.approx(((0.4 - 0.99) + (0.5 - 0.99)) / 2)


def test_tasks_not_learnt_yet_may_be_unmeasured():
    rows = [ROWS[0], *([*(value if j < i else NAN for j, value in enumerate(row[:3])), *row[3:]] for i, row in enumerate(ROWS) if i)]
    found = {name: matrix(rows).value(name, references=REFERENCES) for name in EXPECTED}
    assert np.isnan(found.pop("forward_transfer"))
    for name, value in found.items():
        assert value == pytest.approx(EXPECTED[name]), name


def test_a_stream_on_the_way_is_summed_up_over_the_tasks_learnt():
    half = matrix(ROWS[:3])
    assert half.value("average_score") == pytest.approx((0.6 + 0.7) / 2)
    assert half.value("gap_to_joint", references=REFERENCES) == pytest.approx(((0.8 - 0.6) + (0.9 - 0.7)) / 2)
    assert half.value("forgetting") == half.value("forgetting_with_last_row") == pytest.approx(0.9 - 0.6)


def test_one_task_has_nothing_to_forget():
    first = matrix(ROWS[:2])
    for name in ("forgetting", "forgetting_with_last_row", "forgetting_since_learnt", "backward_transfer", "forward_transfer"):
        assert np.isnan(first.value(name)), name


def test_joint_training_is_not_said_to_forget_nothing():
    joint = matrix([ROWS[0], [NAN] * 6, [NAN] * 6, ROWS[3]])
    for name in ("forgetting", "forgetting_with_last_row", "forgetting_since_learnt", "average_over_stages", "intransigence"):
        assert np.isnan(joint.value(name, references=REFERENCES)), name
    assert joint.value("average_score") == pytest.approx(EXPECTED["average_score"])


def test_three_forgettings_differ_where_a_task_rose_before_it_fell_or_at_the_end():
    rows = changed(2, 0, 0.95)  # a: 0.9 learnt, 0.95, 0.5 at the end; b: 0.7 learnt, 0.8 at the end
    found = matrix(rows)
    assert found.value("forgetting") == pytest.approx(((0.95 - 0.5) + (0.7 - 0.8)) / 2)
    assert found.value("forgetting_with_last_row") == pytest.approx((0.95 - 0.5) / 2)
    assert found.value("forgetting_since_learnt") == pytest.approx(((0.9 - 0.5) + (0.7 - 0.8)) / 2)


def test_forgetting_with_the_last_row_is_never_negative_and_the_others_may_be():
    better = matrix([*ROWS[:3], [0.99, 0.99, 0.99, *ROWS[3][3:]]])
    assert better.value("forgetting_with_last_row") == 0
    assert better.value("forgetting") == pytest.approx(((0.9 - 0.99) + (0.7 - 0.99)) / 2)
    random = np.random.default_rng(0).random((50, 4, 6))
    assert (matrix().summarise(random)["forgetting_with_last_row"] >= 0).all()


def test_scoring_tasks_to_come_changes_no_forgetting():
    rows = changed(1, 1, 0.95)  # b, before it was learnt
    unseen = [[value if column <= row - 1 or column > 2 else NAN for column, value in enumerate(line)] for row, line in enumerate(rows)]
    for name in ("forgetting", "forgetting_with_last_row", "forgetting_since_learnt"):
        assert matrix(rows).value(name) == matrix(unseen).value(name) == pytest.approx(EXPECTED[name])


def test_forgetting_since_learnt_is_backward_transfer_with_the_other_sign():
    found = matrix().summarise(np.random.default_rng(1).random((20, 4, 6)))
    assert np.array_equal(found["forgetting_since_learnt"], -found["backward_transfer"])


def test_last_and_avg_of_multimodal_papers_are_measures_here():
    called = {other: name for name, one in MEASURES.items() for other in one.also_called}
    assert (called["Last"], called["MFN"], called["ACC"]) == ("average_score",) * 3
    assert (called["Avg"], called["MAA"], called["MFT"]) == ("average_over_stages", "average_over_stages", "learning_accuracy")


def test_the_harmonic_mean_gives_published_cells():
    # Srivastava et al. 2025: naive fine-tuning of Pythia-410M at the end of the stream (0.48 %), and a base model on five language tasks
    assert harmonic_mean(np.array([0.4684, 0.3057, 0.0390, 0.1057, 0])) == pytest.approx(0.0048, abs=5e-5)
    assert harmonic_mean(np.array([0.7070, 0.5651, 0.6174, 0.2747, 0.4898])) == pytest.approx(0.4768, abs=5e-5)


def test_a_zero_counts_as_a_tenth_of_a_point_in_a_harmonic_mean():
    assert harmonic_mean(np.array([0.0, 1.0])) == pytest.approx(2 / (1000 + 1))
    assert harmonic_mean(np.array([0.0])) == harmonic_mean(np.array([0.001])) == pytest.approx(0.001)
    assert matrix(changed(-1, 2, 0.0)).value("harmonic_score") == pytest.approx(3 / (1 / 0.5 + 1 / 0.8 + 1000))
    assert np.isnan(harmonic_mean(np.array([])))


def test_without_its_reference_a_gap_is_not_known():
    found = matrix().summarise(references={"joint": REFERENCES["joint"]})
    assert np.isnan(found["gap_to_specialist"]) and np.isfinite(found["gap_to_joint"])
    assert all(np.isnan(matrix().value(name)) for name in ("gap_to_joint", "gap_to_specialist", "intransigence"))


def test_a_gap_is_the_difference_of_average_scores():
    joint = matrix([*ROWS[:3], [*REFERENCES["joint"][:3], *ROWS[3][3:]]])
    assert matrix().value("gap_to_joint", references=REFERENCES) == pytest.approx(joint.average_score - matrix().average_score)


def test_gaps_are_paired_sample_by_sample():
    generator = np.random.default_rng(0)
    own = generator.random((2, 200)) < 0.5  # rows 0 and 1 of one task
    better = own[-1].copy()
    better[:8] = True
    samples = [TaskSamples(name="a", values=own.astype(float))]
    reference = [TaskSamples(name="a", values=better[None].astype(float))]
    one = ScoreMatrix(tasks=("a",), rows=own.mean(1)[:, None], counts=np.array([200]))
    drawn = one.summarise(resample_rows(samples), references={"joint": resample_rows(reference)[:, -1]})["gap_to_joint"]
    interval, alone = percentile_interval(drawn), percentile_interval(resample_rows(samples)[:, -1, 0])
    assert interval is not None and alone is not None
    assert drawn.mean() == pytest.approx(better.mean() - own[-1].mean(), abs=0.002) and (drawn >= 0).all()
    assert interval.half_width < alone.half_width / 3


def test_measures_of_many_matrices_equal_those_of_each():
    many, references = np.random.default_rng(0).random((7, 4, 6)), np.random.default_rng(1).random((7, 6))
    together = matrix().summarise(many, references={"joint": references, "specialist": references})
    for index, rows in enumerate(many):
        alone = matrix(rows).summarise(references={"joint": references[index], "specialist": references[index]})
        assert all(together[name][index] == pytest.approx(float(alone[name])) for name in alone)


def test_a_probe_is_in_the_matrix_and_in_no_measure():
    whole = matrix()
    probed = ScoreMatrix(
        tasks=whole.tasks,
        base_tasks=("ranked", "written", "probe", "prose"),
        rows=np.insert(whole.rows, 5, 0.123, axis=1),
        counts=np.full(7, 100),
        bits_tasks=whole.bits_tasks,
        ranked_tasks=frozenset({"ranked", "probe"}),
        probe_tasks=frozenset({"probe"}),
    )
    assert "probe" in probed.names
    for name, value in whole.summarise().items():
        np.testing.assert_array_equal(probed.summarise()[name], value)
