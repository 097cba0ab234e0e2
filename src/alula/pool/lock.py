"""One process at a time changes a pool. The lock belongs to the operating system and goes with its process, however that ends."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from alula.errors import UserError
from alula.files import told_of, write_text
from alula.pool.manifest import check_links

LOCK, HOLDER = ".lock", ".holder"


@contextlib.contextmanager
def locked(folder: Path | str, *, doing: str) -> Iterator[None]:
    """Holds the pool's lock inside the block; the same thread may nest. A folder that held nothing before and after is removed.

    Args:
        doing: what others are told, such as ``learning 'invoices'``.

    Raises:
        UserError: somebody else holds it (with who and since when), the folder cannot be written, or a link in it leads elsewhere.
    """
    home = Path(folder).resolve()
    check_links(home)
    lock, holder = FileLock(home / LOCK, is_singleton=True, timeout=0), home / HOLDER
    with told_of(home / LOCK):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"The pool {folder} is being changed by {_who(holder)}. One process at a time may do that: wait for it, then run "
                "the same command again. If that process dies, its lock goes with it."
            ) from None
    is_outermost = lock.lock_counter == 1
    try:
        if is_outermost:
            with contextlib.suppress(UserError):  # a courtesy: on a full disk others are told less
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, {doing} since {since}")
        yield
    finally:
        if is_outermost:
            holder.unlink(missing_ok=True)
            if [path.name for path in home.iterdir()] == [LOCK]:  # nothing came of it
                (home / LOCK).unlink()
                home.rmdir()
        lock.release()


def _who(holder: Path) -> str:
    try:
        return "".join(sign for sign in holder.read_text(encoding="utf-8")[:300] if sign.isprintable())
    except (OSError, UnicodeDecodeError):
        return "another process"
