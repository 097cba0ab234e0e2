"""The loop does what it says: weights tokens equally, changes only what trains, refuses what cannot be learnt from."""

import logging

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import LlamaForCausalLM

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import read_jsonl, read_tensors
from alula.methods import METHODS, Method
from alula.models.anatomy import anatomy
from alula.objectives.next_token import next_token_loss
from alula.training import Trainer, TrainSettings, progress_bar
from alula.training.order import sample_order
from alula.training.trainable import set_modes
from resume_worker import LastLayer, collate, pictures, samples, stream, tiny_model
from zoo import build

FAST = TrainSettings(steps=3, batch_size=4, learning_rate=5e-3)


class Everything(LastLayer):
    """Trains all parameters in one stage and keeps the gradients of the last step."""

    def begin_task(self, model, task):
        """No growth."""

    def stages(self, task):
        return super().stages(task)[:1]

    def begin_stage(self, model, task, stage):
        model.requires_grad_(True)

    def loss(self, model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return {"next_token": next_token_loss(logits, batch["labels"])}

    def before_step(self, model):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def learn(method_class, *, settings=FAST, model=None, data=None, collator=collate, folder=None, **options):
    model = model or tiny_model()
    trainer = Trainer(model, method_class(model, settings=settings), collator, settings=settings, folder=folder, **options)
    trainer.learnt = list(trainer.learn(data or stream()))
    return trainer


def one_task(train):
    return Stream(tasks=(Task(name="only", train=train, test=[]),))


def silent(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return model


def only(part: str) -> type[Method]:
    class Part(METHODS["finetune_full"]):
        def begin_stage(self, model, task, stage):
            parts = anatomy(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parts.part_of(name) == part)

    return Part


def picture_stream() -> Stream:
    return Stream(tasks=tuple(Task(name=name, train=pictures(name, 6), test=[]) for name in ("colour", "hue")))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_step_is_weighted_by_targets(micro_batch_size):
    data = samples("weights", 8)  # 1 to 10 targets each
    model = silent(tiny_model())
    batch = collate([data[index] for index in sample_order(8, seed=0, task="only", stage="train", epoch=0)])
    next_token_loss(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    settings = FAST.model_copy(update={"steps": 1, "batch_size": 8, "micro_batch_size": micro_batch_size})
    found = learn(Everything, settings=settings, model=silent(tiny_model()), data=one_task(data)).method.gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)  # fp32 sums in another order


def test_text_only_step_leaves_a_connector_alone(tmp_path):
    model, processor = build("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(only("connector"), model=model, data=one_task(samples("text", 4)), collator=Collator(processor), folder=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {row["gradient_norm"] for row in read_jsonl(tmp_path / "losses.jsonl")} == {0.0}


def test_recorded_loss_is_the_mean_over_targets(tmp_path):
    data = samples("weights", 8)
    model, batch = silent(tiny_model()), collate(data)
    expected = next_token_loss(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).item()
    settings = FAST.model_copy(update={"steps": 1, "batch_size": 8, "micro_batch_size": 3})
    learn(Everything, settings=settings, model=model, data=one_task(data), folder=tmp_path)
    row = read_jsonl(tmp_path / "losses.jsonl")[0]
    assert row.keys() == {"task", "stage", "step", "loss", "targets", "learning_rate", "gradient_norm"}
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["targets"] == int((batch["labels"] != -100).sum())


def test_micro_batch_without_targets_counts_nothing():
    def forgetful(batch):
        made = collate(batch)
        made["labels"][[sample.id == "weights 0" for sample in batch]] = -100
        return made

    settings = FAST.model_copy(update={"steps": 2, "micro_batch_size": 1})
    learnt = learn(Everything, settings=settings, data=one_task(samples("weights", 4)), collator=forgetful).learnt[0]
    assert learnt.cost.optimizer_targets == 2 * (8 + 5 + 2)


def test_step_without_any_target_is_refused():
    with pytest.raises(UserError, match="Task 'first', stage 'train', step 0: no sample of the batch has a target"):
        learn(Everything, collator=lambda batch: collate(batch) | {"labels": torch.full((len(batch), 20), -100)})


def test_non_finite_loss_is_refused_before_the_step(tmp_path):
    class Exploding(Everything):
        def loss(self, model, batch):
            parts = super().loss(model, batch)
            return {name: value * (float("nan") if self.seen == 4 else 1.0) for name, value in parts.items()}

        def before_step(self, model):
            self.seen += 1

    settings = FAST.model_copy(update={"steps": 6, "save_every": 4})
    model = tiny_model()
    trainer = Trainer(model, Exploding(model, settings=settings), collate, settings=settings, folder=tmp_path)
    with pytest.raises(UserError, match=r"Task 'first', stage 'train', step 4: the loss is nan[\s\S]*Halve learning_rate"):
        list(trainer.learn(stream()))
    saved = read_tensors(tmp_path / "checkpoint" / "tensors.safetensors")
    assert len(saved) > 10
    for name, value in model.named_parameters():
        assert torch.isfinite(value).all()
        assert torch.equal(saved[f"model/{name}"], value)


def test_frozen_stays_bit_identical():
    model, processor = build("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(METHODS["finetune_full"], model=model, data=picture_stream(), collator=Collator(processor))
    parts = anatomy(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {parts.part_of(name) for name in changed} == {"decoder"}
    assert len(changed) > 10


def test_frozen_running_statistics_do_not_move():
    frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    set_modes(model)
    model(torch.randn(8, 2))
    assert torch.equal(frozen[1].running_mean, torch.zeros(2))
    assert not frozen[2].training
    assert model[1][1].training


@pytest.mark.parametrize("trained", ["decoder", "connector"])
def test_activation_checkpointing_equals_plain(trained):
    found = []
    for recompute in (False, True):
        model, processor = build("llava")
        settings = FAST.model_copy(update={"activation_checkpointing": recompute, "steps": 2})
        learn(only(trained), settings=settings, model=model, data=picture_stream(), collator=Collator(processor))
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_model_that_cannot_recompute_is_refused():
    model = nn.Linear(2, 2)
    settings = FAST.model_copy(update={"activation_checkpointing": True})
    with pytest.raises(UserError, match="Linear has no activation checkpointing"):
        Trainer(model, Everything(model, settings=settings), collate, settings=settings, folder=None)


def test_bf16_runs_and_keeps_fp32_weights(tmp_path):
    trainer = learn(Everything, settings=FAST.model_copy(update={"mixed_precision": "bf16"}), folder=tmp_path)
    learn(Everything, settings=FAST, folder=tmp_path / "plain")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    losses = [[row["loss"] for row in read_jsonl(folder / "losses.jsonl")] for folder in (tmp_path, tmp_path / "plain")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # bf16 has three digits


def test_weights_in_bf16_stay_so_and_experts_beside_them_learn_in_fp32(tmp_path):
    model, processor = build("llava")
    model = model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = FAST.model_copy(update={"steps": 6, "learning_rate": 1e-2, "activation_checkpointing": True})
    trainer = learn(
        METHODS["finetune"], settings=settings, model=model, data=picture_stream(), collator=Collator(processor), folder=tmp_path
    )
    losses = [row["loss"] for row in read_jsonl(tmp_path / "losses.jsonl")]
    assert losses[5] < losses[0] - 0.3
    assert {value.dtype for value in trainer.method.stored_tensors(model).values()} == {torch.float32}
    trainer.method.mixtures.detach()
    after = model.state_dict()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())


def test_joint_sees_all_tasks_with_the_same_compute():
    seen = set()

    def watching(batch):
        seen.update(sample.id for sample in batch)
        return collate(batch)

    settings = FAST.model_copy(update={"steps": 6})
    in_turn = learn(METHODS["finetune_full"], settings=settings, collator=watching).learnt
    each, seen = seen, set()
    joint = learn(METHODS["joint_full"], settings=settings, collator=watching).learnt
    assert [learnt.task.name for learnt in joint] == ["joint"]
    assert seen == each == {sample.id for task in stream().tasks for sample in task.train}
    assert joint[0].cost.steps == sum(learnt.cost.steps for learnt in in_turn) == 12
    assert joint[0].cost.samples_seen == sum(learnt.cost.samples_seen for learnt in in_turn) == 48


def test_forward_only_stage_sees_each_sample_once():
    trainer = learn(LastLayer)
    assert round(trainer.method.seen.item()) == 2 * 11
    assert [learnt.cost.samples_seen for learnt in trainer.learnt] == [4 * 3 + 11 + 4 * 4] * 2
    assert [learnt.cost.steps for learnt in trainer.learnt] == [7, 7]


def test_workers_change_nothing():
    alone, helped = learn(Everything), learn(Everything, settings=FAST.model_copy(update={"num_workers": 1}))
    for name, value in alone.model.state_dict().items():
        assert torch.equal(helped.model.state_dict()[name], value)


def test_random_state_of_the_caller_is_untouched():
    before = torch.get_rng_state()
    learn(LastLayer)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_trains_is_said_with_counts(caplog):
    with caplog.at_level(logging.DEBUG, logger="alula.training.loop"):
        learn(LastLayer)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(said) == 6  # once a stage
    assert "Task 'first', stage 'train' trains 2,608 parameters in " in said[0]
    assert any("model.layers.*.self_attn.q_proj.weight: 256 in 1 tensors" in record.getMessage() for record in caplog.records)


def test_stage_without_trainable_parameters_is_refused():
    class Nothing(Everything):
        def begin_stage(self, model, task, stage):
            model.requires_grad_(False)

    with pytest.raises(UserError, match=r"nothing trains[\s\S]*Nothing.begin_stage must set requires_grad"):
        learn(Nothing)


def test_task_without_samples_is_refused():
    with pytest.raises(UserError, match="Task 'only' has no training samples"):
        learn(Everything, data=one_task([]))


def test_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="lerning_rate"):
        TrainSettings(lerning_rate=1.0)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.05), ("constant", 1.0)])
def test_rate_rises_then_follows_the_schedule(schedule, last):
    settings = TrainSettings(warmup_ratio=0.2, schedule=schedule)
    factors = [settings.rate_factor(step, steps=20) for step in range(20)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[-1] == pytest.approx(last, abs=0.05)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_progress_shows_steps_of_each_stage():
    with progress_bar() as progress:
        learn(LastLayer, progress=progress)
    assert [task.completed for task in progress.tasks] == [3, 3, 4] * 2
    assert all(task.finished for task in progress.tasks)
