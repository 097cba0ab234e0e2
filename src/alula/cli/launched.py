"""Verbs in several processes: torchrun and accelerate launch say in the environment who is who and what is wanted."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from alula.errors import UserError

VERBS = ("learn", "run")
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
            f"alula was started in several processes, which can {' and '.join(VERBS)} together; another verb would write the same "
            "files several times. Start one process."
        )


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """A block in which the processes of this launch can speak to each other; gives the training settings it asks for.

    Raises:
        UserError: DeepSpeed, or FSDP's first version.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate launch came with DeepSpeed, whose engine keeps gradients and optimizer to itself. FSDP2 is accepted "
            "(--use_fsdp --fsdp_version 2, or torchrun and --set train.shard=true); docs/distributed.md says what else works."
        )
    is_sharded = _is_on("ACCELERATE_USE_FSDP")
    if is_sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate launch came with FSDP's first version. Version 2 is accepted: add --fsdp_version 2.")
    if num_processes() == 1:
        yield []
        return
    from torch.distributed import destroy_process_group

    from alula.training.processes import join_launch

    join_launch()
    yield ["shard=true"] if is_sharded else []
    destroy_process_group()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
