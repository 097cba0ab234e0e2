"""What a part would give, tried on torch's meta device, where tensors have a shape, but no values and no cost."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from alula.errors import UserError

T = TypeVar("T")
NO_VALUES = ("meta tensor", "Meta tensor", "meta device", "register_meta", "'Meta' backend")
"""In torch's errors where code reads values on that device."""


@torch.no_grad()
def tried(part: Callable[[Tensor], T], given: Tensor, *, name: str, wanted: str) -> T | None:
    """What `part` makes of `given`; None where it reads values on its way, so that only real weights can tell.

    Args:
        part: with its weights on the meta device.
        given: a tensor there.
        wanted: for the error: what is accepted, and what to do.

    Raises:
        UserError: the part cannot take such a tensor.
    """
    try:
        return part(given)
    except UserError:
        raise
    except Exception as error:  # whatever the code of a part, which may be of another library, raises
        if any(words in str(error) for words in NO_VALUES):
            return None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} cannot take a tensor of shape {tuple(given.shape)} ({reason}). {wanted}") from error
