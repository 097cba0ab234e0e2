"""The experts and routers learnt for one base model, in one folder.

`Pool` is imported when it is asked for, so that reports can read manifests without torch.
"""

from typing import TYPE_CHECKING

from alula.pool.manifest import MANIFEST

if TYPE_CHECKING:
    from alula.pool.pool import Pool

__all__ = ["MANIFEST", "Pool"]


def __getattr__(name: str) -> object:
    """`Pool`, imported now."""
    if name != "Pool":
        raise AttributeError(f"module 'alula.pool' has no attribute '{name}'")
    from alula.pool.pool import Pool

    return Pool
