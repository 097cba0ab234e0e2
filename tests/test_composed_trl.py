"""A composed model in TRL's trainer, which asks a model for its body and computes the loss from its last hidden states."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, TrainingArguments
from trl import SFTConfig, SFTTrainer

from alula import attach_adapters
from alula.models.composed import ComposedVLM
from composed_models import BACKBONES, asked, make_processor, mixture_config, picture, save_sentences, tiny_model

# The second is the name before some 5.x of transformers.
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))
ROWS = (("what colour is it?", "red", picture(1)), ("how many?", "three", picture(2)))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """One whose sentence encoder is tiny and random."""
    return make_processor(save_sentences(tmp_path_factory.mktemp("sentences")))


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_the_body_and_the_head_are_the_model(backbone, processor):
    model = tiny_model(backbone=backbone)
    batch = asked(processor, ["<image>what?", "no image"], [[picture(1)], []])
    hidden = model.base_model(**batch).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(**batch).logits)
    assert not any("whole" in name for name in model.state_dict())  # a view, which the model does not hold
    assert not model.supports_tp_plan or BACKBONES[backbone].base_model_tp_plan


# TRL's own: torch's pin_memory without an accelerator.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("equipped", [True, False])
def test_trl_trains_a_composed_model_whose_encoders_and_adapters_read_the_instruction(equipped, processor, tmp_path):
    model = ComposedVLM(mixture_config())
    if equipped:
        attach_adapters(model, num_experts=2, bottleneck=4, hidden_dim=8)
    names, before = [name for name, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": [image]}
        for question, answer, image in ROWS
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
        max_length=None, assistant_only_loss=True, dataloader_pin_memory=False, **{CHECKPOINTING: False},
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert "instruction_embedding" in inputs
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < 0.98 * losses[0], losses
    changed = {name for name in names if not torch.equal(model.state_dict()[name], before[name])}
    if equipped:
        assert changed and all(".adapters." in name or ".mlp.router." in name for name in changed)
    else:
        assert any(name.startswith("connector.router.") for name in changed) and any(name.startswith("language_model.") for name in changed)
        model.save_pretrained(tmp_path / "saved")
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(found[name], model.state_dict()[name]) for name in names)
