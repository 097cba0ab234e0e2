"""One of two processes of test_mixed_ranks.py: one has images and the other has none; at last, a run by the command line.

accelerate launch --multi_gpu --num_processes 2 tests/mixed_ranks_worker.py FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from alula import Collator, Routing, Sample, attach, attach_adapters, attach_learners
from alula.cli import main as command_line
from alula.experts.upcycling import upcycle
from alula.files import write_json
from zoo import build, example_batch
from zoo.parts import picture

# The second is the name before some 5.x of transformers.
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))
PATIENCE = 20  # seconds, after which a process that waits for the other gives up


def experts(model, *, gate=False):
    """One expert of whose matrices none is zero any longer, or its gate, trains."""
    mixtures = attach(model)
    mixtures.grow("shapes", rank=4)
    for mixture in mixtures.sites.values():
        torch.nn.init.normal_(mixture.experts.B[0], std=0.1)
    mixtures.routing = Routing(gate_of="shapes") if gate else Routing(fixed={"shapes": 1.0})
    (mixtures.train_gate if gate else mixtures.train_expert)("shapes")


def learners(model, **options):
    """Learners that say something from the start."""
    handle = attach_learners(model, rank=4, positions=64, **options)
    for name, parameter in handle.parameters().items():
        if ".o.B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def sparse(model):
    """Feed-forward networks with more experts than a text-only batch has tokens."""
    for path in upcycle(model.requires_grad_(False), experts=32, top_k=1, every=4, init="fresh"):
        model.get_submodule(path).requires_grad_(True)


CASES = {
    "learners": ("llava", learners),
    "learners, strict": ("llava", lambda model: learners(model, strict_text=True)),
    "learners behind a norm": ("gemma3", learners),
    "experts": ("qwen2_vl", experts),
    "experts across": ("mllama", experts),
    "gate": ("llava", lambda model: experts(model, gate=True)),
    "adapters across": ("mllama", lambda model: attach_adapters(model, num_experts=2, bottleneck=4, hidden_dim=8)),
    "sparse": ("llava", sparse),
}


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, forward, batch):
    """The gradients of two forwards, a parameter that got none as zero."""
    model.zero_grad()
    for _ in range(2):
        loss = forward(**batch, labels=batch["input_ids"]).loss
        if loss.requires_grad:
            loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained(model).items()}


def shared(family, equip, *, rank):
    """How far the gradients under DistributedDataParallel are from the mean of what each process has alone, and how large they are."""
    torch.manual_seed(0)
    model, processor = build(family)
    equip(model)
    model.train()
    batch = example_batch(family, processor, text_only=rank == 1, batch=1)
    alone = gradients(model, model, batch)
    for gradient in alone.values():
        distributed.all_reduce(gradient)
    found = gradients(model, DistributedDataParallel(model), batch)
    off = max((found[name] - alone[name] / 2).abs().max().item() for name in alone)
    return {"off": off, "largest": max(gradient.abs().max().item() for gradient in found.values())}


def with_transformers(folder):
    """The losses of transformers' Trainer with activation checkpointing; in order, process 0 gets the rows with images."""
    torch.manual_seed(0)
    model, processor = build("llava")
    learners(model)
    data = [Sample.ask("what?", "red", images=(picture(1),)), Sample.ask("what now?", "blue")] * 4
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=1, train_sampling_strategy="sequential", learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, **{CHECKPOINTING: True},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=Collator(processor))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    rank = distributed.get_rank()
    found = {name: shared(family, equip, rank=rank) for name, (family, equip) in CASES.items()}
    losses = with_transformers(folder / "work")
    if rank == 0:
        write_json(folder / "found.json", {**found, "losses": losses})
    sys.argv = ["alula", "run", str(folder / "recipe.yaml"), "--out", str(folder / "two")]
    command_line()


if __name__ == "__main__":
    main()
