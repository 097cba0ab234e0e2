"""Claims about full training with the encoder: it moves at its own rate, and nothing that should stay moves."""

import pytest
import torch
from transformers import LlamaConfig

from alula import Collator, Stream, Task, Trainer, TrainSettings
from alula.errors import UserError
from alula.methods import METHODS
from alula.models.anatomy import anatomy
from alula.models.composed import ComposedConfig, ComposedVLM
from composed_models import BACKBONE
from resume_worker import pictures, tiny_model
from zoo import build

SETTINGS = TrainSettings(steps=1, batch_size=4, learning_rate=1e-3, warmup_ratio=0.0, schedule="constant")


def moved(name="llava", **options):
    """The largest change of any parameter in each part, after one step: AdamW's first one is as long as the rate."""
    model, processor = build(name)
    before = {path: value.detach().clone() for path, value in model.named_parameters()}
    method = METHODS["finetune_full"](model, settings=SETTINGS, **options)
    task = Task(name="colour", train=pictures("colour", 4), test=[])
    next(Trainer(model, method, Collator(processor), settings=SETTINGS, folder=None).learn(Stream(tasks=(task,))))
    parts, found = anatomy(model), {}
    for path, value in model.named_parameters():
        part = parts.part_of(path)
        found[part] = max(found.get(part, 0.0), (value.detach() - before[path]).abs().max().item())
    return found


def test_the_encoder_trains_if_asked_at_the_decoders_rate_or_its_own():
    assert moved()["encoder"] == 0.0
    assert moved(encoder=True)["encoder"] == pytest.approx(1e-3, rel=0.01)
    found = moved(encoder=True, encoder_learning_rate=1e-5)
    assert found["encoder"] == pytest.approx(1e-5, rel=0.01)
    assert found["decoder"] == pytest.approx(1e-3, rel=0.01)
    assert found["connector"] == 0.0


def test_a_connector_inside_an_encoder_keeps_the_decoders_rate():
    found = moved("qwen2_vl", encoder=True, encoder_learning_rate=1e-5, connector=True)
    assert found["encoder"] == pytest.approx(1e-5, rel=0.01)
    assert found["connector"] == pytest.approx(1e-3, rel=0.01)


def test_the_encoders_batch_norms_stay_as_they_are():
    model = ComposedVLM(
        ComposedConfig(
            text_config=LlamaConfig(**BACKBONE), image_seq_length=1, encoder_config={"name": "efficientnet_lite0", "image_size": 32}
        )
    )
    method = METHODS["finetune_full"](model, settings=SETTINGS, encoder=True)
    task = Task(name="colour", train=[], test=[])
    (stage,) = method.stages(task)
    method.begin_stage(model, task, stage)
    norms = [module for module in model.vision_tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    kinds = {
        type(module).__name__ for module in model.vision_tower.modules() if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    assert "SameConv2d" in kinds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder_learning_rate": 1e-5}, "1e-05 came with encoder: false"),
        ({"encoder": True, "encoder_learning_rate": 0}, "0.0 came with encoder: true"),
    ],
)
def test_a_rate_for_an_encoder_that_does_not_train_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        METHODS["joint_full"](build("llava")[0], settings=SETTINGS, **options)


def test_an_encoder_where_there_is_none_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no encoder"):
        METHODS["finetune_full"](tiny_model(), settings=SETTINGS, encoder=True)
