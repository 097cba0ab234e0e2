"""Recipes: unknown keys find their nearest neighbour, bad values name their path, what is resolved can be read again."""

from pathlib import Path

import pytest
import yaml

from alula.config import Recipe, check_recipe, check_task, check_train, parse_settings, read_recipe, write_recipe
from alula.errors import UserError
from alula.running.cells import make_cell

SMALL = {"tasks": ["easy_vqa"], "methods": ["finetune"]}


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


UNKNOWN = [
    ({"task": []}, "unknown key 'task'", "'tasks'"),
    ({"tasks": [{"name": "a", "pth": "x"}]}, "unknown key 'tasks.0.pth'", "'path'"),
    ({"base_tasks": ["b", {"name": "a", "tset_size": 3}]}, "unknown key 'base_tasks.1.tset_size'", "'test_size'"),
    ({"train": {"stesp": 3}}, "unknown key 'train.stesp'", "'steps'"),
    ({"methods": [{"name": "finetune", "option": {}}]}, "unknown key 'methods.0.option'", "'options'"),
    ({"methods": [{"name": "finetune", "train": {"learning_rat": 1}}]}, "unknown key 'methods.0.train.learning_rat'", "'learning_rate'"),
    ({"evaluation": {"batchsize": 3}}, "unknown key 'evaluation.batchsize'", "'batch_size'"),
]


@pytest.mark.parametrize(("change", "place", "nearest"), UNKNOWN)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known(change, place, nearest):
    with pytest.raises(UserError) as caught:
        check_recipe({**SMALL, **change}, where="my.yaml")
    assert f"my.yaml: {place}. Known: " in str(caught.value)
    assert f"Did you mean {nearest}?" in str(caught.value)


BAD = [
    ({"train": {"steps": "many"}}, "'train.steps' is 'many'"),
    ({"train": {"learning_rate": 0}}, "'train.learning_rate' is 0"),
    ({"tasks": [{"name": "a", "train_size": 0}]}, "'tasks.0.train_size' is 0"),
    ({"tasks": [{"name": "a", "scoring": "exact"}]}, "'tasks.0.scoring' is 'exact'"),
    ({"tasks": [{"path": "a"}]}, "'tasks.0.name' is missing"),
    ({"tasks": []}, "'tasks' is []"),
    ({"tasks": "easy_vqa"}, "'tasks' is 'easy_vqa'"),
    ({"methods": []}, "'methods' is []"),
    ({"methods": [{"name": "finetune", "label": "a/b"}]}, "'methods.0.label' is 'a/b'"),
    ({"methods": [{"name": "finetune", "train": {"steps": 0}}]}, "'methods.0.train.steps' is 0"),
    ({"seeds": []}, "'seeds' is []"),
    ({"seeds": [0, -1]}, "'seeds.1' is -1"),
    ({"dtype": "float8"}, "'dtype' is 'float8'"),
    ({"tasks": [[1] * 100]}, "..."),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_bad_value_is_shown_with_its_path(change, says):
    with pytest.raises(UserError) as caught:
        check_recipe({**SMALL, **change}, where="my.yaml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("my.yaml: ")
    assert len(str(caught.value)) < 300


def test_every_problem_of_a_recipe_is_told_at_once():
    with pytest.raises(UserError) as caught:
        check_recipe({**SMALL, "sedes": [0], "train": {"steps": 0}})
    assert str(caught.value).count("\n") == 1


def test_the_line_of_a_yaml_error_is_named(tmp_path):
    path = written(tmp_path, "model: smol\ntasks:\n  - {name: a\nmethods: [x]\n")
    with pytest.raises(UserError, match=r"recipe\.yaml:4: not valid YAML .* Correct that line"):
        read_recipe(path)


@pytest.mark.parametrize(("text", "says"), [("", "an empty file came"), ("- a\n", "a list came"), ("smol", "a str came")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read_recipe(written(tmp_path, text))


def test_a_folder_or_a_binary_file_is_no_recipe(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(UserError, match="UTF-8 text file"):
            read_recipe(path)


def test_set_changes_one_value_and_reaches_into_lists_and_bare_names(tmp_path):
    path = written(tmp_path, yaml.safe_dump(SMALL))
    changes = ["train.steps=7", "train.learning_rate=6e-4", "methods.0.options.rank=3", "tasks.0.train_size=5", "seeds=[1, 2]", "model=a=b"]
    recipe = read_recipe(path, changes=changes)
    assert (recipe.train.steps, recipe.train.learning_rate) == (7, 6e-4)
    assert recipe.methods[0].name == "finetune"
    assert recipe.methods[0].options == {"rank": 3}
    assert recipe.tasks[0].train_size == 5
    assert recipe.seeds == [1, 2]
    assert recipe.model == "a=b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.steps", "name=value is wanted"),
        ("=3", "name=value is wanted"),
        ("train.stesp=3", "Did you mean 'steps'"),
        ("tasks.1.name=x", "a number from 0 to 0 is wanted, not '1'"),
        ("tasks.first.name=x", "not 'first'"),
        ("model.name.x=3", "holds nothing"),
        ("model=[", "not valid YAML"),
    ],
)
def test_a_change_that_fits_nowhere_is_refused(tmp_path, change, says):
    text = yaml.safe_dump({**SMALL, "model": "smol"})
    with pytest.raises(UserError) as caught:
        read_recipe(written(tmp_path, text), changes=[change])
    assert says in str(caught.value)


def test_the_resolved_recipe_reads_back_as_the_same_recipe(tmp_path):
    raw = {
        "tasks": ["easy_vqa", {"name": "mine", "path": "data/mine.jsonl", "scoring": "ranked"}],
        "base_tasks": ["capital"],
        "methods": [{"name": "routed", "options": {"arms": ["gate", "oracle"], "layers": [1, 2]}, "train": {"steps": 3}}, "joint"],
        "seeds": [3, 1],
        "train": {"gradient_clip": None},
    }
    recipe = check_recipe(raw)
    again = read_recipe(written(tmp_path, write_recipe(recipe)))
    assert again == recipe
    assert write_recipe(again) == write_recipe(recipe)
    assert "save_every: null" in write_recipe(recipe)


def test_every_field_of_the_schema_says_what_it_is():
    schema = Recipe.model_json_schema()
    fields = [field for part in (schema, *schema["$defs"].values()) for field in part["properties"].values()]
    assert len(fields) > 30
    assert all(field.get("description") for field in fields)
    assert schema["additionalProperties"] is False


def test_one_method_with_two_options_needs_labels_and_gets_two_folders(tmp_path):
    twice = [{"name": "routed", "options": {"rank": 2}}, {"name": "routed", "options": {"rank": 8}}]
    with pytest.raises(UserError, match=r"the method 'routed' comes twice. Give each of them a 'label'"):
        check_recipe({**SMALL, "methods": twice})
    recipe = check_recipe({**SMALL, "methods": [twice[0], {**twice[1], "label": "routed_wide"}]})
    cells = [make_cell(recipe, choice, 0, tmp_path) for choice in recipe.methods]
    assert [cell.folder.name for cell in cells] == ["routed-seed0", "routed_wide-seed0"]
    assert [cell.method for cell in cells] == ["routed", "routed"]
    assert cells[0].identity != cells[1].identity


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": [{"name": "joint", "label": "a"}, {"name": "finetune", "label": "a"}]}, "the method 'a' comes twice"),
        ({"methods": ["joint", {"name": "finetune", "label": "joint"}]}, "the method 'joint' comes twice"),
        ({"tasks": ["flags", "flags"]}, "the task 'flags' comes twice"),
        ({"tasks": ["capital"], "base_tasks": ["capital"]}, "the task 'capital' comes twice"),
        ({"seeds": [1, 1]}, "the seed '1' comes twice"),
        ({"tasks": ["a", "b"], "orders": [["a", "b"], ["a", "b"]]}, "the order 'a, b' comes twice"),
        ({"methods": [{"name": "finetune", "orders": [0, 0]}]}, "the number in 'methods.0.orders' '0' comes twice"),
    ],
)
def test_what_would_share_a_folder_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        check_recipe({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"orders": [["easy_vqa"]]}, "'orders.0' lacks 'flags', 'digits'. An order names every task once"),
        (
            {"orders": [["digits", "flags", "easy_vqa"], ["easy_vqa", "digits", "flagz"]]},
            "'orders.1' names an unknown task 'flagz'. Known: ",
        ),
        ({"orders": [["easy_vqa", "digits", "digits", "flags"]]}, "the task in 'orders.0' 'digits' comes twice"),
        ({"methods": [{"name": "finetune", "orders": [1]}]}, r"'methods.0.orders' is \[1\], but there are 1, counted from 0"),
        ({"methods": [{"name": "finetune", "orders": []}]}, r"'methods.0.orders' is \[\]"),
    ],
)
def test_an_order_names_every_task_once_and_methods_name_orders_that_are_there(change, says):
    with pytest.raises(UserError, match=says):
        check_recipe({"tasks": ["easy_vqa", "flags", "digits"], "methods": ["finetune"], **change})


def test_a_joint_method_runs_the_first_of_its_orders():
    orders = [["a", "b"], ["b", "a"]]
    methods = ["x", {"name": "x", "label": "y", "orders": [1]}, {"name": "x", "label": "z", "joint": True}]
    recipe = check_recipe({"tasks": ["a", "b"], "orders": orders, "methods": methods})
    assert [recipe.orders_of(choice) for choice in recipe.methods] == [[0, 1], [1], [0]]
    assert recipe.order(1) == ["b", "a"]


def test_settings_of_the_command_line_are_checked_like_those_of_a_recipe():
    assert check_train(parse_settings(["steps=3", "gradient_clip=null"])).gradient_clip is None
    with pytest.raises(UserError, match=r"unknown key 'stps'.*Did you mean 'steps'"):
        check_train({"stps": 3})
    with pytest.raises(UserError, match="'train_size' is 0"):
        check_task(name="a", train_size=0)


def test_the_recipes_of_the_project_can_be_read():
    found = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert found
    assert all(read_recipe(path).tasks for path in found)
