"""Options are looked at when a recipe is: a typo costs no minute of loading and scoring."""

from inspect import Parameter, signature
from pathlib import Path

import pytest

from alula.config import check_recipe, read_recipe
from alula.errors import UserError
from alula.methods import ADDITIONS, METHODS
from alula.running.cells import check_methods
from alula.running.options import FROM_THE_RUN, option_names
from alula.running.run import run_recipe


def recipe(method, **changes):
    return check_recipe({"model": "no/where", "tasks": ["easy_vqa"], "methods": [method], **changes})


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "finetune", "options": {"rnak": 2}}, r"Unknown option 'rnak' of method 'finetune'\. Known: .*Did you mean 'rank'"),
        ({"name": "finetune", "options": {"rank": "8"}}, r"method 'finetune': 'options\.rank' is '8': .*valid integer"),
        ({"name": "finetune", "options": {"layers": 3}}, r"method 'finetune': 'options\.layers' is 3: .*Sequence"),
        ({"name": "routed", "with": [{"name": "o_lora", "options": {"weight": "big"}}]}, r"addition 'o_lora': 'options\.weight' is 'big'"),
        ({"name": "ia3", "options": {"rank": 2}}, r"Unknown option 'rank' of method 'ia3'\. Known: none"),
        ({"name": "merging", "options": {"rnak": 2}}, r"of method 'merging'\. Known: .*Did you mean 'rank'"),
        ({"name": "wings", "options": {"strict_texts": True}}, r"of method 'wings'\. Known: .*Did you mean 'strict_text'"),
        ({"name": "wings", "options": {"visual_ratoi": 0.5}}, r"of method 'wings'\. Known: .*Did you mean 'visual_ratio'"),
        ({"name": "wings", "options": {"rank": 0}}, r"method 'wings': 'options\.rank' is 0: .*greater than or equal to 1"),
        ({"name": "mome", "options": {"num_expert": 2}}, r"of method 'mome'\. Known: .*Did you mean 'num_experts'"),
        ({"name": "mome", "options": {"bottleneck": "wide"}}, r"method 'mome': 'options\.bottleneck' is 'wide'"),
        ({"name": "routed", "options": {"mixtures": 1}}, r"Unknown option 'mixtures' of method 'routed'"),
        ({"name": "routed", "with": [{"name": "ewc", "options": {"wieght": 1}}]}, r"of addition 'ewc'\. Known: .*Did you mean 'weight'"),
        ({"name": "routed", "with": [{"name": "ewc", "options": {"collator": 1}}]}, r"Unknown option 'collator' of addition 'ewc'"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_looked_for(method, says, tmp_path):
    with pytest.raises(UserError, match=says):
        run_recipe(recipe(method), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_method_or_addition_hides_the_names_of_its_options():
    kinds = [table[name] for table in (METHODS, ADDITIONS) for name in table]
    for kind in kinds:
        hides = any(one.kind is Parameter.VAR_KEYWORD for one in signature(kind).parameters.values())
        assert hides == (getattr(kind, "further_options", None) is not None), kind
        assert len(option_names(kind)) == len(set(option_names(kind)))
        assert not set(option_names(kind)) & set(FROM_THE_RUN)
    assert {"strict_text", "visual_ratio", "connector"} <= set(option_names(METHODS["wings"]))


def test_the_recipes_of_the_project_give_options_that_exist():
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        check_methods(read_recipe(path))
