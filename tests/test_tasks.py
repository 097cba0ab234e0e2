"""Claims about the built-in tasks: every one, over the registry."""

import collections
import re
import time
from functools import cache
from importlib.resources import files
from itertools import pairwise

import pytest
from PIL import Image

from alula.data.stream import SCORINGS, Task
from alula.data.tasks import INFO, LANGUAGES, TASKS, describe, general_prompts, load_task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.ranked import ranked_samples
from alula.data.tasks.selection import choose
from alula.errors import UserError

NAMES = TASKS.names()
LEARNT = [name for name in NAMES if INFO[name].held_out[:11] != "a base task"]
RANKED = ["antonym", "capital", "definition"]
ASSETS = files("alula.data.tasks.assets")


@cache
def small(name: str) -> Task:
    return load_task(name, train_size=20, test_size=10)


@cache
def middling(name: str) -> Task:
    return load_task(name, train_size=800, test_size=300)


@cache
def whole(name: str) -> Task:
    return load_task(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_task_builds_in_three_seconds_of_work(name: str) -> None:
    start = time.process_time()  # processor time: other work on the machine is not ours
    task = load_task(name, train_size=20, test_size=10)
    assert time.process_time() - start < 3
    assert len(task.test) == 10 and len(task.train) == (0 if task.is_base else 20)
    assert task.name == name and task.scoring in SCORINGS


@pytest.mark.parametrize("name", LEARNT)
def test_images_open_and_stay_bytes_until_then(name: str) -> None:
    for sample in [*small(name).train, *small(name).test]:
        assert [type(source) for source in sample.images] == [bytes]
        (image,) = sample.open_images()
        assert isinstance(image, Image.Image) and image.mode == "RGB" and 32 <= min(image.size) <= max(image.size) <= 160
        assert image.getextrema() != ((255, 255),) * 3


@pytest.mark.parametrize("name", [name for name in LEARNT if name.split("_")[-1] not in ("ja", "sw", "ur")])
def test_no_test_image_is_in_train(name: str) -> None:
    task = middling(name)
    train = {image for sample in task.train for image in sample.images}
    assert not train & {image for sample in task.test for image in sample.images}


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_every_sample(name: str) -> None:
    again, other = load_task(name, train_size=20, test_size=10), load_task(name, train_size=20, test_size=10, seed=1)
    assert (again.train, again.test) == (small(name).train, small(name).test)
    assert other.test != again.test


@pytest.mark.parametrize("name", ["emoji_ja", "scenes", "capital", "words"])
def test_a_smaller_choice_is_part_of_a_larger_one(name: str) -> None:
    assert load_task(name, train_size=5, test_size=5).test == small(name).test[:5]


@pytest.mark.parametrize("name", NAMES)
def test_questions_and_answers_are_whole(name: str) -> None:
    task = small(name)
    samples = [*task.train, *task.test]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.answer == sample.answer.strip() != ""
        assert "  " not in sample.question and "{" not in sample.question and "None" not in sample.question
        assert bool(sample.question) == (task.scoring != "bits_per_byte")
        assert sample.language in INFO[name].languages


@pytest.mark.parametrize("name", RANKED)
def test_ranked_options_hold_the_answer_once_in_any_place(name: str) -> None:
    places: collections.Counter[int] = collections.Counter()
    for sample in whole(name).test:
        assert len(set(sample.options)) == 4 and sample.options.count(sample.answer) == 1
        places[sample.options.index(sample.answer)] += 1
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 0.4 * places.total()


def test_base_tasks_are_never_trained() -> None:
    base = [name for name in NAMES if small(name).is_base]
    assert [name for name in base if not name.startswith("iit_")] == ["antonym", "capital", "definition", "prose"]
    assert len(base) == 4 + 6  # and the six settings of the interleaved benchmark


@pytest.mark.parametrize("name", ["easy_vqa", "emoji_en", "flags", "scenes", "charts", "digits", "words", "maps", "animals"])
def test_blind_level_is_what_is_said(name: str) -> None:
    task = whole(name) if name == "easy_vqa" else middling(name)  # easy-VQA has many phrasings, and is not drawn
    answers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for sample in task.train:
        answers[sample.question][sample.answer] += 1
    # Ties go to any of the commonest answers; 0.04 is two standard errors of .2 on 300 samples.
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    blind = sum(guesses.get(sample.question) == sample.answer for sample in task.test) / len(task.test)
    assert blind == pytest.approx(INFO[name].blind, abs=0.04)


@pytest.mark.parametrize("name", ["easy_vqa", "emoji_en", "flags", "animals"])
def test_every_answer_of_a_closed_task_can_be_learnt(name: str) -> None:
    assert {sample.answer for sample in whole(name).test} <= {sample.answer for sample in whole(name).train}


@pytest.mark.parametrize("kind", ["emoji", "flags", "maps", "animals"])
def test_languages_are_real(kind: str) -> None:
    names = [f"{kind}_{code}" if f"{kind}_{code}" in TASKS else kind for code in LANGUAGES]
    english, japanese, swahili, urdu = ([*small(name).train, *small(name).test] for name in names)
    assert all(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", s.question) for s in japanese)
    assert all(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", s.answer) for s in japanese)
    assert all(re.search(r"[\u0600-\u06ff]", s.question + s.answer) for s in urdu)
    assert {s.question for s in english}.isdisjoint(s.question for s in swahili)
    assert {s.language for s in swahili} == {"sw"}


def test_animals_ask_as_emoji_do() -> None:
    for language in LANGUAGES:
        animals = small("animals" if language == "en" else f"animals_{language}")
        assert {s.question for s in animals.test} == {s.question for s in small(f"emoji_{language}").test}


def test_words_of_the_test_are_new_in_every_language() -> None:
    task = whole("words")
    assert {s.answer for s in task.test}.isdisjoint(s.answer for s in task.train)
    assert collections.Counter(s.language for s in task.test) == dict.fromkeys(LANGUAGES, 100)


@pytest.mark.parametrize("name", ["emoji_en", "flags", "scenes"])
def test_held_out_vendors_are_not_in_train(name: str) -> None:
    rows = read_table("emoji" if name in ("emoji_en", "scenes") else "flags")
    style = "vendor" if "vendor" in rows[0] else "style"
    splits = collections.defaultdict(set)
    for row in rows:
        splits[row["split"]].add(row[style])
    assert len(splits["train"]) == 3 and len(splits["test"]) == 1 and not splits["train"] & splits["test"]


def test_scene_counts_are_balanced_and_written_right() -> None:
    counted = [s for s in middling("scenes").train if s.question.startswith("How many")]
    counts = collections.Counter(s.answer for s in counted)
    assert set(counts) == set("12345") and max(counts.values()) < 2 * min(counts.values())
    assert not any(re.search(r"(fishs|butterflys|buss|strawberrys)\b", s.question) for s in counted)


def test_digit_sums_are_right() -> None:
    for sample in middling("digits").test:
        if sample.question == "Which digits are written?":
            assert re.fullmatch(r"\d\d", sample.answer)
        if "sum" in sample.question:
            assert 0 <= int(sample.answer) <= 18


def test_no_map_has_stripes() -> None:
    for row in read_table("maps"):
        for ring in row["rings"]:
            longitudes = ring[::2]
            assert all(abs(a - b) < 180 for a, b in pairwise(longitudes)), row["code"]


def test_flags_that_look_alike_are_not_asked() -> None:
    codes = {row["code"] for row in read_table("flags")}
    assert not codes & {"TD", "RO", "ID", "MC"} and {"JP", "KE", "PK", "BR"} <= codes


def test_general_prompts_share_no_question_and_no_sentence_with_base_tasks() -> None:
    prompts = general_prompts()
    assert len(prompts) == 300 == len({sample.question for sample in prompts})
    assert not any(sample.images or sample.options for sample in prompts)
    asked = {sample.question for name in RANKED for sample in whole(name).test}
    assert not asked & {sample.question for sample in prompts}
    prose = " ".join(sample.answer for sample in whole("prose").test)
    repeated = [sample.answer for sample in prompts if sample.question.startswith("Repeat")]
    assert repeated and not any(answer in prose for answer in repeated)
    defined = {sample.answer for sample in whole("definition").test}
    explained = {s.question.removeprefix("Explain in a few words: ").rstrip(".") for s in prompts if "Explain" in s.question}
    assert explained and not explained & defined


def test_prose_passages_are_of_one_length_class() -> None:
    lengths = [len(sample.answer) for sample in whole("prose").test]
    assert len(lengths) == 400 and min(lengths) >= 200 and max(lengths) <= 400


def test_every_asset_is_in_the_notice_and_together_they_are_small() -> None:
    notice = ASSETS.joinpath("NOTICE").read_text(encoding="utf-8")
    tables = [entry for entry in ASSETS.iterdir() if entry.name.endswith(".parquet")]
    assert tables and [table.name for table in tables if table.name not in notice] == []
    assert set(re.findall(r"\b\w+\.parquet", notice)) == {table.name for table in tables}
    assert sum(len(table.read_bytes()) for table in tables) < 8e6
    assert not re.search(r"\b(GPL|ODbL|BY-SA)\b", notice)


def test_every_task_is_described() -> None:
    table = describe()
    assert sorted(table) == NAMES
    for name, info in table.items():
        assert info.licence and info.held_out and set(info.languages) <= set(LANGUAGES)
        assert str(info) == small(name).description


def test_sizes_beyond_all_are_all_and_below_nothing_are_refused() -> None:
    assert len(load_task("capital", test_size=10_000).test) == len(whole("capital").test)
    assert load_task("capital", test_size=0).test == []
    with pytest.raises(UserError, match="test_size is -1"):
        load_task("capital", test_size=-1)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'flags'"):
        load_task("flag")


def test_a_missing_table_says_what_to_do() -> None:
    with pytest.raises(UserError, match="Install alula again"):
        read_table("no_such_table")


def test_choice_and_options_depend_on_the_seed_alone() -> None:
    assert choose(range(9), size=3, seed=0, name="x") == choose(range(9), size=3, seed=0, name="x")
    item = ("Which?", "a", ["b", "c", "d"])
    assert {ranked_samples([item], name="x", seed=seed)[0].options.index("a") for seed in range(20)} == {0, 1, 2, 3}
