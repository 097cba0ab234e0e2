"""What the command line makes of what is typed: paths, names, and folders that it must not make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.cli.arguments import name_for, names_data, task_choice
from alula.data.choices import SourceChoice, TaskChoice
from alula.errors import UserError
from alula.running.recommend import _full_recipe
from alula.training import TrainSettings
from taught_pool import taught_pool


@pytest.mark.parametrize("path", ["rows.jsonl", "rows.parquet", "rows.tar", "rows.tar.gz", "folder/rows", "shards/train-*.tgz"])
def test_data_of_every_format_is_known_by_its_ending_and_needs_a_name(path):
    assert names_data(path)
    with pytest.raises(UserError, match=r"has no name\. Give the task one: --task (rows|train)="):
        task_choice(path)


@pytest.mark.parametrize("name", ["capital", "easy_vqa", "tar"])
def test_a_built_in_task_needs_no_path(name):
    assert not names_data(name)
    assert task_choice(name).is_built_in


@pytest.mark.parametrize(("path", "name"), [("a/my rows.tar.gz", "my-rows"), ("shards/*.tar", "task"), ("CoIN/TextVQA", "TextVQA")])
def test_a_name_is_made_of_a_path(path, name):
    assert name_for(path) == name


def test_scoring_a_pool_of_the_hub_makes_no_folder_that_would_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", "--pool", "me/my-pool", "--task", "capital"])
    assert result.exit_code == 2
    assert "Give a folder with --out" in result.stderr
    assert list(tmp_path.iterdir()) == []


IGNORED = {
    "eval --model m --out o --harness lm-eval --tasks t --all-rows --shots 2": "--all-rows, --shots came, which --harness does not use",
    "eval --model m --out o --harness lm-eval --tasks t --shots-by seed": "--shots-by came, which --harness does not use",
    "eval --model m --out o --harness lmms-eval --tasks t --num-fewshot 0": "--num-fewshot came, which --harness lmms-eval does not use",
    "eval --model m --out o --task capital --include-path x --batch-size 8": "--include-path, --batch-size came, which --task does not use",
    "eval --model m --out o --task capital --num-fewshot 1 --chat-template": "--num-fewshot, --chat-template came, which --task",
    "eval --model m --out o --task capital --seed 1": "--seed came, which --task without --shots does not use. Leave it out.",
    "learn --method wings --task capital --pool p --router arrow --linears q_proj": "--linears, --router came, which --method wings",
}


@pytest.mark.parametrize("line", IGNORED)
def test_an_option_that_would_change_nothing_is_refused_by_its_name(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2
    assert IGNORED[line] in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_answers_without_a_pool_and_nobody_answers_without_a_model(tmp_path):
    taught = taught_pool(tmp_path)
    alone = CliRunner().invoke(app, ["generate", "Hi", "--model", str(taught.model), "--max-new-tokens", "2", "--show-routing"])
    assert alone.exit_code == 0 and "Weights: base 100%" in alone.stderr
    assert "give a pool (--pool), or a model as it is (--model)" in CliRunner().invoke(app, ["generate", "Hi"]).stderr


def test_the_recipe_of_a_recommendation_runs_from_every_folder():
    places = {"test_path": Path("test.jsonl"), "image_root": Path("images")}
    blend = [SourceChoice(path=Path("b.jsonl")), SourceChoice(name="capital")]
    tasks = [TaskChoice(name="a", path=Path("a.jsonl"), **places), TaskChoice(name="b", blend=blend)]
    first, second = _full_recipe(tasks, [], "smol", TrainSettings()).tasks
    assert (first.path, first.test_path, first.image_root) == tuple(Path.cwd() / name for name in ("a.jsonl", "test.jsonl", "images"))
    assert (second.path, second.blend[0].path, second.blend[1].path) == (None, Path.cwd() / "b.jsonl", None)


def test_the_installed_command_is_the_application():
    command = [sys.executable, "-c", "import importlib.metadata as m; print(m.entry_points(group='console_scripts')['alula'].value)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "alula.cli:main"


def test_several_processes_are_refused():
    environment = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", "from alula.cli import main; main()"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Start one process" in done.stderr
