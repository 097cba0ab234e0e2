"""Learning changes a pool: one process, or one launch of several, at a time; afterwards its card says what it can do."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from alula.pool.lock import locked
from alula.report.card import write_card
from alula.training.processes import Team

Learn = TypeVar("Learn", bound=Callable[..., Any])


def alone(learn: Learn) -> Learn:
    """`learn`, a function of `pool_folder` and `task`, with the pool's lock held by the main process."""

    @functools.wraps(learn)
    def learn_alone(*args: Any, **options: Any) -> Any:
        if not Team().is_main:
            return learn(*args, **options)
        given = inspect.signature(learn).bind(*args, **options).arguments
        with locked(given["pool_folder"], doing=f"learning '{given['task'].name}'"):
            learnt = learn(*args, **options)
            write_card(given["pool_folder"])
        return learnt

    return cast(Learn, learn_alone)
