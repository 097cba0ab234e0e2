"""Claims about the doctor: every known breakage is named by line with a remedy, and what it forecasts is what comes."""

import json
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ProcessorMixin
from typer.testing import CliRunner

from alula.cli.app import app
from alula.data import Sample, read_samples
from alula.data.collate import Collator
from alula.data.doctor import Examination, examine
from alula.data.forecast import DecoderShape, RowForecast
from alula.data.origins import shortest_names
from data_files import chat, data_uri, png, put_pictures, qa, written
from zoo import BUILDERS, build

CHATS = [name for name in BUILDERS if name not in ("florence2", "blip_2")]
processor_of = cache(lambda name: build(name)[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes(png()[:40])
    return tmp_path


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return processor_of("llava")


SHAPE = DecoderShape(hidden_size=64, num_layers=4, vocab_size=512, value_bytes=4, max_tokens=2048)
BREAKAGES: dict[str, tuple[Any, str, str]] = {
    "too few images": (qa(question="<image> and <image>?", image="a.png"), "placeholders", "Write one '<image>' where each image belongs"),
    "too many images": (qa(question="<image>?", images=["a.png", "b.png"]), "placeholders", "Write one '<image>'"),
    "missing image": (qa(image="gone.png"), "missing image", "Correct the path"),
    "broken image": (qa(image="broken.png"), "broken image", "Replace the file or drop the row"),
    "broken data address": (qa(image="data:image/png;base64,*"), "broken image", "Write it again from the image"),
    "web image": (qa(image="https://example.org/a.png"), "web image", "Download the image"),
    "empty answer": (qa(answer=" "), "empty answer", "Give the text that is to be learnt"),
    "no answer": (chat(("user", "a")), "no answer", "Add the answer"),
    "unknown role": (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "role", "Rename or drop the message"),
    "unknown form": ({"query": "a", "response": "b"}, "form", "Rename the row's keys"),
    "video": (qa(videos=["a.mp4"]), "media", "Drop the row or the key"),
    "answer not among the options": (qa(options=["blue"]), "options", "Write it as one of the options"),
    "too long": (qa(question="why " * 400), "too long", "Shorten it, or drop the row"),
    "not an object": ([1], "form", "Correct the line"),
}


def told(found: Examination) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.kind, finding.origin) for finding in found.findings]


@pytest.mark.parametrize("case", BREAKAGES)
def test_a_known_breakage_is_named_by_line_with_its_remedy(case: str, folder: Path, processor: ProcessorMixin) -> None:
    row, kind, remedy = BREAKAGES[case]
    found = examine([written(folder, qa(image="a.png"), row, qa(image="b.png", question="and?"))], processor, max_length=400)
    assert told(found) == [("error", kind, "data.jsonl:2")]
    assert found.findings[0].message.startswith("data.jsonl:2: ") and remedy in found.findings[0].message
    assert not found.is_sound


def test_all_that_is_wrong_is_told_at_once(folder: Path, processor: ProcessorMixin) -> None:
    rows = [row for row, _, _ in BREAKAGES.values()]
    path = written(folder, *rows)
    path.write_text(path.read_text() + "{\n")
    found = examine([path, folder / "absent.jsonl", written(folder, name="empty.jsonl")], processor, max_length=400)
    lines = [("error", kind, f"data.jsonl:{number}") for number, (_, kind, _) in enumerate(BREAKAGES.values(), start=1)]
    files = [("error", "file", str(folder / name)) for name in ("absent.jsonl", "empty.jsonl")]
    assert told(found) == [*lines, ("error", "json", f"data.jsonl:{len(rows) + 1}"), *files]
    assert [(file.num_rows, len(file.rows)) for file in found.files] == [(len(rows) + 1, 1), (0, 0), (0, 0)]


def test_repeated_rows_are_found_by_text_and_pixels_and_leaks_into_the_test_rows_too(folder: Path, processor: ProcessorMixin) -> None:
    Image.open(folder / "a.png").save(folder / "same.bmp")
    (folder / "other.png").write_bytes(png(200))
    train = written(folder, qa(image="a.png"), qa(image="other.png"), qa(image="same.bmp"), qa(image=data_uri(png(200))))
    test = written(folder, qa(question="new?", image="other.png"), qa(image="b.png"), qa(question="why?"), name="test.jsonl")
    found = examine([train], processor, test=test)
    assert told(found) == [
        ("warning", "duplicate", "data.jsonl:3"),
        ("warning", "duplicate", "data.jsonl:4"),
        ("error", "in train and test", "test.jsonl:2"),
        ("warning", "shared image", "test.jsonl:1"),
    ]
    assert "the same row as data.jsonl:1" in found.findings[0].message
    assert "also a training row (data.jsonl:1)" in found.findings[2].message
    assert found.findings[3].message.startswith("test.jsonl:1: an image of train rows under another text.")  # row 2 was told already


def test_files_of_one_name_are_told_apart_by_their_folders(folder: Path, processor: ProcessorMixin) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        written(folder / name, qa(question=name), qa(answer=" "), name="train.jsonl")
    other = written(folder, qa(image="gone.png"), name="other.jsonl")
    found = examine([folder / "a/train.jsonl", folder / "b/train.jsonl", other], processor)
    origins = ["a/train.jsonl:2", "b/train.jsonl:2", "other.jsonl:1"]
    assert [finding.origin for finding in found.findings] == origins
    assert all(finding.message.startswith(f"{origin}: ") for finding, origin in zip(found.findings, origins, strict=True))
    assert shortest_names([Path("x.tar"), Path("a/x.tar"), Path("a/b/x.tar")]) == {
        Path("x.tar"): "x.tar",
        Path("a/x.tar"): "a/x.tar",
        Path("a/b/x.tar"): "b/x.tar",
    }


def test_marks_of_the_model_in_a_text_are_found(folder: Path) -> None:
    asked = (qa(question="what is <|image_pad|>?"), qa(question="what is <|im_end|>?"), qa())
    found = examine([written(folder, *asked)], processor_of("qwen2_vl"))
    assert ("error", "special token", "data.jsonl:1") in told(found)
    assert "'<|image_pad|>'" in found.findings[0].message and "Take it out" in found.findings[0].message


def test_the_test_rows_of_a_folder_are_compared_with_its_train_rows(folder: Path, processor: ProcessorMixin) -> None:
    written(folder, qa(), name="train.jsonl")
    written(folder, qa(), name="test.jsonl")
    found = examine([folder], processor)
    assert [(Path(file.name).name, file.split) for file in found.files] == [("train.jsonl", "train"), ("test.jsonl", "test")]
    assert told(found) == [("error", "in train and test", "test.jsonl:1")]


@pytest.mark.parametrize("name", CHATS)
def test_the_forecast_of_a_row_is_the_length_that_the_collator_makes(name: str, folder: Path) -> None:
    for number, (width, height) in enumerate([(40, 60), (90, 30), (28, 28)]):
        Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = [qa(), qa(image="0.png"), qa(question="<image> or <image>?", images=["1.png", "2.png"]), {"text": "the square is red"}]
    path = written(folder, *rows)
    found = examine([path], processor_of(name))
    collator = Collator(processor_of(name))
    made = [collator([sample])["input_ids"].shape[1] for sample in read_samples(path)]
    assert [row.tokens for row in found.rows] == made
    assert [row.visual > 0 for row in found.rows] == [False, True, True, False]
    assert found.findings == []


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "idefics3", "internvl"])
def test_the_forecast_of_visual_tokens_is_the_processors_on_many_sizes(name: str) -> None:
    collator = Collator(processor_of(name))
    forecast, sizes = RowForecast(collator), random.Random(name)
    counts = set()
    for _ in range(50):
        size = (sizes.randint(20, 260), sizes.randint(20, 260))
        noise = Image.effect_noise(size, 80).convert("RGB")
        sample = Sample.ask("what colour?", "red", images=(noise,))
        assert forecast.text(sample) + forecast.visual([size]) == collator([sample])["input_ids"].shape[1]
        counts.add(forecast.visual([size]))
    assert len(counts) > 1


def test_memory_follows_the_stated_formula(folder: Path, processor: ProcessorMixin) -> None:
    found = examine([written(folder, qa(), qa(image="a.png"))], processor, batch_size=8, shape=SHAPE)
    tokens = max(row.tokens for row in found.rows)
    assert found.batch_bytes == 8 * tokens * (34 * 4 // 2 * 64 * 4 + 8 * 512)
    assert found.max_length == 2048
    few = [qa(question="why " * 40)], [qa(question=f"{number}?") for number in range(10, 30)]
    outlier = examine([written(folder, *few[0], *few[1], name="outlier.jsonl")], processor, batch_size=8, shape=SHAPE)
    assert outlier.usual_batch_bytes == SHAPE.batch_bytes(8, outlier.rows[-1].tokens) < outlier.batch_bytes / 3
    assert found.lengths["tokens"][100] == tokens and found.lengths["visual"][50] == 0
    assert found.longest[0].origin == "data.jsonl:2"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, processor = build("llava")
    folder = tmp_path_factory.mktemp("model")
    made.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def command(model: Path, folder: Path) -> Callable[..., Any]:
    return lambda *words: CliRunner().invoke(app, ["doctor", "data", *map(str, words), "--model", str(model)])


def test_the_command_tells_lengths_memory_and_every_finding(command: Callable[..., Any], folder: Path) -> None:
    path = written(folder, qa(image="a.png"), *[qa(image=f"gone{i}.png") for i in range(12)], qa(image="b.png"))
    result = command(path, "--batch-size", 4)
    assert result.exit_code == 1, result.output
    for text in ("Lengths", "error: missing image (12)", "data.jsonl:2: no image file", "... and 2 more", "warning: duplicate (1)"):
        assert text in result.stdout, text
    assert re.search(r"Forecast: 4 rows of the longest length keep about .* of the 90 % length about .* micro_batch_size=1", result.stdout)


def test_the_command_gives_json_and_passes_with_warnings(command: Callable[..., Any], folder: Path) -> None:
    result = command(written(folder, qa(image="a.png"), qa(image="a.png")), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sound"] and found["batch"]["bytes"] > 0 and found["max_length"] > 0
    assert [(finding["level"], finding["kind"], finding["origin"]) for finding in found["findings"]] == [
        ("warning", "duplicate", "data.jsonl:2")
    ]
    assert found["files"][0]["usable"] == 2
    nothing = command(written(folder, qa()))
    assert (nothing.exit_code, "Nothing is wrong." in nothing.stdout) == (0, True)
