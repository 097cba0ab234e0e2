"""What goes wrong for users: each case is one message with place and remedy, and nothing that was there is lost."""

import json
import re
import resource
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import TaskChoice, check_recipe
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import sha256
from alula.methods import METHODS
from alula.running.choices import load_choice
from alula.running.run import run_recipe
from alula.training import Trainer, TrainSettings
from zoo import build

FAST = ("--rank", "2", "--set", "steps=4", "--set", "batch_size=4", "--set", "save_every=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def save_model(folder, *, poison=False, seed=0):
    model, processor = build("llava", seed=seed)
    if poison:
        with torch.no_grad():
            next(parameter for name, parameter in model.named_parameters() if "language_model.layers.0" in name).fill_(float("nan"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_task(folder, *, count=8):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = ["red", "blue"][number % 2]
        Image.new("RGB", (30 + number, 30), colour).save(folder / f"{number}.png")
        rows.append({"question": "Colour?", "answer": colour, "image": f"{number}.png"})
    return write_rows(folder, rows)


def write_rows(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def change_row(path, number, **changes):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] = {key: value for key, value in {**rows[number], **changes}.items() if value is not None}
    return write_rows(path.parent, rows)


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """A pool that has learnt one task."""
    folder = tmp_path_factory.mktemp("grown")
    result = learn("first", write_task(folder / "first"), folder / "pool", "--model", tiny)
    assert result.exit_code == 0, result.output
    return folder / "pool"


@pytest.fixture
def pool(grown, tmp_path):
    shutil.copytree(grown, tmp_path / "pool")
    return tmp_path / "pool"


def learn(name, path, pool, *more):
    return CliRunner().invoke(app, [str(word) for word in ("learn", "--task", f"{name}={path}", "--pool", pool, *FAST, *more)])


def digests(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file() and "learning" not in path.parts}


def refused(result, *says):
    """One message on stderr, no traceback, exit code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(re.findall(r"^Error ", result.stderr, flags=re.MULTILINE)) == 1
    for text in says:
        assert re.search(text, result.stderr), result.stderr


def broken_image(path):
    (path.parent / "2.png").write_bytes((path.parent / "2.png").read_bytes()[:40])
    return path


BAD_ROWS = {
    "corrupt image": (broken_image, r"data\.jsonl:3: .*2\.png cannot be read", r"Replace the file or drop the row"),
    "missing image": (lambda path: change_row(path, 2, image="gone.png"), r"data\.jsonl:3: .*gone\.png", r"drop the row"),
    "placeholders": (
        lambda path: change_row(path, 2, question="<image> and <image>?"),
        r"data\.jsonl:3: .*'<image>'",
        r"Write one '<image>' where each image belongs",
    ),
    "empty answer": (lambda path: change_row(path, 2, answer=" "), r"data\.jsonl:3: the answer is empty", "drop the row"),
    "no answer": (lambda path: change_row(path, 2, answer=None), r"data\.jsonl:3: ", "Add 'answer'"),
    "not json": (lambda path: write_text(path, path.read_text() + "{\n"), r"data\.jsonl:9: not valid JSON", "Correct the line"),
    "no rows": (lambda path: write_text(path, ""), r"data\.jsonl holds no rows", "check that"),
}


def write_text(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_line_before_anything_is_learnt(case, pool, tmp_path):
    spoil, *says = BAD_ROWS[case]
    before = digests(pool)
    refused(learn("second", spoil(write_task(tmp_path / "task")), pool), *says)
    assert digests(pool) == before
    assert not (pool / "learning" / "second").exists()


def test_a_task_name_is_taken_once_in_a_pool(pool, tmp_path):
    before = digests(pool)
    refused(learn("first", write_task(tmp_path / "task"), pool), "knows a task 'first' already", "Choose another name")
    assert digests(pool) == before


@pytest.mark.parametrize("name", ["a/b", "../up", "a.b", "base"])
def test_a_name_that_cannot_be_an_expert_is_refused_at_the_door(name, pool, tmp_path):
    before = digests(pool)
    refused(learn(name, write_task(tmp_path / "task"), pool), "cannot name an expert|is the name of the untouched model", "Choose")
    assert digests(pool) == before


def test_a_pool_is_for_the_base_model_it_was_made_with(pool, tmp_path):
    before, other = digests(pool), save_model(tmp_path / "other", seed=3)
    refused(learn("second", write_task(tmp_path / "task"), pool, "--model", other), "made for base model", "start a new pool")
    assert digests(pool) == before


def test_a_half_written_manifest_is_named_with_its_line(pool, tmp_path):
    manifest = pool / "pool.json"
    manifest.write_text(manifest.read_text()[:-20])
    for arguments in (["list"], ["report"], ["generate", "Hi", "--pool"]):
        refused(CliRunner().invoke(app, [*arguments, str(pool)]), r"pool\.json:\d+: not valid JSON", "restore or delete it")


def test_a_full_disk_stops_the_learning_and_the_pool_is_as_it_was(pool, tmp_path):
    before, path = digests(pool), write_task(tmp_path / "task")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # the operating system refuses longer files
    try:
        result = learn("second", path, pool)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, "Cannot write .*tensors.safetensors", "What was there before is unchanged", "Free some space")
    assert digests(pool) == before
    assert not [path for path in pool.rglob("*.part*") if path.is_file()]
    again = learn("second", path, pool)
    assert again.exit_code == 0, again.output


def test_a_full_disk_in_the_middle_of_a_log_is_told_like_any_other(pool, tmp_path, monkeypatch):
    def full(self, row):
        raise OSError(28, "No space left on device", "losses.jsonl")

    monkeypatch.setattr("alula.training.records.LossLog.append", full)
    refused(learn("second", write_task(tmp_path / "task"), pool), "Cannot write losses.jsonl: No space left", "Free some space")


class Cut(Exception):
    """The process ends here."""


def cut_after(monkeypatch, steps):
    """The training ends without a word after so many steps, as after a power cut."""
    step, calls = Trainer._step, []

    def cut(self, *args, **kwargs):
        calls.append(None)
        if len(calls) > steps:
            raise Cut
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_step", cut)


def test_a_half_written_checkpoint_is_named_and_deleting_it_starts_anew(pool, tmp_path, monkeypatch):
    before, path = digests(pool), write_task(tmp_path / "task")
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        assert isinstance(learn("second", path, pool).exception, Cut)
    folder = pool / "learning" / "second" / "checkpoint"
    tensors = folder / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    refused(learn("second", path, pool), "The checkpoint is damaged", f"Delete the folder {folder}")
    assert digests(pool) == before
    shutil.rmtree(folder)
    assert learn("second", path, pool).exit_code == 0


def test_an_interrupted_task_is_not_resumed_with_other_settings(pool, tmp_path, monkeypatch):
    path = write_task(tmp_path / "task")
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        assert isinstance(learn("second", path, pool).exception, Cut)
    refused(learn("second", path, pool, "--set", "steps=6"), "another recipe: steps was 4, is 6", "Delete the folder")
    refused(learn("second", path, pool, "--rank", "3"), "another recipe: identity was .*rank 2.* is .*rank 3", "Delete the folder")
    assert learn("second", path, pool).exit_code == 0


def test_a_stream_is_not_resumed_with_another_recipe(tiny, tmp_path):
    raw = {"model": str(tiny), "tasks": [{"name": "easy_vqa", "train_size": 8, "test_size": 2}], "methods": ["finetune"]}
    raw["train"] = {"steps": 1, "batch_size": 4}
    folder = tmp_path / "run"
    assert run_recipe(check_recipe(raw), folder, say=lambda line: None) == 0
    before = digests(folder)
    with pytest.raises(UserError, match=r"holds a run of another recipe .*choose another --out folder"):
        run_recipe(check_recipe({**raw, "train": {"steps": 2, "batch_size": 4}}), folder)
    assert digests(folder) == before


def test_a_run_folder_of_an_older_alula_goes_on_where_new_keys_are_at_their_defaults(tiny, tmp_path):
    raw = {"model": str(tiny), "tasks": [{"name": "easy_vqa", "train_size": 8, "test_size": 2}], "methods": ["finetune"]}
    recipe = check_recipe({**raw, "train": {"steps": 1, "batch_size": 4}})
    run_recipe(recipe, tmp_path, say=lambda line: None)
    kept = tmp_path / "recipe.yaml"
    kept.write_text("\n".join(line for line in kept.read_text().splitlines() if "label" not in line))
    said = []
    run_recipe(recipe, tmp_path, say=said.append)
    assert said == ["finetune-seed0: done already"]


def test_a_loss_that_is_not_a_number_ends_the_learning_before_the_step(tmp_path):
    poisoned = save_model(tmp_path / "poisoned", poison=True)
    result = learn("task", write_task(tmp_path / "task"), tmp_path / "pool", "--model", poisoned)
    refused(result, "step 0: the loss is nan", "No step was taken", "Halve learning_rate")
    assert not (tmp_path / "pool" / "pool.json").exists()


def test_a_loss_that_becomes_infinite_keeps_the_last_checkpoint(tmp_path):
    model, processor = build("llava")
    settings = TrainSettings(steps=4, batch_size=2, save_every=1)
    method = METHODS["finetune_full"](model, settings=settings)
    loss, calls = method.loss, []

    def explode(model, batch):
        calls.append(None)
        return {name: value * (float("inf") if len(calls) == 3 else 1) for name, value in loss(model, batch).items()}

    method.loss = explode
    from alula.data.collate import Collator

    stream = Stream(tasks=(Task(name="sums", train=[Sample.ask("one and one?", "two")], test=[]),))
    with pytest.raises(UserError, match=r"Task 'sums', stage 'train', step 2: the loss is inf"):
        list(Trainer(model, method, Collator(processor), settings=settings, folder=tmp_path).learn(stream))
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["place"]["step"] == 2


def test_an_unknown_key_in_a_recipe_is_told_by_the_command(tmp_path):
    (tmp_path / "a.yaml").write_text("tasks: [easy_vqa]\nmethods: [finetune]\ntrian: {steps: 3}\n")
    refused(CliRunner().invoke(app, ["run", str(tmp_path / "a.yaml")]), r"a\.yaml: unknown key 'trian'", "Did you mean 'train'")


def test_images_are_opened_before_a_run_starts_but_only_those_it_takes(tmp_path):
    path = write_task(tmp_path / "task")
    last = load_choice(TaskChoice(name="mine", path=path)).train[-1]
    last.images[0].write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 8 samples"):
        load_choice(TaskChoice(name="mine", path=path))
    assert len(load_choice(TaskChoice(name="mine", path=path, train_size=3)).train) == 3
