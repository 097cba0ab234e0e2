"""`attach`, `attach_learners` or both, then another trainer: transformers' own, or TRL's. No trainer of ours is needed."""

import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from alula import Collator, Pool, Routing, Sample, attach, attach_learners
from zoo import build
from zoo.parts import picture

ROWS = (("what colour is the square?", "red", picture(1)), ("how many circles are there?", "three", picture(2)))
# The second is the name before some 5.x of transformers.
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))
LEAN = {"bf16": True, CHECKPOINTING: True}
PLAIN = {"bf16": False, CHECKPOINTING: False}


def equip(model, kind):
    """The handles on a model: LoRA experts, learners or both; all of them train."""
    mixtures = learners = None
    if "experts" in kind:
        mixtures = attach(model)
        mixtures.grow("shapes", rank=4)
        mixtures.train_expert("shapes")
        mixtures.routing = Routing(fixed={"shapes": 1.0})
    if "learners" in kind:
        learners = attach_learners(model, rank=4, positions=64)
    return mixtures, learners


def with_transformers(model, processor, **options):
    samples = [Sample.ask(question, answer, images=(image,)) for question, answer, image in ROWS]
    arguments = TrainingArguments(remove_unused_columns=False, **options)
    return Trainer(model, arguments, train_dataset=samples, data_collator=Collator(processor))


def with_trl(model, processor, **options):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": [image]}
        for question, answer, image in ROWS
    ]
    arguments = SFTConfig(max_length=None, **options)
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)


def loaded(folder, family, dtype):
    """The base model with all that a pool holds."""
    model, pool = build(family)[0].to(dtype), Pool.open(folder)
    if pool.names:
        pool.attach(model)
    pool.attach_learners(model)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "family", "options"),
    [
        (with_transformers, "experts", "llava", PLAIN),
        (with_transformers, "learners", "llava", PLAIN),
        (with_transformers, "experts and learners", "qwen2_vl", LEAN),
        (with_trl, "experts", "qwen2_vl", PLAIN),
        (with_trl, "learners", "llava", PLAIN),
        (with_trl, "experts and learners", "llava", LEAN),
    ],
)
def test_another_trainer_trains_what_was_attached_and_nothing_else(tmp_path, make, kind, family, options):
    model, processor = build(family)
    dtype = torch.bfloat16 if options["bf16"] else torch.float32
    mixtures, learners = equip(model.to(dtype), kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make(
        model, processor, output_dir=str(tmp_path / "work"), max_steps=6, per_device_train_batch_size=2, learning_rate=3e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and all(map(math.isfinite, losses)) and losses[-1] < 0.98 * losses[0], losses
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = [".experts."] * (mixtures is not None) + [".learners.image.", ".learners.text.", ".router."] * (learners is not None)
    assert all(any(part in name for part in kinds) for name in changed)
    assert all(any(part in name for name in changed) for part in kinds)

    pool = Pool.create(tmp_path / "pool", mixtures or learners, base="tiny")
    if mixtures:
        mixtures.refresh()
        pool.add(mixtures, "shapes", about={})
    if learners:
        pool.add_learners(learners, "shapes", about={})
    found, trained = loaded(tmp_path / "pool", family, dtype).state_dict(), model.state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in trained)


# TRL's own: it gives checkpointing under the name it had before.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning", "ignore:.*pin_memory.*:UserWarning")
def test_the_documented_way_with_trl_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "learners.md"
    _, with_trl, beside = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code = re.sub(r'"HuggingFaceTB/\S+?"', '"my-model"', with_trl)
    code = code.replace("max_steps=60", "max_steps=1, use_cpu=True")  # TRL wants a GPU for the bf16 that is its default
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")
    picture(1).save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(code + beside, page.name, "exec"), space)
    assert Pool.open("my-pool").learner_names == ["invoices"] and space["mixtures"].names == ["invoices"]
