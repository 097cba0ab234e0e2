"""Verbs in several processes: torchrun and accelerate launch say in the environment who is who and what is wanted."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from alula.errors import UserError

logger = logging.getLogger(__name__)

VERBS = ("learn", "pretrain", "run")
"""What several processes can do together; the other verbs would do it several times."""


def num_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def check_verb(arguments: Sequence[str]) -> None:
    """Ends this process if it is one of several and its verb is for one alone."""
    if num_processes() > 1 and arguments[:1] not in [[verb] for verb in VERBS]:
        sys.exit(
            f"alula was started in several processes, which can {', '.join(VERBS)} together; another verb would write the same "
            "files several times. Start one process."
        )


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """A block in which the processes of this launch can speak to each other; gives the training settings it asks for.

    Raises:
        UserError: `accelerate launch` asks for what the training loop does not do.
    """
    asked = _asked()
    if num_processes() == 1:
        yield asked
        return
    from torch.distributed import destroy_process_group

    from alula.training.processes import join_launch

    join_launch()
    yield asked
    destroy_process_group()


def _asked() -> list[str]:
    """What `accelerate launch` asks for, in the form that ``--set`` takes.

    DeepSpeed becomes a setting (`alula.training.deepspeed_settings`) and is taken out of the environment: Accelerate would start its
    engine.
    """
    from alula.training.deepspeed_settings import LAUNCHED

    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        config = json.dumps(_deepspeed_config())
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        return [f"{LAUNCHED}={config}"]
    asked = []
    if _is_on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate launch came with FSDP's first version. Version 2 is accepted: add --fsdp_version 2.")
        if _is_on("FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "accelerate launch came with --fsdp_offload_params, but weights stay on their devices here. Take it out; more processes, "
                "a lower micro_batch_size or activation_checkpointing save memory."
            )
        asked += ["shard=true", *(["activation_checkpointing=true"] if _is_on("FSDP_ACTIVATION_CHECKPOINTING") else [])]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"accelerate launch came with --mixed_precision {precision}. no and bf16 are accepted: choose one of them.")
    asked += [f"mixed_precision={precision}"] if precision != "no" else []
    if asked and is_main():
        logger.warning("accelerate launch sets %s, over the other training settings.", ", ".join(asked))
    return asked


def _deepspeed_config() -> str | dict[str, Any]:
    """The file that `accelerate launch` was given, or what its options would stand in one for, with its defaults."""
    variables = {name.removeprefix("ACCELERATE_"): value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    file = variables.get("DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return file
    precision = variables.get("MIXED_PRECISION", "no")
    devices = {f"offload_{part}": variables.get(f"DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none") for part in ("optimizer", "param")}
    zero: dict[str, Any] = {"stage": int(variables.get("DEEPSPEED_ZERO_STAGE", "2"))}
    zero |= {key: {"device": device} for key, device in devices.items() if device != "none"}
    forwards = variables.get("GRADIENT_ACCUMULATION_STEPS", "1")
    return {
        "zero_optimization": zero,
        # One is what Accelerate's questionnaire writes down for those who do not ask for any.
        "gradient_accumulation_steps": "auto" if forwards == "1" else forwards,
        "gradient_clipping": variables.get("GRADIENT_CLIPPING", "auto"),
        **({precision: {"enabled": True}} if precision in ("bf16", "fp16") else {}),
    }


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
