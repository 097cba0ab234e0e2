"""Claims about answers and scores, on tiny random models: batched evaluation equals what is computed by hand."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alula.data.collate import Collator
from alula.data.sample import Message, Sample
from alula.data.stream import Task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.ranking import rank_options
from alula.evaluation.scores import Prediction, closed_answers, exact_match, normalise, score_task
from zoo import build
from zoo.parts import picture

MODELS = ("qwen2_vl", "llava")


@pytest.fixture(scope="module", params=MODELS)
def parts(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Collator]:
    model, processor = build(request.param)
    return model, Collator(processor)


def colours(**fields: object) -> list[Sample]:
    """Samples of different lengths, with and without a picture."""
    asked = ["what colour?", "how many red circles are there?", "is the star left of the square?", "what?", "red?"]
    return [
        Sample.ask(text, ("red", "blue")[i % 2], images=(picture(i, 40, 60),) if i % 2 == 0 else (), id=str(i), **fields)
        for i, text in enumerate(asked)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Red. ", "red"),
        ("“Nairobi”", "nairobi"),
        ("the\n cat", "the cat"),
        ("Die Straße!", "die strasse"),
        ("« Le Chat »", "le chat"),
        ("ＡＢＣ１２", "abc12"),
        ("「猫」。", "猫"),
        ("是。", "是"),
        ("قطة؟", "قطة"),
        ("बिल्ली।", "बिल्ली"),
        ("¿Cuántos? 12,5", "¿cuántos? 12,5"),
        ("3.14.", "3.14"),
        ("don't", "don't"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_case_width_quotes_and_final_punctuation(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(normalise(text)) == expected


def test_every_reference_counts_and_the_rest_scores_zero() -> None:
    assert exact_match("Dog.", ("hound", "dog")).score == 1
    assert exact_match("a dog", ("hound", "dog")).score == 0


def test_a_wrong_answer_of_the_task_is_parsed_and_another_form_is_not() -> None:
    known = frozenset({"cat", "hen"})
    assert exact_match("Hen", ("cat",), known_answers=known).parsed
    for chatter in ("", "4", "The animal is a hen", "hen\nhen\nhen"):
        scored = exact_match(chatter, ("cat",), known_answers=known)
        assert (scored.score, scored.parsed) == (0, False)


def test_where_answers_are_open_only_what_is_empty_or_does_not_end_is_unparsed() -> None:
    assert exact_match("38", ("37",)).parsed
    assert not exact_match("", ("37",)).parsed
    assert not exact_match("37 and then", ("37",), ended=False).parsed
    assert not exact_match("38\nQuestion:", ("37",)).parsed
    assert exact_match("37", ("37",), ended=False).parsed  # right is right


def test_the_answer_set_is_closed_where_answers_come_again() -> None:
    rows = [Sample.ask("q", answer) for answer in ("cat", "hen", "Cat.", "hen")]
    assert closed_answers(Task(name="t", train=(), test=rows)) == {"cat", "hen"}
    assert closed_answers(Task(name="t", train=(), test=rows[:3])) is None


def one_by_one(model: PreTrainedModel, collator: Collator, sample: Sample, *, count: int) -> Tensor:
    """Greedy tokens without `generate`, cache, batch or padding: the whole row again for each token."""
    inputs = collator.prompts([sample])
    answer: list[Tensor] = []
    for _ in range(count):
        with torch.no_grad():
            answer.append(model(**inputs).logits[:, -1].argmax(-1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[-1][:, None]], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 1, dtype=torch.long)], 1)
    return torch.cat(answer)


def test_generated_answers_equal_greedy_decoding_by_hand(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    task = Task(name="colours", train=(), test=colours(), max_new_tokens=4)
    predictions = evaluate_task(model, collator, task, batch_size=3)
    ends = {model.generation_config.eos_token_id, collator.tokenizer.eos_token_id}
    for sample, found in zip(task.test, predictions, strict=True):
        tokens = one_by_one(model, collator, sample, count=4).tolist()
        first_end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert found.output == collator.tokenizer.decode(tokens[:first_end], skip_special_tokens=True).strip()
        assert (found.id, found.reference) == (sample.id, sample.answer)


def continuation_by_hand(model: PreTrainedModel, collator: Collator, sample: Sample, option: str) -> float:
    """Mean log-likelihood of the option's tokens, one row, token by token."""
    batch = collator.continuations([sample], [[option]])
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        logits = model(**batch).logits[0]
    places = [place for place in range(len(labels)) if labels[place] != -100]
    return sum(logits[place - 1].log_softmax(-1)[labels[place]].item() for place in places) / len(places)


def test_the_ranked_answer_has_the_best_likelihood_for_each_token(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    options = ("red", "blue", "two red circles")
    task = Task(name="ranked", train=(), test=colours(options=options), scoring="ranked")
    for sample, found in zip(task.test, evaluate_task(model, collator, task, batch_size=6), strict=True):
        by_hand = [continuation_by_hand(model, collator, sample, option) for option in options]
        ranked = rank_options(model, collator, [sample, *task.test[:2]], device=model.device)
        assert ranked[0] == pytest.approx(by_hand, rel=1e-4)
        assert found.output == options[by_hand.index(max(by_hand))]
        assert found.score == float(found.output == sample.answer)
        assert found.options == options


def test_bits_per_byte_are_all_nats_over_all_bytes(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    texts = ("the square is red", "two circles, the star is left of the square", "naïve 红")
    rows = [Sample(id=text, messages=(Message(role="assistant", content=text),)) for text in texts]
    task = Task(name="prose", train=(), test=rows, scoring="bits_per_byte", is_base=True)
    predictions = evaluate_task(model, collator, task, batch_size=2)
    nats = 0.0
    for row in rows:
        batch = collator([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        nats += nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum").item()
    size = sum(len(text.encode()) for text in texts)
    found = score_task(task, predictions)
    assert found.score == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert not found.higher_is_better and found.num_samples == 3
    assert [row.bytes for row in predictions] == [17, 43, 10]  # ï is two bytes, 红 three


def test_batch_size_changes_no_answer(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    task = Task(name="colours", train=(), test=colours(), max_new_tokens=3)
    alone, together = (evaluate_task(model, collator, task, batch_size=size) for size in (1, 5))
    assert alone == together


def test_the_model_comes_back_in_its_mode_and_the_limit_takes_the_first(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    moves: list[tuple[int, int]] = []
    task = Task(name="colours", train=(), test=colours(), max_new_tokens=2)
    model.train()
    found = evaluate_task(model, collator, task, batch_size=2, limit=3, seed=5, method="m", progress=lambda *move: moves.append(move))
    assert model.training
    model.eval()
    assert [row.id for row in found] == ["0", "1", "2"] and moves == [(2, 3), (3, 3)]
    assert {(row.seed, row.method, row.task) for row in found} == {(5, "m", "colours")}


def test_around_is_entered_once_for_each_batch_with_that_batch(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    seen: list[int] = []

    @contextlib.contextmanager
    def around(batch: dict[str, Tensor]) -> Iterator[None]:
        seen.append(len(batch["input_ids"]))
        yield

    evaluate_task(model, collator, Task(name="a", train=(), test=colours(), max_new_tokens=1), batch_size=2, around=around)
    ranked = Task(name="b", train=(), test=colours(options=("red", "blue")), scoring="ranked")
    evaluate_task(model, collator, ranked, batch_size=4, around=around)
    assert seen == [2, 2, 1, 4, 4, 2]


def test_a_sample_that_cannot_be_ranked_is_named(parts: tuple[PreTrainedModel, Collator]) -> None:
    model, collator = parts
    for options, reason in (((), "0 options came"), (("green", "two"), "is none of the options")):
        task = Task(name="t", train=(), test=[Sample.ask("q", "red", options=options, origin="d.jsonl:7")], scoring="ranked")
        with pytest.raises(UserError, match=f"d.jsonl:7.*{reason}"):
            evaluate_task(model, collator, task, batch_size=2)


def test_a_prediction_row_leaves_out_what_does_not_apply() -> None:
    row = Prediction(id="1", task="t", prompt="p", reference="r", output="o", score=1.0).as_row()
    assert set(row) == {"id", "task", "prompt", "reference", "output", "score", "parsed", "method", "seed"}
    prose = Prediction(id="1", task="t", prompt="", reference="r", output="", score=2.0, loss_bits=8.0, bytes=4).as_row()
    assert (prose["loss_bits"], prose["bytes"]) == (8.0, 4)
