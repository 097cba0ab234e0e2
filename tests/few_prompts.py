"""Fewer requests that stand for "none of the tasks": a pool's first task goes through all of them, which takes a second each time."""

import contextlib
from collections.abc import Iterator

import pytest

from alula.data.tasks import general_prompts


@contextlib.contextmanager
def few_general_prompts() -> Iterator[None]:
    """Inside the block every twelfth of the 300, so of each kind some."""
    few = general_prompts()[::12]
    with pytest.MonkeyPatch.context() as patch:
        for user in ("alula.methods.routed", "alula.running.adopting"):
            patch.setattr(f"{user}.general_prompts", lambda: few)
        yield
