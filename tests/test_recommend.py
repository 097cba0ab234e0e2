"""A recommendation: what is not allowed is out before training, a short pilot measures the rest, one rule decides."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from alula.cli.recommend import BYTES, SECONDS, read_amount
from alula.data.collate import Collator
from alula.data.forecast import DecoderShape
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.errors import UserError
from alula.evaluation.bootstrap import Interval, bootstrap_interval
from alula.methods import ADDITIONS, METHODS
from alula.running.candidates import Limits, Line, candidates, constrain, decide, extrapolate_seconds, judge
from alula.running.memory import Sizes, batch_bytes, estimate_memory, longest_row, measure_sizes
from alula.training import TrainSettings
from zoo import build

SIZES = Sizes(model=1000, decoder=800, rank=1, batch=50)


def by_name():
    return {candidate.name: candidate for candidate in candidates(TrainSettings(steps=1, learning_rate=1e-3))}


def allowed(limits, *, num_tasks=2):
    lines = [constrain(candidate, SIZES, limits, num_tasks=num_tasks) for candidate in by_name().values()]
    return {line.name for line in lines if not line.out}


def test_the_candidates_have_the_methods_of_the_study():
    found = {name: (one.choice.name, [addition.name for addition in one.choice.additions]) for name, one in by_name().items()}
    assert found["soft_targets"] == ("finetune_full", ["soft_targets"])
    assert found["msgm"] == ("lora", ["soft_targets"])
    assert found["msgm_rehearsal"] == ("lora", ["soft_targets", "rehearsal"])
    assert all(method in METHODS and set(additions) <= set(ADDITIONS.names()) for method, additions in found.values())


def test_without_old_data_joint_training_and_rehearsal_are_out():
    assert set(by_name()) - allowed(Limits()) == {"joint", "joint_full", "rehearsal", "msgm_rehearsal"}
    assert allowed(Limits(keeps_old_data=True)) == set(by_name())


def test_full_fine_tuning_is_out_where_memory_allows_only_an_expert_and_a_batch():
    low_rank = {"finetune", "routed", "joint", "rehearsal", "msgm", "msgm_rehearsal"}
    assert allowed(Limits(keeps_old_data=True, memory=2000)) == low_rank
    assert allowed(Limits(keeps_old_data=True, memory=1100)) == low_rank - {"msgm", "msgm_rehearsal"}
    assert allowed(Limits(keeps_old_data=True, memory=1050)) == set()  # 1000 + 4 x 8 without the batch


def test_memory_is_weights_and_experts_and_three_times_what_trains_and_a_batch():
    assert estimate_memory(SIZES, rank=8, num_experts=1) == 1000 + 8 + 3 * 8 + 50
    assert estimate_memory(SIZES, rank=8, num_experts=5) == 1000 + 5 * 8 + 3 * 8 + 50
    assert estimate_memory(SIZES, rank=None, num_experts=1) == 1000 + 3 * 800 + 50
    assert constrain(by_name()["routed"], SIZES, Limits(), num_tasks=5).memory == 1000 + 5 * 8 + 3 * 8 + 50


def test_a_batch_keeps_activations_and_logits_of_one_forward():
    shape = DecoderShape(hidden_size=10, num_layers=2, vocab_size=100, value_bytes=2)
    checkpointed = {"activation_checkpointing": True}
    for changes, rows, activations in (({}, 4, 34 * 10 * 2), ({"micro_batch_size": 1}, 1, 680), (checkpointed, 4, 680 // 17)):
        found = batch_bytes(shape, TrainSettings(batch_size=4, **changes), tokens=3)
        assert found == rows * 3 * (activations + 8 * 100), changes


@pytest.mark.parametrize("name", ["finetune", "routed", "lora", "finetune_full"])
def test_what_a_candidate_trains_is_what_its_memory_counts(name):
    model, _ = build("llava")
    settings = TrainSettings(batch_size=4)
    sizes = measure_sizes(model, settings=settings, tokens=7)
    shape = DecoderShape(hidden_size=64, num_layers=4, vocab_size=model.config.text_config.vocab_size, value_bytes=4)
    assert sizes.batch == shape.batch_bytes(4, 7)
    assert sizes.model == sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    method, task = METHODS[name](model, settings=settings), Task(name="one", train=[Sample.ask("a", "b")], test=[])
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    trained = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad)
    ranks = {candidate.rank for candidate in by_name().values() if candidate.choice.name == name}
    assert {sizes.decoder if rank is None else sizes.rank * rank for rank in ranks} == {trained}


def test_the_longest_row_has_the_tokens_that_its_batch_has():
    processor = build("llava")[1]
    samples = [Sample.ask("why?", "so", images=[Image.new("RGB", (30, 30))]), Sample.ask("why is this so, and since when? " * 3, "so")]
    collator = Collator(processor)
    for chosen in (samples[:1], samples):
        assert longest_row(processor, chosen) == max(collator([sample])["input_ids"].shape[1] for sample in chosen)


def test_full_fine_tuning_learns_at_a_tenth_of_the_rate():
    assert by_name()["finetune_full"].choice.train == {"learning_rate": pytest.approx(1e-4)}


def line(name, score, *, seconds=60.0, lost=0.0, spread=0.0, memory=1):
    interval = Interval(low=lost - spread, high=lost + spread)
    return Line(name=name, memory=memory, score=score, num_samples=9, lost=lost, lost_interval=interval, num_base=100, seconds=seconds)


def test_the_best_score_wins_where_it_is_clear():
    lines = [line("cheap", 0.5, seconds=1), line("dear", 0.9, seconds=9)]
    assert decide(lines, is_clear=lambda best, other: True) == ("dear", ["dear"])


def test_of_what_cannot_be_told_apart_the_cheapest_is_taken():
    lines = [line("cheap", 0.5, seconds=1), line("dear", 0.9, seconds=9), line("cheaper", 0.1, seconds=0.5)]
    assert decide(lines, is_clear=lambda best, other: other == "cheaper") == ("cheap", ["cheap", "dear"])


def possible(name, score, **numbers):
    return replace(line(name, score, **numbers), unsure="may lose up to 2 points")


def test_what_keeps_the_limit_goes_before_what_is_only_possible_where_scores_are_equal():
    lines = [possible("fast", 0.5, seconds=1), line("slow", 0.5, seconds=9), line("slower", 0.5, seconds=99)]
    assert decide(lines, is_clear=lambda best, other: False) == ("slow", ["fast", "slow", "slower"])


def test_what_is_only_possible_wins_where_it_is_ahead_or_alone():
    lines = [possible("fast", 0.5, seconds=1), possible("best", 0.9, seconds=9), line("sure", 0.5)]
    assert decide(lines, is_clear=lambda best, other: True)[0] == "best"
    assert decide(lines[:2], is_clear=lambda best, other: False)[0] == "fast"


def test_where_times_are_about_equal_less_memory_decides():
    lines = [line("large", 0.5, seconds=1, memory=9), line("small", 0.5, seconds=1.2), line("slow", 0.5, seconds=2, memory=0)]
    assert decide(lines, is_clear=lambda best, other: False)[0] == "small"


def test_time_in_full_grows_with_the_steps_but_not_with_what_is_only_looked_at():
    trained = {"steps": 10, "samples_seen": 40, "seconds": 8.0}
    assert extrapolate_seconds([trained], batch_size=4, factor=6) == pytest.approx(48)
    half_looking = {"steps": 10, "samples_seen": 160, "seconds": 8.0}  # 120 samples forward only: as long as 40 that are learnt
    assert extrapolate_seconds([half_looking, trained], batch_size=4, factor=6) == pytest.approx(4 * 6 + 4 + 48)


def test_what_is_out_is_not_recommended_and_nothing_is_where_all_is_out():
    out = replace(line("best", 0.9), out="too large")
    assert decide([out, line("second", 0.2)], is_clear=lambda best, other: True)[0] == "second"
    assert decide([out], is_clear=lambda best, other: True) == (None, [])


@pytest.mark.parametrize(
    ("measured", "verdict", "says"),
    [
        (line("keeps", 0.5), "fits", ""),
        (line("just", 0.5, lost=0.004, spread=0.006), "fits", ""),
        (line("gains", 0.5, lost=-0.3, spread=0.1), "fits", ""),
        (line("slow", 0.5, seconds=7201), "out", "would train for 2 h"),
        (line("loses", 0.5, lost=0.05, spread=0.03), "out", "loses 5.0 points on base tasks, and 1 may be lost"),
        (line("may", 0.5, lost=0.0, spread=0.03), "possible", "may lose up to 3.0 points on base tasks, and 1 may be lost; about 900 "),
        (line("will", 0.5, lost=0.03, spread=0.025), "possible", "may lose up to 5.5 points on base tasks, and 1 may be lost; about 160 "),
        (line("even", 0.5, lost=0.01, spread=0.02), "possible", "may lose up to 3.0 points on base tasks, and 1 may be lost"),
        (replace(line("without", 0.5, lost=0.05), lost_interval=None), "out", "loses 5.0 points"),
        (replace(line("unmeasured", 0.5, lost=float("nan")), lost_interval=None), "fits", ""),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_method_is_out_only_if_its_whole_interval_breaks_the_default_limit(measured, verdict, says):
    found = judge(measured, Limits(seconds=7200))
    assert found.verdict == verdict
    assert (found.out or found.unsure).startswith(says)
    assert bool(found.out or found.unsure) == bool(says)


def lost(*, flipped, count):
    """The judged line of a method that lost so many of its base tasks' samples."""
    scores = np.repeat([1.0, 0.0], [flipped, count - flipped])
    measured = replace(line("one", 0.5, lost=float(scores.mean())), num_base=count, lost_interval=bootstrap_interval(scores))
    return judge(measured, Limits())


def test_one_flipped_answer_of_64_puts_nothing_out_and_the_samples_that_are_named_would_tell():
    found = lost(flipped=1, count=64)
    assert (found.verdict, found.enough) == ("possible", 64 * 5.5555**2 // 1 + 1)  # (3 - 1) / 64 above, limit .005625 away
    assert found.unsure.endswith("about 2,000 of their samples would tell, here were 64")
    assert lost(flipped=15, count=15 * 64).verdict == "possible"
    assert lost(flipped=45, count=45 * 64).verdict == "out"
    assert lost(flipped=0, count=64).verdict == "fits"


def test_amounts_are_read_with_their_units():
    assert read_amount("16GB", BYTES, option="--memory", example="16GB") == 16e9
    assert read_amount("1.5 h", SECONDS, option="--time", example="2h") == 5400
    assert read_amount(None, SECONDS, option="--time", example="2h") is None
    for wrong in ("16", "GB", "16 pounds", "0GB", "-1GB"):
        with pytest.raises(UserError, match="--memory 16GB"):
            read_amount(wrong, BYTES, option="--memory", example="16GB")
