"""Additions compose with any method in any recipe, refuse what does not fit, and resume to the same run."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from alula import Collator
from alula.cli.app import app
from alula.config import check_recipe, write_recipe
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import read_jsonl
from alula.methods import ADDITIONS, METHODS, Method, compose
from alula.methods.additions.aside import evaluating
from alula.methods.base import plain_logits
from alula.objectives import soft_target_loss
from alula.running.cell import make_method
from alula.running.cells import list_cells
from resume_worker import SETTINGS, collate, pictures, samples, tiny_model
from test_resume import Fragile, Interrupted
from tiny_methods import ONE_STEP, learn, tiny
from tiny_runs import save_tiny
from zoo import build


def test_additions_work_in_the_order_of_the_recipe():
    _, method = tiny("finetune", "ewc", "soft_targets", "rehearsal")
    assert list(method.additions) == ["ewc", "soft_targets", "rehearsal"]
    assert method.name == "Finetune + ewc + soft_targets + rehearsal"
    calls = []
    for name, addition in method.additions.items():
        addition.before_step = lambda model, name=name: calls.append(name)
    method.before_step(None)
    assert calls == list(method.additions)


def test_a_part_of_the_loss_sees_what_the_addition_before_it_gave():
    model, method = tiny("finetune", ("soft_targets", {"alpha": 0.5}), "distillation")
    seen = []
    method.additions["distillation"].parts = lambda model, batch, logits, parts: seen.append(dict(parts)) or parts
    batch = collate(samples("first", 2))
    method.loss(model, batch)
    torch.testing.assert_close(seen[0]["next_token"], soft_target_loss(plain_logits(model, batch), batch["labels"], alpha=0.5))


class Own(Method):
    """A method with a loss of its own."""

    def loss(self, model, batch):
        return {}


REFUSED = [
    ("finetune", [("soft_target", {})], "Unknown addition 'soft_target'.*Did you mean 'soft_targets'"),
    ("finetune", [("soft_targets", {"alhpa": 1})], "Addition 'soft_targets' cannot be made.*alhpa"),
    ("finetune", [("soft_targets", {"alpha": 1.0})], "alpha: 1.0 came"),
    ("finetune", [("ewc", {}), ("ewc", {})], "comes twice"),
    ("finetune", [("ewc", {"num_samples": 0})], "num_samples: 0"),
    ("finetune", [("o_lora", {})], "no LoRA expert per task"),
    ("finetune_full", [("o_lora", {})], "no LoRA expert per task"),
    ("lora", [("ewc", {})], "ewc came for MergedLoRA.*without an earlier value.*accepted: align, finetune, finetune_full, .*Take ewc out"),
    ("finetune", [("rehearsal", {"memory_size": 3, "ratio": 0.1})], "one of them is accepted"),
    ("finetune", [("rehearsal", {"policy": "reservoir"})], "without memory_size"),
    ("finetune", [("rehearsal", {"ratio": 1})], None),
    ("finetune", [("rehearsal", {"ratio": 2})], "ratio: 2 came"),
    ("finetune", [("distillation", {"teacher": "last"})], "Unknown teacher 'last'"),
    ("finetune", [("freezing", {"part": "decodr"})], "Unknown part 'decodr'.*'decoder'"),
    ("finetune", [("generative_replay", {"temperature": 0})], "temperature: 0 came"),
]


@pytest.mark.parametrize(("name", "additions", "says"), REFUSED)
def test_what_does_not_fit_is_refused_with_words(name, additions, says):
    if says is None:
        assert tiny(name, *additions)
        return
    with pytest.raises(UserError, match=says):
        tiny(name, *additions)


def test_a_method_with_a_loss_of_its_own_takes_no_additions():
    model = tiny_model()
    with pytest.raises(UserError, match="loss` of its own"):
        compose(model, Own(model, settings=SETTINGS), [], collator=collate)


def test_without_additions_a_composed_method_is_the_method(tmp_path):
    model = tiny_model()
    learn(model, METHODS["finetune"](model, settings=SETTINGS), folder=tmp_path / "plain")
    again, method = tiny("finetune")
    learn(again, method, folder=tmp_path / "composed")
    assert all(torch.equal(again.state_dict()[path], value) for path, value in model.state_dict().items())
    assert (tmp_path / "plain/losses.jsonl").read_bytes() == (tmp_path / "composed/losses.jsonl").read_bytes()


RECIPE = {
    "tasks": ["easy_vqa"],
    "methods": [
        {
            "name": "routed",
            "label": "routed_soft_rehearsal",
            "options": {"rank": 2},
            "with": [{"name": "soft_targets", "options": {"alpha": 0.1}}, {"name": "rehearsal", "options": {"ratio": 0.5}}, "distillation"],
        }
    ],
}


def test_a_recipe_says_what_is_added_and_can_be_read_again(tmp_path):
    recipe = check_recipe(RECIPE)
    assert [addition.name for addition in recipe.methods[0].additions] == ["soft_targets", "rehearsal", "distillation"]
    assert check_recipe(yaml.safe_load(write_recipe(recipe))) == recipe
    with pytest.raises(UserError, match=r"unknown key 'methods.0.with.0.option'. Known: name, options. Did you mean 'options'"):
        check_recipe({**RECIPE, "methods": [{"name": "routed", "with": [{"name": "ewc", "option": {}}]}]})
    with pytest.raises(UserError, match=r"Unknown addition 'rehersal'\..*Did you mean 'rehearsal'"):
        list_cells(check_recipe({**RECIPE, "methods": [{"name": "routed", "with": ["rehersal"]}]}), tmp_path)


def test_additions_are_part_of_what_a_cell_is(tmp_path):
    (cell,) = list_cells(check_recipe(RECIPE), tmp_path)
    bare = {**RECIPE["methods"][0], "with": []}
    (other,) = list_cells(check_recipe({**RECIPE, "methods": [bare]}), tmp_path)
    assert cell.identity != other.identity and not other.additions


def test_the_three_of_the_recipe_run_on_routed_and_keep_the_base(tmp_path):
    model, processor = build("llava")
    (cell,) = list_cells(check_recipe(RECIPE), tmp_path)
    cell = replace(cell, settings=SETTINGS, options={"rank": 2, "arms": ("oracle",), "layers": [1, 2]})
    method = make_method(cell, model, Collator(processor))
    tasks = Stream(tasks=tuple(Task(name=name, train=pictures(name, 4), test=[]) for name in ("one", "two")))
    learn(model, method, tasks, folder=tmp_path, collator=Collator(processor))
    rows = read_jsonl(tmp_path / "losses.jsonl")
    assert all(row["parts"].keys() == {"next_token", "distillation"} for row in rows) and len(rows) == 12
    method.mixtures.detach()
    before = build("llava")[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


COMPOSITIONS = {
    "full": ("finetune_full", [("distillation", {"teacher": "previous"}), ("ewc", {"num_samples": 4}), ("rehearsal", {"memory_size": 5})]),
    "lora": ("finetune", ["soft_targets", ("freezing", {"part": "model.layers.0"}), ("ewc", {"num_samples": 2, "decay": 0.9})]),
    "routed": ("routed", ["soft_targets", ("rehearsal", {"memory_size": 5, "policy": "reservoir"}), "o_lora", "distillation"]),
}


OPTIONS = {"routed": {"arms": ("gate",), "gate_steps": 4, "rank": 2}}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_interrupted_composition_resumes_to_the_same_weights(tmp_path, name):
    kind, additions = COMPOSITIONS[name]

    def run(folder, calls):
        model, method = tiny(kind, *additions, **OPTIONS.get(kind, {}))
        learn(model, method, folder=folder, collator=Fragile(collate, calls))
        return model, method

    whole, kept = run(tmp_path / "whole", math.inf)
    for calls in (9, 31):  # in the first task; in the second, or (routed) later in the first
        folder = tmp_path / str(calls)
        with pytest.raises(Interrupted):
            run(folder, min(calls, 19 if kind != "routed" else calls))
        model, method = run(folder, math.inf)
        for path, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[path], value), path
        assert method.state_dict().keys() == kept.state_dict().keys()
        assert all(torch.equal(method.state_dict()[key], value) for key, value in kept.state_dict().items())
        assert (folder / "losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


SHORT = {"wings": {"rank": 2, "connector": False, "visual_ratio": 0.0}, "routed": {"arms": ("oracle",)}}


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_takes_additions_and_keeps_its_promise_about_the_base(name):
    model, processor = build("llava")
    collator = Collator(processor)
    method = METHODS[name](model, settings=ONE_STEP, **SHORT.get(name, {}))
    try:
        method.base_model(model)
        teacher = "base"
    except UserError:
        teacher = "previous"
    additions = [("soft_targets", {}), ("rehearsal", {"ratio": 0.5}), ("distillation", {"teacher": teacher})]
    method = compose(model, method, additions, collator=collator)
    tasks = Stream(tasks=tuple(Task(name=task, train=pictures(task, 3), test=[]) for task in ("one", "two")))
    learn(model, method, tasks, collator=collator)
    if teacher == "previous":
        return
    untouched, _ = build("llava")
    batch = collator(pictures("one", 2))
    with torch.no_grad(), evaluating(model), method.base_model(model):
        assert torch.equal(plain_logits(model, batch), plain_logits(untouched, batch))
    now = {path.replace(".host.", "."): value for path, value in model.state_dict().items()}
    for path, value in untouched.state_dict().items():
        assert torch.equal(now[path], value), path


def test_every_addition_lives_where_one_looks_for_it():
    for name in ADDITIONS:
        assert ADDITIONS[name].__module__ == f"alula.methods.additions.{name}"


def test_resumption_is_tested_of_every_addition():
    named = {entry if isinstance(entry, str) else entry[0] for _, additions in COMPOSITIONS.values() for entry in additions}
    elsewhere = {"generative_replay", "balance"}  # one needs a chat template, one sparse networks: test_rehearsal.py, test_upcycle.py
    assert named | elsewhere == set(ADDITIONS)


YAML = """
model: {model}
tasks: [{{name: easy_vqa, train_size: 8, test_size: 2}}, {{name: digits, train_size: 8, test_size: 2}}]
methods:
  - name: routed
    label: routed_soft_rehearsal
    options: {{rank: 2, arms: [analytic], layers: [1], statistics_samples: 4}}
    with: [soft_targets, {{name: rehearsal, options: {{ratio: 0.5}}}}]
train: {{steps: 1, batch_size: 4}}
evaluation: {{future_tasks: false}}
examples: 0
"""


def test_a_composition_in_yaml_is_run_by_alula_run(tmp_path):
    (tmp_path / "r.yaml").write_text(YAML.format(model=save_tiny(tmp_path / "tiny")))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    cell = tmp_path / "run" / "cells" / "routed_soft_rehearsal-seed0"
    assert (cell / "done.json").exists()
    assert [row["task"] for row in read_jsonl(cell / "losses.jsonl")] == ["easy_vqa", "digits"]
    assert "routed_soft_rehearsal:analytic" in (tmp_path / "run" / "report.html").read_text()
