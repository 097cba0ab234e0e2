"""What several methods share: a cut between tasks, refused options, the list."""

import pytest
import torch

from alula import Collator, Stream, Trainer
from alula.cli.app import app
from alula.errors import UserError
from alula.methods import METHODS
from methods_at_work import SETTINGS, tasks
from zoo import build


@pytest.mark.parametrize("name", ["lora", "ia3", "moe_lora", "merging"])
def test_a_run_cut_between_two_tasks_goes_on_with_the_model_it_had(tmp_path, name):
    def trainer():
        model, processor = build("llava")
        return Trainer(model, METHODS[name](model, settings=SETTINGS), Collator(processor), settings=SETTINGS, folder=tmp_path)

    cut, resumed = trainer(), trainer()
    next(cut.learn(Stream(tasks=tasks("one", "two"))))
    again = next(resumed.learn(Stream(tasks=tasks("one", "two"))))
    assert again.is_resumed
    before, after = cut.model.state_dict(), resumed.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora", {"rank": 0}, "rank: 0 came; 1 or more"),
        ("lora", {"linears": ["qproj"]}, "q_proj"),
        ("lora", {"connector_learning_rate": 1e-3}, "connector: false"),
        ("moe_lora", {"rank": 8, "num_experts": 3}, "multiple of the number of experts"),
        ("moe_lora", {"num_experts": 0}, "1 or more"),
        ("merging", {"arms": ("linaer",)}, "Did you mean 'linear'"),
        ("merging", {"density": 0.0}, "density is above 0"),
        ("merging", {"drop_ratio": 1.0}, "below 1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, says):
    with pytest.raises(UserError, match=says):
        METHODS[name](build("llava")[0], settings=SETTINGS, **options)


def test_alula_list_shows_the_new_methods():
    from typer.testing import CliRunner

    said = CliRunner().invoke(app, ["list"]).stdout
    assert all(name in METHODS and f" {name} " in said for name in ("lora", "ia3", "moe_lora", "merging"))
