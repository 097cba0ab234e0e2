"""The next items are made in a thread while the present one is used: tokenisers and image decoders let others compute meanwhile."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Key], Made], keys: Iterable[Key], *, ahead: int = 2) -> Generator[Made, None, None]:
    """What `make` gives for each key, in order; an exception comes up where its item would have come.

    One thread calls `make`, one key after another, and ends with the iterator: close it if you leave before its end.

    Args:
        make: nothing else may call it meanwhile, and what it gives may depend on its key alone (not on a global generator).
        ahead: items (1 or more) that are made, or being made, beside the one in use.

    Example:
        >>> list(made_ahead("value {}".format, [1, 2, 3]))
        ['value 1', 'value 2', 'value 3']
    """
    todo = iter(keys)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
    try:
        coming = deque(thread.submit(make, key) for key in islice(todo, ahead))
        while coming:
            made = coming.popleft().result()
            coming.extend(thread.submit(make, key) for key in islice(todo, 1))
            yield made
    finally:
        thread.shutdown(cancel_futures=True)
