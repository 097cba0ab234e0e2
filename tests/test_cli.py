"""The verbs of the command line on a tiny model of a real architecture, from files that a user would write."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from alula.cli.app import app
from alula.files import read_json, read_jsonl, sha256
from alula.training.loop import Trainer
from zoo import build

FAST = ("--rank", "2", "--set", "steps=4", "--set", "batch_size=4")


def alula(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments):
    result = alula(*arguments)
    assert result.exit_code == 0, result.output
    return result


def write_task(folder, colours, *, count=12):
    """`count` real PNGs in one colour each, and the question which."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = colours[number % len(colours)]
        Image.new("RGB", (40 + number, 40), colour).save(folder / f"{number:02d}.png")
        asked = [{"role": "user", "content": "<image>\nWhat colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"messages": asked, "images": [f"{number:02d}.png"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def digests(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}


class World:
    """A model folder, two data files and a pool that has learnt both, one after the other, through the command line."""

    def __init__(self, folder):
        self.folder, self.model, self.pool = folder, folder / "tiny", folder / "pool"
        model, processor = build("llava")
        model.save_pretrained(self.model)
        processor.save_pretrained(self.model)
        self.colours = write_task(folder / "colours", ["red", "green", "blue"])
        self.shades = write_task(folder / "shades", ["black", "white"])
        self.first = done("learn", "--task", f"colours={self.colours}", "--pool", self.pool, "--model", self.model, *FAST)
        self.before = digests(self.pool / "experts")
        self.second = done("learn", "--task", f"shades={self.shades}", "--pool", self.pool, *FAST)  # the base is the pool's


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_a_second_task_joins_the_pool_without_touching_the_first(world):
    after = digests(world.pool / "experts")
    assert {path: after[path] for path in world.before} == world.before
    assert len(after) > len(world.before)
    assert [expert["name"] for expert in read_json(world.pool / "pool.json")["experts"]] == ["colours", "shades"]


def test_learn_says_scores_with_their_number_of_samples_and_what_to_do_next(world):
    assert "colours: 0.000 before" in world.first.stdout
    assert "n = 1" in world.first.stdout
    assert f"alula generate --pool {world.pool}" in world.first.stderr


def test_a_finished_pool_keeps_no_checkpoint(world):
    assert not list(world.pool.rglob("checkpoint*"))
    assert len(read_jsonl(world.pool / "learning" / "shades" / "losses.jsonl")) == 4


def test_list_shows_the_experts_of_a_pool(world):
    said = done("list", world.pool).stdout
    assert "colours" in said
    assert "shades" in said


def test_list_shows_everything_there_is_to_name():
    said = done("list").stdout
    assert all(word in said for word in ("easy_vqa", "routed", "analytic"))


def test_generate_answers_and_shows_who_spoke(world):
    picture = world.folder / "colours" / "01.png"
    result = done("generate", "What colour?", "--pool", world.pool, "--image", picture, "--show-routing", "--max-new-tokens", 3)
    assert "Weights:" in result.stderr
    assert "[image]" in result.stderr
    assert "colours" in result.stderr


def test_eval_keeps_every_prediction_behind_its_scores(world, tmp_path):
    result = done("eval", "--pool", world.pool, "--task", f"shades={world.shades}", "--task", "capital", "--limit", 3, "--out", tmp_path)
    assert "shades" in result.stdout
    assert len(read_jsonl(tmp_path / "capital.jsonl")) == 3


def test_eval_repeats_the_score_the_task_had_when_it_was_learnt(world, tmp_path):
    done("eval", "--pool", world.pool, "--task", f"shades={world.shades}", "--out", tmp_path)
    assert [row["id"] for row in read_jsonl(tmp_path / "shades.jsonl")] == [
        row["id"] for row in read_jsonl(world.pool / "experts" / "shades" / "predictions.jsonl")
    ]


def test_the_report_of_a_pool_shows_before_after_and_now(world):
    done("eval", "--pool", world.pool, "--task", f"colours={world.colours}")
    result = done("report", world.pool)
    page = (world.pool / "report.html").read_text()
    assert "report.html" in result.stdout
    assert all(word in page for word in ("colours", "shades", "Before", "Right after", "Now", "What colour?"))
    assert 'href="experts/colours/before.jsonl"' in page
    assert 'href="evaluation/colours.jsonl"' in page
    assert "<script" not in page


def test_the_report_of_a_pool_names_better_only_what_is_more_than_noise(tmp_path):
    from alula.report.pool_page import build_pool_report

    def rows(scores):
        fields = {"task": "t", "prompt": "?", "reference": "a", "output": "a", "parsed": True}
        return "".join(json.dumps({"id": str(i), "score": score, **fields}) + "\n" for i, score in enumerate(scores))

    experts = []
    for name, before, after in (("sure", [0] * 20, [1] * 20), ("noise", [0, 1] * 10, [1, 1] + [0, 1] * 9)):
        folder = tmp_path / "experts" / name
        folder.mkdir(parents=True)
        (folder / "before.jsonl").write_text(rows(before))
        (folder / "predictions.jsonl").write_text(rows(after))
        experts.append({"name": name, "added": "today", "files": {}, "about": {}})
    manifest = {"format": 1, "base": {"name": "b", "fingerprint": "f" * 64}, "arm": "analytic", "experts": experts}
    (tmp_path / "pool.json").write_text(json.dumps(manifest))
    page = build_pool_report(tmp_path).read_text()
    sure, noise = page.index("<th>sure"), page.index("<th>noise")
    assert 'class="better"' in page[sure:noise]
    assert "+100.0" in page[sure:noise]
    assert 'class="better"' not in page[noise:]


def write_recipe(world, path, **changes):
    raw = {
        "model": str(world.model),
        "tasks": [{"name": "colours", "path": str(world.colours)}, {"name": "shades", "path": str(world.shades)}],
        "methods": [{"name": "finetune", "options": {"rank": 2}}],
        "train": {"steps": 2, "batch_size": 4},
    }
    path.write_text(json.dumps({**raw, **changes}))  # JSON is YAML
    return path


def test_run_and_report_make_one_page_from_one_recipe(world, tmp_path):
    recipe = write_recipe(world, tmp_path / "tiny.yaml")
    result = done("run", recipe, "--out", tmp_path / "run", "--set", "train.steps=1", "--set", "methods.0.options.rank=3")
    assert "finetune" in result.stdout
    assert [row["steps"] for row in read_jsonl(tmp_path / "run" / "cells" / "finetune-seed0" / "cost.jsonl")] == [1, 1]
    (tmp_path / "run" / "report.html").unlink()
    done("report", tmp_path / "run")
    assert "finetune" in (tmp_path / "run" / "report.html").read_text()
    again = done("run", recipe, "--out", tmp_path / "run", "--set", "train.steps=1", "--set", "methods.0.options.rank=3")
    assert "done already" in again.stderr


def test_one_method_with_two_options_has_two_folders_and_two_rows(world, tmp_path):
    methods = [{"name": "finetune", "options": {"rank": 1}}, {"name": "finetune", "label": "finetune_wide", "options": {"rank": 4}}]
    recipe = write_recipe(world, tmp_path / "two.yaml", methods=methods, train={"steps": 1, "batch_size": 4})
    result = done("run", recipe, "--out", tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "cells").iterdir()) == ["finetune-seed0", "finetune_wide-seed0"]
    assert "finetune_wide" in result.stdout


def test_a_crashed_cell_gives_exit_code_1_and_its_reason(world, tmp_path):
    methods = [{"name": "finetune", "options": {"layers": [99]}}]
    result = alula("run", write_recipe(world, tmp_path / "bad.yaml", methods=methods), "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "no decoder layer 99" in result.stderr
    assert "1 cell crashed" in result.stderr


def test_a_recipe_that_cannot_start_leaves_no_folder(world, tmp_path):
    for change in ({"methods": ["finetunee"]}, {"tasks": ["easy_vqaa"]}):
        result = alula("run", write_recipe(world, tmp_path / "bad.yaml", **change), "--out", tmp_path / "run")
        assert result.exit_code == 2
        assert "Did you mean" in result.stderr
        assert not (tmp_path / "run").exists()


ERRORS = [
    (("learn", "--task", "data.jsonl", "--pool", "p"), "--task data=data.jsonl"),
    (("learn", "--task", "=data.jsonl", "--pool", "p"), "name=file.jsonl"),
    (("learn", "--task", "birds=nowhere.jsonl", "--pool", "p"), "No file nowhere.jsonl"),
    (("learn", "--task", "capitl", "--pool", "p"), "Did you mean 'capital'"),
    (("learn", "--task", "capital", "--pool", "p", "--set", "stepz=3"), "Did you mean 'steps'"),
    (("learn", "--task", "capital", "--pool", "p", "--set", "steps"), "steps=100"),
    (("learn", "--task", "capital", "--pool", "p", "--set", "steps=many"), "'steps' is 'many'"),
    (("learn", "--task", "capital", "--pool", "p", "--scoring", "exact"), "'scoring' is 'exact'"),
    (("learn", "--task", "capital", "--pool", "p", "--router", "gatee"), "Did you mean 'gate'"),
    (("learn", "--task", "capital", "--pool", "p", "--model", "./nowhere"), "'./nowhere' could not be loaded"),
    (("align", "--task", "capitl", "--out", "o"), "Did you mean 'capital'"),
    (("generate", "Hi", "--pool", "nowhere"), "No pool in nowhere"),
    (("eval", "--pool", "nowhere", "--task", "capital"), "No pool in nowhere"),
    (("list", "nowhere"), "No pool in nowhere"),
    (("report", "nowhere"), "not a run folder"),
    (("run", "nowhere.yaml"), "No recipe nowhere.yaml"),
]


@pytest.mark.parametrize(("arguments", "says"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_what_a_user_can_correct_is_one_line_and_exit_code_2(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = alula(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("learn", "--pool", "p"),
        ("learn", "--task", "a=b", "--pool", "p", "--rank", "0"),
        ("generate", "Hi", "--pool", "p", "--image", "x.png"),
        ("fly",),
    ],
)
def test_wrong_arguments_are_told_with_exit_code_2(arguments):
    result = alula(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr


def test_place_and_router_of_a_pool_are_not_changed_silently(world):
    for option, value in (("--router", "gate"), ("--linears", "q_proj")):
        result = alula("learn", "--task", f"more={world.colours}", "--pool", world.pool, option, value, *FAST)
        assert result.exit_code == 2
        assert "Leave it out, or start a new pool" in result.stderr


def test_ctrl_c_is_told_and_the_same_command_ends_where_an_uninterrupted_one_does(world, tmp_path, monkeypatch):
    command = ("learn", "--task", f"colours={world.colours}", "--model", world.model, *FAST, "--set", "save_every=2", "--pool")
    step, calls = Trainer._step, []

    def stop_at_the_fourth(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_step", stop_at_the_fourth)
    stopped = alula(*command, tmp_path / "pool")
    assert stopped.exit_code == 130
    assert "same command again goes on" in stopped.stderr
    assert not (tmp_path / "pool" / "pool.json").exists()
    done(*command, tmp_path / "pool")
    assert len(calls) == 4 + 2
    name = "experts/colours/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "pool" / name), load_file(world.pool / name)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


LIGHT = """
import sys
from alula.cli import main
sys.argv = ["alula", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
assert not heavy, heavy
"""


def test_help_lists_and_reports_import_no_torch(world):
    for arguments in (["--help"], ["learn", "--help"], ["list", str(world.pool)], ["report", str(world.pool)]):
        done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
