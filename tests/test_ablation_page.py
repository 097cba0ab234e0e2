"""Effects that a hand can check, on the same test samples only, with intervals that chance alone rarely leaves zero out of."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from alula.evaluation.bootstrap import Interval, TaskSamples
from alula.evaluation.matrix import ScoreMatrix
from alula.files import write_json, write_jsonl
from alula.report.ablation import ablation_tables, build_ablation, damaged_files
from alula.report.effects import Additive, draw_starts, hold_together
from alula.report.findings import write_findings
from alula.report.grid_folder import Ablation, Point, read_ablation
from alula.report.members import Member
from alula.report.outcomes import Estimate, outcomes_of
from alula.report.reading import Cell
from html_page import Page

TABLE = {("a", "x"): 10.0, ("a", "y"): 14.0, ("b", "x"): 20.0, ("b", "y"): 28.0}
LEVELS = {"first": ["a", "b"], "second": ["x", "y"]}


def on_points(table):
    points = [dict(zip(LEVELS, levels, strict=True)) for levels in table]
    return Additive(points, LEVELS), np.array(list(table.values()))


def test_an_effect_is_the_mean_of_the_level_minus_the_grand_mean():
    fit, y = on_points(TABLE)
    assert fit.grand @ y == pytest.approx(18)
    assert fit.effects("first") @ y == pytest.approx([12 - 18, 24 - 18])
    assert fit.effects("second") @ y == pytest.approx([15 - 18, 21 - 18])
    assert fit.means("first") @ y == pytest.approx([12, 24])
    assert fit.interactions()[((("first", "a"), ("second", "x")),)] @ y == pytest.approx(10 - (18 - 6 - 3))


def test_interactions_that_a_half_design_cannot_tell_apart_are_one():
    factors = {name: ["-", "+"] for name in "abcd"}
    points = [dict(zip("abcd", signs, strict=True)) for signs in product("-+", repeat=4) if signs.count("-") % 2 == 0]
    found = Additive(points, factors).interactions()
    assert len(found) == 12 and all(len(either) == 2 for either in found)  # 24 pairs of levels
    assert ((("a", "-"), ("b", "-")), (("c", "-"), ("d", "-"))) in found


def test_where_a_point_is_missing_no_factor_takes_the_effect_of_another():
    fit, y = on_points({key: value for key, value in TABLE.items() if key != ("b", "y")})
    assert fit.effects("first") @ y == pytest.approx([-5, 5])  # 20 - 10; the level means, 12 and 20, are 8 apart
    assert fit.effects("second") @ y == pytest.approx([-2, 2])
    assert fit.interactions() == {}


def test_effects_that_the_points_cannot_tell_apart_are_not_known():
    fit, y = on_points({key: TABLE[key] for key in (("a", "x"), ("b", "y"))})
    assert np.isnan(fit.effects("first") @ y).all()
    only, y = on_points({key: TABLE[key] for key in (("a", "x"), ("b", "x"))})
    assert list(only.factors) == ["first"]
    assert only.effects("first") @ y == pytest.approx([-5, 5])


def test_a_difference_of_few_seeds_has_students_interval():
    values = np.array([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    left = np.eye(6) - np.kron(np.eye(2), np.full((3, 3), 1 / 3))
    drawn = draw_starts(values, np.repeat(values[:, None], 8000, 1), left, np.random.default_rng(0))
    low, high = np.quantile(drawn[3:].mean(0) - drawn[:3].mean(0), [0.025, 0.975])
    assert (low, high) == (pytest.approx(10 - 2.776 * np.sqrt(2 / 3), abs=0.1), pytest.approx(10 + 2.776 * np.sqrt(2 / 3), abs=0.1))


def test_what_test_samples_explain_of_the_spread_is_counted_once():
    generator = np.random.default_rng(0)
    values = generator.standard_normal(300)
    draws, left = values[:, None] + generator.standard_normal((300, 1000)), np.eye(300) - 1 / 300
    assert (draw_starts(values, draws, left, generator) - values[:, None]).std() == pytest.approx(1, abs=0.1)  # twice: 1.41
    assert (draw_starts(3 * values, draws + 2 * values[:, None], left, generator) - 3 * values[:, None]).std() == pytest.approx(3, abs=0.3)


def test_intervals_that_hold_together_are_wider_the_more_there_are():
    draws = np.random.default_rng(0).standard_normal((10, 20000))
    assert hold_together(np.zeros(1), draws[:1])[0].half_width == pytest.approx(1.96, abs=0.05)
    assert hold_together(np.zeros(2), np.stack([draws[0], -draws[0]]))[0].half_width == pytest.approx(1.96, abs=0.05)
    assert hold_together(np.zeros(10), draws)[3].half_width == pytest.approx(2.80, abs=0.06)  # (2 Phi(z) - 1) ** 10 = 0.95
    assert hold_together(np.array([0.0, np.nan]), draws[:2]) == [None, None]


def member(tests, *, bits=()):
    """A finished cell: of each task the ids of its test samples and what they scored in the last row."""
    ids, values = zip(*tests.values(), strict=True)
    rows = np.vstack([np.zeros(len(tests))] * len(tests) + [[np.mean(one) for one in values]])
    return Member(
        cell=Cell(name="cell", method="m", seed=0, folder=Path("cell"), state="finished"),
        arm="default",
        matrix=ScoreMatrix(tasks=tuple(tests), rows=rows, counts=np.array([len(one) for one in ids]), bits_tasks=frozenset(bits)),
        samples=tuple(
            TaskSamples(name=name, values=np.stack([one] * len(rows)).astype(float)) for name, one in zip(tests, values, strict=True)
        ),
        sources={},
        unparsed={},
        unread=(),
        ids=tuple(tuple(one) for one in ids),
    )


def grid(factors, cells, **about):
    """A grid: of each point's levels the cells, each as `member` takes it."""
    points = tuple(
        Point(label="_".join(levels), levels=dict(zip(factors, levels, strict=True)), folder=Path(), cells=(), members=tuple(found))
        for levels, found in cells.items()
    )
    return Ablation(folder=Path(), about={"design": "full", "factors": factors, "expected": [], **about}, points=points)


def right(count, *, of=100, prefix="s"):
    """So many of the samples answered right, the first ones."""
    return [f"{prefix}{number}" for number in range(of)], np.arange(of) < count


def said(ablation, outcomes=None):
    return [str(one.striptags()) for one in write_findings(ablation, outcomes or outcomes_of(ablation))]


def test_levels_that_were_tested_on_other_samples_are_not_compared():
    cells = {
        ("cap",): [member({"pages": right(10, of=30, prefix="cap"), "digits": right(40)})],
        ("doc",): [member({"pages": right(75, of=90, prefix="doc"), "digits": right(50)})],
    }
    found = grid({"data": ["cap", "doc"]}, cells, groups={"all": ["pages", "digits"]}, outcome=["pages", "digits"])
    outcomes = outcomes_of(found)
    assert {one.name: one.num_samples for one in outcomes} == {"digits": 100, "all": 100}  # 83 against 33 is nowhere
    assert outcomes[0].factors[0].gap.value == pytest.approx(10)
    assert "In no effect, since the points were tested on other samples: pages (0 shared of 30 to 90)." in said(found)
    assert not any("interaction" in line.lower() or "full grid" in line for line in said(found))  # one factor alone has none


def test_of_tests_that_overlap_the_shared_samples_are_compared():
    ids, scores = right(75, of=90)
    cells = {("few",): [member({"t": right(10, of=30)})], ("many",): [member({"t": (ids[::-1], scores[::-1])})]}
    found = grid({"size": ["few", "many"]}, cells)
    (outcome,) = outcomes_of(found)
    assert (outcome.num_samples, outcome.factors[0].gap.value) == (30, pytest.approx(100 * (30 - 10) / 30))
    assert outcome.cells == {"few": [pytest.approx(100 * 10 / 30)], "many": [100]}
    assert "Compared on the test samples that all points share: t (30 of 30 to 90)." in said(found)


def null(generator, *, levels, seeds, deviation=0.03, num_samples=288):
    """Cells that differ by luck alone: of the start, and of each answer, half of which is the question's own."""
    hard = generator.random(num_samples)
    ids = [str(number) for number in range(num_samples)]

    def one():
        level = 0.5 + generator.normal(0, deviation)
        return member({"t": (ids, (hard + generator.random(num_samples)) / 2 < level)})

    return {point: [one() for _ in range(seeds)] for point in levels}


def test_the_best_of_four_levels_is_rarely_ahead_by_chance_alone():
    generator, levels, clear = np.random.default_rng(1), [(name,) for name in "abcd"], 0
    for _ in range(100):
        (outcome,) = outcomes_of(grid({"v": list("abcd")}, null(generator, levels=levels, seeds=2)))
        clear += outcome.factors[0].gap.is_clear
    assert clear <= 10  # 5 are expected


def test_one_seed_a_point_takes_the_noise_from_what_the_effects_leave_over():
    generator, names, clear = np.random.default_rng(2), "pqr", 0
    levels = [tuple(f"{number >> place & 1}" for place in range(3)) for number in range(8)]
    for _ in range(60):
        found = grid({name: ["0", "1"] for name in names}, null(generator, levels=levels, seeds=1))
        (outcome,) = outcomes_of(found)
        clear += sum(factor.gap.is_clear for factor in outcome.factors)
    assert clear <= 18  # of 180; 9 are expected
    assert any("what the effects leave over (4 degrees of freedom)" in line for line in said(found))


TASKS = {"animals": 0, "vqa": 4, "digits": -10, "boxes": 20}
GROUPS = {"general": ["animals", "vqa"], "documents": ["digits"], "unscored": ["charts"]}


def ladder(**about):
    """Three levels, each with something more; two seeds, of which the second has one right answer more."""
    cells = {
        (level,): [member({name: right(base + own + seed) for name, own in TASKS.items()}) for seed in (0, 1)]
        for level, base in {"pool": 20, "adt": 22, "router": 60}.items()
    }
    return grid({"parts": ["pool", "adt", "router"]}, cells, steps=["parts"], groups=GROUPS, **about)


def test_ordered_levels_have_steps_with_intervals_for_the_mean_and_for_each_group():
    outcomes = {one.name: one for one in outcomes_of(ladder())}
    assert list(outcomes) == ["average score", "general", "documents", "animals", "vqa", "digits", "boxes"]
    assert [name for name, one in outcomes.items() if one.is_group] == ["general", "documents"]
    assert (outcomes["average score"].num_samples, outcomes["general"].num_samples) == (400, 200)
    for name in ("average score", "general", "documents"):
        (factor,) = outcomes[name].factors
        assert [(step.before, step.level, round(step.value, 6)) for step in factor.steps] == [("pool", "adt", 2), ("adt", "router", 38)]
        assert [step.is_clear for step in factor.steps] == [False, True]
        assert all(step.interval.low < step.value < step.interval.high for step in factor.steps)
    assert [effect.mean for effect in outcomes["documents"].factors[0].effects] == pytest.approx([10.5, 12.5, 50.5])
    sentence = next(line for line in said(ladder()) if "step by step" in line)
    assert sentence.startswith("parts, step by step from pool: adt +2.0 points [")
    assert sentence.index("(noise could explain it), then router +38.0 points") < sentence.index("(more than noise).")


def test_every_outcome_that_the_grid_names_has_its_sentences():
    lines = said(ladder(outcome=["documents", "boxes"]))
    assert [line for line in lines if "depends most" in line] == [f"The {name} depends most on parts." for name in ("documents", "boxes")]
    for name in ("documents", "boxes"):
        assert any(line.startswith("parts: router is 40.0 points [") and f"ahead of pool on the {name}, more" in line for line in lines)


def written(folder, scores, *, seeds=1, **about):
    """A grid's folder with a cell a point and seed, each right on the first so many of 100 samples."""
    points = []
    for levels, count in scores.items():
        label = "_".join(levels)
        points.append({"label": label, "levels": dict(zip(LEVELS, levels, strict=False))})
        for seed in range(seeds):
            cell = folder / "points" / label / "cells" / f"{label}-seed{seed}"
            rows = []
            for row, num_right in ((0, 0), (1, count + seed)):
                values = np.arange(100) < num_right
                lines = [{"id": str(i), "task": "t", "score": float(value), "parsed": True} for i, value in enumerate(values)]
                write_jsonl(cell / "predictions" / f"row{row:02d}" / "default" / "t.jsonl", lines)
                rows.append({"row": row, "after": "t" if row else None, "arm": "default", "task": "t", "is_base": False, "score":
                             float(values.mean()), "num_samples": 100, "unparsed": 0, "metric": "exact_match"})  # fmt: skip
            write_jsonl(cell / "scores.jsonl", rows)
            write_json(cell / "done.json", {"finished": True})
    write_json(folder / "grid.json", {"design": "full", "factors": LEVELS, "expected": [], "points": points, **about})
    return folder


def test_the_effects_of_a_folder_are_those_of_its_scores(tmp_path):
    table = {("a", "x"): 10, ("a", "y"): 14, ("b", "x"): 50, ("b", "y"): 58}
    ablation = read_ablation(written(tmp_path, table, expected=["first", "second"], seeds=2))
    (outcome,) = outcomes_of(ablation)
    assert outcome.grand == pytest.approx(33.5)  # the second seed has one right answer more
    first, second = outcome.factors
    assert [(one.level, round(one.value, 6), one.num_cells) for one in first.effects] == [("a", -21.0, 4), ("b", 21.0, 4)]
    assert [(one.level, round(one.value, 6)) for one in second.effects] == [("x", -3.0), ("y", 3.0)]
    assert (first.best, first.worst, round(first.gap.value, 6), first.gap.is_clear) == ("b", "a", 42.0, True)
    interval = first.effects[1].interval
    assert interval.low < 21 < interval.high
    assert interval.half_width == pytest.approx(1.96 * 100 * np.sqrt(0.42 * 0.58 / 100) / 2, rel=0.15)  # 42 of 100 samples differ
    beyond = {tuple(level for _, level in levels): round(one.value, 6) for one in outcome.interactions for levels in one.either}
    assert beyond == {("a", "x"): 1.0, ("a", "y"): -1.0, ("b", "x"): -1.0, ("b", "y"): 1.0}
    lines = said(ablation, [outcome])
    assert lines[0] == "The t depends most on first."
    assert lines[1].startswith("first: b is 42.0 points [")
    assert any("first matters more than second. That holds" in line for line in lines)
    assert not any("One seed only" in line for line in lines)


def test_a_damaged_file_of_a_finished_cell_is_named_and_in_no_effect(tmp_path):
    folder = written(tmp_path, {("a", "x"): 10, ("a", "y"): 14, ("b", "x"): 50, ("b", "y"): 58})
    scores = folder / "points" / "b_x" / "cells" / "b_x-seed0" / "scores.jsonl"
    scores.write_text(scores.read_text()[:-20])
    (line,) = (line for line in said(read_ablation(folder)) if line.startswith("Damaged"))
    assert "b_x: scores.jsonl" in line and line.endswith("Delete the folder of each such cell and run the grid again.")
    assert damaged_files(folder)[0].startswith("b_x: scores.jsonl")


def test_what_is_the_same_in_every_cell_tells_nothing(tmp_path):
    table = dict.fromkeys((("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")), 0)
    lines = said(read_ablation(written(tmp_path, table)))
    assert lines[0] == "The t is the same in every cell, 0.0 points: it tells no point from another. Train longer, or score bits."


def test_a_larger_difference_that_noise_could_explain_is_not_what_an_outcome_depends_on(tmp_path):
    table = {("a", "x"): 10, ("a", "y"): 14, ("b", "x"): 50, ("b", "y"): 58}
    ablation = read_ablation(written(tmp_path, table, seeds=2))
    (outcome,) = outcomes_of(ablation)
    noisy = Estimate(value=60.0, interval=Interval(low=-20.0, high=140.0))
    vague = replace(outcome.factors[1], gap=noisy, draws=np.linspace(-20, 140, len(outcome.factors[1].draws)))
    lines = said(ablation, [replace(outcome, factors=(vague, outcome.factors[0]))])
    assert lines[0] == "The t depends most on first. It cannot be told apart from second in that."


def test_nothing_is_called_clear_that_noise_could_explain(tmp_path):
    table = {("a", "x"): 50, ("a", "y"): 50, ("b", "x"): 51, ("b", "y"): 50}
    folder = written(tmp_path, table, expected=["second", "first"], outcome="t")  # as older folders name it
    told = ablation_tables(folder)
    assert told.startswith("- No factor makes a difference to the t that is more than noise.")
    assert "| more than noise |" not in told
    assert "cannot be told" in told
    assert "hollow" in build_ablation(folder).read_text()


def test_the_page_shows_each_step_and_which_encoder_counts_for_which_group(tmp_path):
    about = {"factors": {"first": ["a", "b"]}, "steps": ["first"], "groups": {"shapes": ["t", "u"]}}
    folder = written(tmp_path, {("a",): 10, ("b",): 60}, seeds=2, **about)
    part = {"tasks": ["t", "u", "v"], "encoders": ["vit", "patch"], "importance": [[0.2, 0.8], [0.6, 0.4], [1, 0]], "weights": [[1, 1]] * 3}
    write_json(folder / "points/a/cells/a-seed0/shares.json", {"encoders": part})
    text = Page(build_ablation(folder).read_text()).text
    assert "Step by step" in text and "+50.0 [" in text and "n = 100" in text
    shares = text.partition("Which encoder counts")[2].partition("All points")[0]
    assert "shapes patch 60% vit 40%" in shares or "shapes vit 40% patch 60%" in shares
    assert "| first | a | b | +50.0 | [" in ablation_tables(folder)
