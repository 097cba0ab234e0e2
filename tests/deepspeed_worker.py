"""One of two processes of test_deepspeed_engine.py: attached experts, transformers' Trainer and DeepSpeed's engine, ZeRO stages 1 and 2.

torchrun --nproc-per-node 2 tests/deepspeed_worker.py OUT
"""

import os
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from alula import Collator, Routing, Sample, attach
from alula.files import write_json
from zoo import build

COLOURS = ("red", "green", "blue")
STAGES = (1, 2)  # the third cannot: docs/distributed.md


def train(folder, *, batch_size, **options):
    """Five steps of one expert on eight pictures: who trained, the losses, and the sum of each trained tensor."""
    torch.manual_seed(0)
    model, processor = build("llava")
    mixtures = attach(model)
    mixtures.grow("colours", rank=4)
    mixtures.train_expert("colours")
    mixtures.routing = Routing(fixed={"colours": 1.0})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # at birth half of them are zero, and the first steps say little
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    pictures = [(COLOURS[index % 3], Image.new("RGB", (40, 40), COLOURS[index % 3])) for index in range(8)]
    data = [Sample.ask(f"{index}: which colour?", colour, images=(image,)) for index, (colour, image) in enumerate(pictures)]
    arguments = TrainingArguments(
        str(folder), max_steps=5, per_device_train_batch_size=batch_size, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=Collator(processor))
    trainer.train()
    engine = trainer.model_wrapped
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "processes": arguments.world_size,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "sums": {name: parameter.detach().double().sum().item() for name, parameter in trained.items()},
    }


def main():
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState

    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ op for CPUs, compiled at the first start; gloo does without
    # On a CPU, TrainingArguments start DeepSpeed and then take each process for the only one, unless they find a state that says gloo.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    state = PartialState(backend="gloo")
    found = {}
    for stage in STAGES:
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
        config = {**auto, "zero_optimization": {"stage": stage}}
        AcceleratorState._reset_state()  # one config a process is what it is made for
        found[stage] = train(out.parent, batch_size=2, deepspeed=config, accelerator_config={"use_configured_state": True})
    if state.is_main_process:
        write_json(out, found)


if __name__ == "__main__":
    main()
