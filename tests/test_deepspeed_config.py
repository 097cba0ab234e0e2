"""A DeepSpeed config becomes settings of alula's own loop; what contradicts them, or what the loop does not do, is refused by name."""

import json
import logging

import pytest
import yaml
from accelerate import Accelerator, DistributedType

from alula.cli.launched import launched
from alula.config import check_train, parse_settings, read_recipe
from alula.errors import UserError
from alula.files import write_json, write_text
from alula.training.deepspeed_settings import with_deepspeed
from alula.training.start import make_accelerator

# The template of transformers' documentation, with numbers for half of what it leaves to the trainer.
CONFIG = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 6}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False, "profile": False},
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
    "wall_clock_breakdown": False,
    "tensorboard": {"enabled": False},
}
TAKEN = {
    "micro_batch_size": 4,
    "batch_size": 16,
    "shard": True,
    "mixed_precision": "bf16",
    "activation_checkpointing": True,
    "gradient_clip": 0.5,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "betas": (0.9, 0.95),
    "schedule": "constant",
    "warmup_ratio": 0.1,
}


def translated(config, *, num_processes=2, **train):
    return with_deepspeed({"deepspeed": config, **train}, where="recipe", num_processes=num_processes)


def test_whole_config_becomes_settings_and_says_what_it_was_taken_for(caplog):
    with caplog.at_level(logging.WARNING):
        found = translated(CONFIG)
    assert found == TAKEN
    taken, idle = (record.getMessage() for record in caplog.records)
    assert "run by alula's own loop and FSDP2" in taken and "batch_size 16" in taken and "The weights keep their dtype" in taken
    names = idle.removeprefix("recipe: 'deepspeed': without effect here: ").removesuffix(".").split(", ")
    assert set(names) == {
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_optimization.overlap_comm",
        "zero_optimization.sub_group_size",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "fp16.loss_scale",
        "fp16.initial_scale_power",
        "activation_checkpointing.profile",
    }


@pytest.mark.parametrize(("stage", "shard"), [(0, False), (1, False), (2, True), (3, True)])
def test_stages_two_and_three_are_sharded(stage, shard):
    assert translated({"zero_optimization": {"stage": stage}}) == {"shard": shard}


@pytest.mark.parametrize(
    ("sizes", "ours", "found"),
    [
        ({"train_batch_size": 32}, {}, {"batch_size": 32}),
        ({"train_micro_batch_size_per_gpu": 4}, {}, {"micro_batch_size": 4, "batch_size": 8}),
        ({"train_micro_batch_size_per_gpu": 4}, {"batch_size": 24}, {"micro_batch_size": 4, "batch_size": 24}),
        ({"gradient_accumulation_steps": 4}, {"batch_size": 24}, {"micro_batch_size": 3, "batch_size": 24}),
        ({"gradient_accumulation_steps": 4}, {}, {"micro_batch_size": 2}),
        ({"gradient_accumulation_steps": 4}, {"micro_batch_size": 3}, {"micro_batch_size": 3, "batch_size": 24}),
        ({"gradient_accumulation_steps": 1}, {"batch_size": 7}, {"batch_size": 7}),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, {}, {"micro_batch_size": 4, "batch_size": 24}),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}, {"batch_size": 5}, {"batch_size": 5}),
    ],
)
def test_sizes_of_batches_follow_from_each_other_and_from_ours(sizes, ours, found):
    assert translated(sizes, **ours) == found


@pytest.mark.parametrize(
    ("config", "ours", "words"),
    [
        ({"train_batch_size": 32}, {"batch_size": 16}, "'train_batch_size' is 32, but batch_size is 16"),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch_size": 2}, "is 4, but micro_batch_size is 2"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            {},
            r"4 \(micro-batch\) x 2 .* x 2 \(processes\) is 16, but the batch is 32",
        ),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, {"batch_size": 16}, "is 24, but the batch is 16"),
        ({"gradient_accumulation_steps": 3}, {"batch_size": 16}, r"is 3, but a batch of 16 cannot be cut into 3 x 2"),
        ({"zero_optimization": {"stage": 3}}, {"shard": False}, "'zero_optimization.stage' is 3, but shard is False"),
        ({"gradient_clipping": 0.0}, {"gradient_clip": 1.0}, "'gradient_clipping' is 0.0, but gradient_clip is 1.0"),
        ({"bf16": {"enabled": True}}, {"mixed_precision": "no"}, "'bf16.enabled' is True, but mixed_precision is no"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, {"learning_rate": "6e-4"}, "is 0.001, but learning_rate is 0.0006"),
        ({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}}, {"weight_decay": 0}, "is 0.1, but weight_decay is 0.0"),
        (
            {"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}}},
            {},
            "'scheduler.params.warmup_max_lr' is 0.002, but 'optimizer.params.lr' is 0.001",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}}, {"steps": 50}, "is 100, but .* for 50 steps"),
    ],
)
def test_contradiction_names_both_numbers(config, ours, words):
    with pytest.raises(UserError, match=words):
        translated(config, **ours)


def test_same_number_on_both_sides_is_no_contradiction():
    ours = {"learning_rate": "1e-3", "warmup_ratio": 0.1, "steps": 60, "batch_size": 16, "shard": True}
    assert translated(CONFIG, **ours) == TAKEN | {"steps": 60}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "'zero_optimization.offload_optimizer' is on.*save",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "'zero_optimization.offload_param' is on"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "'activation_checkpointing.cpu_checkpointing' is on"),
        ({"fp16": {"enabled": True}}, '"bf16": {"enabled": true}'),
        ({"pipeline": {"stages": 4}}, "'pipeline' is on.*ZeRO stage 2 or 3"),
        ({"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}, "'compression_training' is on"),
        ({"expert_parallel": {"size": 4}}, "'expert_parallel' is on.*alula.attach"),
        ({"wandb": {"enabled": True}}, "'wandb' is on.*trackers"),
        ({"optimizer": {"type": "OneBitAdam"}}, "'optimizer' is OneBitAdam.*AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "decay is decoupled"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "has eps 1e-06.*1e-08"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "'scheduler' is WarmupDecayLR.*WarmupCosineLR"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation'.*Did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "unknown key 'zero_optimization.overlap_com'.*'overlap_comm'"),
        ({"zero_optimization": {"stage": 4}}, "'zero_optimization.stage' is 4"),
        ([], "a DeepSpeed config .* is wanted"),
    ],
)
def test_what_the_loop_does_not_do_is_refused_with_a_remedy(config, words):
    with pytest.raises(UserError, match=words):
        translated(config)


def test_recipe_names_a_file_and_is_resolved_without_it(tmp_path):
    write_json(tmp_path / "ds.json", CONFIG | {"train_batch_size": 8})
    raw = {"tasks": ["emoji_en"], "methods": ["finetune"], "train": {"deepspeed": str(tmp_path / "ds.json"), "steps": 60}}
    write_text(tmp_path / "recipe.yaml", yaml.safe_dump(raw))
    found = read_recipe(tmp_path / "recipe.yaml")
    assert found.train.model_dump(include=set(TAKEN)) == TAKEN | {"batch_size": 8}
    with pytest.raises(UserError, match="'bf16' is on, but the recipe's dtype is float16"):
        read_recipe(tmp_path / "recipe.yaml", changes=["dtype=float16"])
    with pytest.raises(UserError, match=r"ds\.json: 'train_batch_size' is 8, but batch_size is 9"):
        read_recipe(tmp_path / "recipe.yaml", changes=["train.batch_size=9"])


def test_defaults_of_a_verb_give_way_to_the_config_and_settings_of_the_user_do_not():
    config = {"train_batch_size": 32}
    assert check_train({"deepspeed": config}, defaults={"batch_size": 64, "steps": 9}).model_dump(include={"batch_size", "steps"}) == {
        "batch_size": 32,
        "steps": 9,
    }
    with pytest.raises(UserError, match="is 32, but batch_size is 64"):
        check_train({"deepspeed": config, "batch_size": 64})


def test_accelerate_launch_hands_over_its_file(monkeypatch, tmp_path):
    write_json(tmp_path / "ds: one.json", {"gradient_clipping": 0.25})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds: one.json"))
    with launched() as asked:
        assert check_train(parse_settings(asked)).gradient_clip == 0.25
        assert Accelerator(cpu=True).distributed_type is DistributedType.NO  # and not DeepSpeed, which is not installed


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, {"shard": True}),
        ({"DEEPSPEED_ZERO_STAGE": "1", "GRADIENT_ACCUMULATION_STEPS": "1"}, {"shard": False}),
        ({"DEEPSPEED_ZERO_STAGE": "3", "GRADIENT_CLIPPING": "2.0"}, {"shard": True, "gradient_clip": 2.0}),
        ({"MIXED_PRECISION": "bf16"}, {"shard": True, "mixed_precision": "bf16"}),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, {"shard": True, "micro_batch_size": 4}),
        ({"MIXED_PRECISION": "fp16"}, "'fp16' is on"),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "'zero_optimization.offload_param' is on"),
    ],
)
def test_accelerate_launch_hands_over_its_options(monkeypatch, options, found):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in options.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with launched() as (asked,):
        (config,) = parse_settings([asked]).values()
    json.dumps(config)
    if isinstance(found, dict):
        assert translated(config, num_processes=1) == found
    else:
        with pytest.raises(UserError, match=found):
            translated(config)


def test_the_users_config_and_another_of_the_launcher_are_refused(monkeypatch, tmp_path):
    write_json(tmp_path / "mine.json", {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"})
    raw = {"tasks": ["emoji_en"], "methods": ["finetune"], "train": {"deepspeed": str(tmp_path / "mine.json")}}
    write_text(tmp_path / "recipe.yaml", yaml.safe_dump(raw))
    for stage in (2, 3):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        with launched() as (asked,):
            changes = [f"train.{asked}"]
        if stage == 3:  # what both say is no contradiction
            assert read_recipe(tmp_path / "recipe.yaml", changes=changes).train.shard
        else:
            with pytest.raises(UserError, match=r"mine\.json in the training settings, accelerate launch --use_deepspeed by the launcher"):
                read_recipe(tmp_path / "recipe.yaml", changes=changes)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"shard": True}),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"shard": True, "activation_checkpointing": True},
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16. no and bf16 are accepted"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "came with --fsdp_offload_params"),
    ],
)
def test_what_accelerate_launch_sets_without_deepspeed_is_said_or_refused(monkeypatch, caplog, options, found):
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, str):
        with pytest.raises(UserError, match=found), launched():
            pass
        return
    with launched() as asked:
        assert parse_settings(asked) == found
    assert [", ".join(asked) in record.getMessage() for record in caplog.records] == [True] * bool(found)


def test_accelerators_with_an_engine_or_a_scale_of_their_own_are_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = object()  # fp16 needs a GPU
    with pytest.raises(UserError, match="set to fp16, which scales losses"):
        make_accelerator(accelerator, trackers=(), folder=None)
    accelerator.scaler = None
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    try:
        with pytest.raises(UserError, match="keeps gradients and optimizer to itself"):
            make_accelerator(accelerator, trackers=(), folder=None)
    finally:
        accelerator.state.distributed_type = DistributedType.NO
