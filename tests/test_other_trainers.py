"""`attach` then `transformers.Trainer`: no trainer of ours is needed."""

import torch
from transformers import Trainer, TrainingArguments

from alula import Collator, Routing, attach, load_task
from zoo import build


def test_transformers_trainer_trains_one_expert_and_nothing_else(tmp_path):
    model, processor = build("llava")
    mixtures = attach(model)
    mixtures.grow("digits", rank=2)
    mixtures.train_expert("digits")
    mixtures.routing = Routing(fixed={"digits": 1.0})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = load_task("digits", train_size=8, test_size=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, remove_unused_columns=False,
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=list(task.train), data_collator=Collator(processor))
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".experts." in name for name in changed)
