"""Claims about rows: every usual form is read, and what cannot be read is named by file and line."""

from pathlib import Path
from typing import Any

import pytest

from alula.data import Sample, check_images, read_samples
from alula.errors import UserError
from data_files import chat, contents, data_uri, png, put_pictures, qa, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_pictures(tmp_path)


def read_one(folder: Path, row: Any) -> Sample:
    (sample,) = read_samples(written(folder, row))
    return sample


ASKED = [("user", "<image>\nwhat?"), ("assistant", "red")]
DATA_URI = data_uri(png())
FORMS = {
    "llava": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]},
    "llava list": {
        "image": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    },
    "messages": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
    },
    "messages, one image as a string": {
        "images": "a.png",
        "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
    },
    "typed parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    },
    "image_url": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": "red"},
        ]
    },
    "image_url with a data address": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA_URI}}, {"type": "text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": "red"},
        ]
    },
    "input_image": {
        "messages": [
            {"role": "user", "content": [{"type": "input_image", "image_url": DATA_URI}, {"type": "input_text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "red"}]},
        ]
    },
    "sharegpt": {"images": ["a.png"], "conversations": [{"from": "human", "value": "what?"}, {"from": "chatgpt", "value": "red"}]},
    "coin": {"image": "./a.png", "text": "what?", "answer": "red"},
    "instruction": {"images": ["a.png"], "instruction": "what?", "input": "", "output": "red"},
    "no placeholder": {"image": "a.png", "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]},
    "question": {"image": "a.png", "question": "what?", "answer": "red"},
    "prompt as text": {"image": "a.png", "prompt": "what?", "completion": "red"},
    "prompt as messages": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": "what?"}],
        "completion": [{"role": "assistant", "content": "red"}],
    },
    "texts": {"images": ["a.png"], "texts": [{"user": "what?", "assistant": "red"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sample(folder: Path, form: str) -> None:
    sample = read_one(folder, FORMS[form])
    assert contents(sample) == ASKED
    assert sample.images == ((png(),) if DATA_URI in str(FORMS[form]) else (folder / "a.png",))
    assert (sample.id, sample.origin, sample.language) == ("data.jsonl:1", "data.jsonl:1", "en")


def test_ids_options_and_accepted_answers_are_kept(folder: Path) -> None:
    row = {"id": 7, "question": "how many?", "answer": ["2", "two"], "options": ["1", "2"], "language": "sw", "source": "x"}
    sample = read_one(folder, row)
    assert (sample.id, sample.answer, sample.accepted, sample.options, sample.language) == ("7", "2", ("two",), ("1", "2"), "sw")
    assert sample.images == ()


def test_sharegpt_rows_keep_their_system_message_and_coin_rows_their_number(folder: Path) -> None:
    sharegpt = {"system": "be short", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]}
    assert contents(read_one(folder, sharegpt))[0] == ("system", "be short")
    assert read_one(folder, {"question_id": 7, "text": "what?", "answer": "red"}).id == "7"
    said = read_one(folder, chat(("system", "a"), ("user", "b"), ("assistant", "c"), system="d"))
    assert contents(said)[0] == ("system", "a")  # the row's own message goes before the key


def test_a_path_may_be_a_file_address_and_instructions_have_an_input(folder: Path) -> None:
    row = {"image": f"file://{folder / 'a.png'}", "instruction": "translate", "input": "red", "output": "nyekundu"}
    sample = read_one(folder, row)
    assert (sample.images, sample.question) == ((folder / "a.png",), "translate\nred")


def test_running_text_is_one_answer(folder: Path) -> None:
    assert contents(read_one(folder, {"text": "Once upon a time."})) == [("assistant", "Once upon a time.")]


def test_images_follow_their_placeholders_through_turns_and_parts(folder: Path) -> None:
    row = {
        "images": ["b.png"],
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": [{"type": "image_url", "image_url": DATA_URI}]},
            {"role": "assistant", "content": "two"},
        ],
    }
    sample = read_one(folder, row)
    assert contents(sample)[1][1] == "<image>and<image>"
    assert sample.images == (folder / "a.png", folder / "b.png", png())
    assert [image.size for image in sample.open_images()] == [(4, 4)] * 3


def test_two_images_without_placeholders_come_first(folder: Path) -> None:
    sample = read_one(folder, {"images": ["a.png", "b.png"], "question": "same?", "answer": "yes"})
    assert sample.messages[0].content == "<image>\n<image>\nsame?"
    assert sample.images == (folder / "a.png", folder / "b.png")


def test_relative_images_start_at_image_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("elsewhere"), FORMS["llava"])
    with pytest.raises(UserError, match=r"^data.jsonl:1: no image file .*a\.png.*image_root"):
        read_samples(path)
    assert read_samples(path, image_root=folder)[0].images == (folder / "a.png",)


BAD_ROWS = {
    "too few images": (chat(("user", "<image> <image>"), ("assistant", "a"), image="a.png"), "2 '<image>' placeholders but 1 image\\."),
    "too many images": (chat(("user", "<image>"), ("assistant", "a"), images=["a.png", "b.png"]), "1 '<image>' placeholder but 2 images"),
    "missing image": (qa(image="c.png"), "no image file .*c.png. Correct the path"),
    "web image": (qa(image="https://example.org/a.png"), "is a web address. Download"),
    "broken data URI": (qa(image="data:image/png;base64,***"), "not valid base64"),
    "image of another type": (qa(image=3), "an image is int 3. A path"),
    "two image columns": (qa(image="a.png", images=["b.png"]), "both 'image' and 'images'"),
    "empty answer": (qa(answer=" "), "the answer is empty. Give the text"),
    "empty answer in between": (chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), "the answer is empty"),
    "no answer": (chat(("user", "a")), "the last message must be the assistant's"),
    "image in an answer": (chat(("user", "a"), ("assistant", "<image>"), image="a.png"), "an assistant message holds '<image>'"),
    "answer not among the options": (qa(options=["blue", "green"]), "'red' is not among the options"),
    "option of another type": (qa(options=[True]), "'options' is bool True"),
    "unknown form": ({"query": "a", "response": "b"}, r"no known row form in the keys \['query', 'response'\].*'question' \+ 'answer'"),
    "question without its answer": ({"question_id": 1, "image": "a.png", "text": "what?"}, "'text' asks, but there is no 'answer'"),
    "instruction with a history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' cannot be read"),
    "half a form": ({"question": "a"}, "Add 'answer' to the row"),
    "misspelt key": (qa(imges=["a.png"]), "unknown key 'imges'.*Did you mean 'images'"),
    "image under another name": (qa(image_path="a.png"), "unknown key 'image_path'.*Known: .*image"),
    "video": (qa(videos=["a.mp4"]), "'videos' cannot be read"),
    "unknown role": (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "role 'tool'. Known: system, user"),
    "message without content": (chat(("user", None), ("assistant", "c")), r"messages\[0\] has the content NoneType None"),
    "message of another type": ({"messages": ["a"]}, r"messages\[0\] is str 'a', an object"),
    "messages of another type": ({"messages": "a"}, "'messages' is str 'a', a list of messages"),
    "loss per message": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
        r"messages\[1\] has 'loss'",
    ),
    "unknown part": (chat(("user", [{"type": "audio"}]), ("assistant", "c")), "a content part is dict {'type': 'audio'}. Known"),
    "question of another type": (qa(question=3), "'question' is int 3"),
    "images without a question": ({"text": "a", "image": "a.png"}, "1 image, but no user message"),
    "row of another type": ([1], "a list came, an object with keys is wanted"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(folder: Path, case: str) -> None:
    row, message = BAD_ROWS[case]
    path = written(folder, qa(), row)
    with pytest.raises(UserError, match=rf"(?s)^data\.jsonl:2: .*{message}"):
        read_samples(path)


def test_broken_images_are_found_all_at_once(folder: Path) -> None:
    (folder / "b.png").write_bytes(png()[:40])
    samples = read_samples(written(folder, qa(image="a.png"), qa(image="b.png"), qa(), qa(images=["a.png", "b.png"])))
    check_images(samples[:1])
    with pytest.raises(UserError, match=r"(?s)2 of 4 samples.*data.jsonl:2: .*b.png cannot be read.*data.jsonl:4: "):
        check_images(samples)
