"""Parts of a model train with rates of their own, through schedule, checkpoint and resumption."""

import logging
from dataclasses import replace

import pytest
import torch

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.models.anatomy import anatomy
from alula.training import Trainer, TrainSettings
from alula.training.archive import recipe_of
from resume_worker import SETTINGS, LastLayer, collate, pictures, samples, stream, tiny_model, train
from zoo import build

ONE_STEP = TrainSettings(steps=1, batch_size=4, learning_rate=1e-3, warmup_ratio=0.0, gradient_clip=None)
# In the middle of the layer, so that the groups' order is not the order of the parameters.
RATES = {"model.layers.1.mlp": 4e-3, "model.layers.1.mlp.up_proj.weight": 2e-4, "model.layers.1.self_attn.k_proj": 4e-3}


class Rated(LastLayer):
    def stages(self, task):
        return tuple(replace(stage, rates=RATES) for stage in super().stages(task))


class Once(Rated):
    def stages(self, task):
        return super().stages(task)[:1]


class PowerCut(Exception):
    pass


def changes(model, before):
    return {name: (value - before[name]).abs() for name, value in model.named_parameters() if name in before}


def test_each_part_takes_its_first_step_with_its_own_rate(tmp_path, caplog):
    model = tiny_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(model, Once(model, settings=ONE_STEP), collate, settings=ONE_STEP, folder=tmp_path)
    with caplog.at_level(logging.INFO, logger="alula"):
        next(trainer.learn(Stream(tasks=(Task(name="only", train=samples("rates", 4), test=[]),))))
    # AdamW's first step is rate * g / (|g| + 1e-8): the rate itself wherever the gradient is not tiny.
    for name, change in changes(model, before).items():
        expected = 0.0
        if "layers.1." in name:
            expected = 2e-4 if "up_proj" in name else 4e-3 if "mlp" in name or "k_proj" in name else 1e-3
        assert change.max().item() == pytest.approx(expected, rel=0.01), name
        assert change.median().item() == pytest.approx(expected, rel=0.01), name
    assert read_jsonl(tmp_path / "losses.jsonl")[0]["learning_rate"] == 1e-3  # the stage's own
    assert "512 of them at peak rate 0.0002" in caplog.text


def test_steps_remember_as_the_betas_say(tmp_path):
    class Watching(LastLayer):
        def before_step(self, model):
            seen.append({name: value.detach().clone() for name, value in model.named_parameters() if "layers.1." in name})

    seen, settings = [], ONE_STEP.model_copy(update={"steps": 3, "schedule": "constant", "betas": (0.0, 0.0)})
    model = tiny_model()
    trainer = Trainer(model, Watching(model, settings=settings), collate, settings=settings, folder=tmp_path)
    next(trainer.learn(Stream(tasks=(Task(name="only", train=samples("rates", 4), test=[]),))))
    # without a memory every step is rate * g / (|g| + 1e-8), as else only the first one is
    lengths = torch.cat([(seen[2][name] - seen[1][name]).abs().flatten() for name in seen[0]])
    assert torch.isclose(lengths, torch.tensor(1e-3), rtol=0.01).float().mean().item() > 0.9
    assert trainer.recipe["betas"] == [0.0, 0.0]
    assert "betas" not in recipe_of(ONE_STEP, trainer.method, Stream(tasks=()), identity="")  # checkpoints from before it was a setting


def test_the_schedule_falls_on_every_rate(tmp_path):
    class Watching(Once):
        def begin_task(self, model, task):
            super().begin_task(model, task)
            self.rates_seen = []

        def before_step(self, model):
            self.rates_seen.append([group["lr"] for group in optimizers[0].param_groups])

    optimizers = []
    settings = ONE_STEP.model_copy(update={"steps": 4, "warmup_ratio": 0.5})
    model = tiny_model()
    method = Watching(model, settings=settings)
    trainer = Trainer(model, method, collate, settings=settings, folder=tmp_path)
    made = torch.optim.AdamW
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda *args, **keywords: optimizers.append(made(*args, **keywords)) or optimizers[-1])
        next(trainer.learn(Stream(tasks=(Task(name="only", train=samples("rates", 4), test=[]),))))
    factors = [settings.rate_factor(step, steps=4) for step in range(4)]
    assert sorted(method.rates_seen[0]) == pytest.approx([peak * factors[0] for peak in (2e-4, 1e-3, 4e-3)])
    for seen, factor in zip(method.rates_seen, factors, strict=True):
        assert sorted(seen) == pytest.approx([peak * factor for peak in (2e-4, 1e-3, 4e-3)])
    logged = [row["learning_rate"] for row in read_jsonl(tmp_path / "losses.jsonl")]
    assert logged == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("calls", [6, 25], ids=["in the first stage", "in the last stage"])
def test_resume_with_several_rates_equals_uninterrupted(tmp_path, calls):
    whole = train(tmp_path / "whole", method=Rated)
    plain = train(None)
    left = calls

    def fragile(batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCut
        return collate(batch)

    model = tiny_model()
    cut = Trainer(model, Rated(model, settings=SETTINGS), fragile, settings=SETTINGS, folder=tmp_path / "cut")
    with pytest.raises(PowerCut):
        list(cut.learn(stream()))
    resumed = train(tmp_path / "cut", method=Rated)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert not torch.equal(plain.model.model.layers[1].mlp.up_proj.weight, whole.model.model.layers[1].mlp.up_proj.weight)
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


def naive(**options):
    model, processor = build("llava")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    method = METHODS["finetune_full"](model, settings=ONE_STEP, **options)
    task = Task(name="colour", train=pictures("colour", 4), test=[])
    next(Trainer(model, method, Collator(processor), settings=ONE_STEP, folder=None).learn(Stream(tasks=(task,))))
    parts = anatomy(model)
    found = {}
    for name, change in changes(model, before).items():
        found[parts.part_of(name)] = max(found.get(parts.part_of(name), 0.0), change.max().item())
    return found


def test_naive_fine_tuning_trains_the_connector_with_its_own_rate():
    found = naive(connector=True, connector_learning_rate=5e-3)
    assert found["decoder"] == pytest.approx(1e-3, rel=0.01)
    assert found["connector"] == pytest.approx(5e-3, rel=0.01)
    assert found["encoder"] == 0.0


def test_the_connector_trains_at_the_decoders_rate_unless_told():
    assert naive(connector=True)["connector"] == pytest.approx(1e-3, rel=0.01)
    assert naive()["connector"] == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"connector_learning_rate": 1e-5}, "1e-05 came with connector: false"),
        ({"connector": True, "connector_learning_rate": -1.0}, "-1.0 came with connector: true"),
    ],
)
def test_a_rate_for_a_connector_that_does_not_train_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        METHODS["joint_full"](build("llava")[0], settings=ONE_STEP, **options)


def test_a_connector_where_there_is_none_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no connector"):
        METHODS["finetune_full"](tiny_model(), settings=ONE_STEP, connector=True)
