"""Examples and batches made before they are asked for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

S, T = TypeVar("S"), TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)  # that read pictures; decoding and resizing leave Python's lock to the others


def read_ahead(read: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`map(read, items)`, in order, of which threads compute the next few while the last ones are used.

    Raises:
        Exception: What `read` raises, in its turn.
    """
    pool, pending = ThreadPoolExecutor(THREADS), deque[Future[T]]()
    try:
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > 2 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Prefetch(Generic[T]):
    """A function of the step, whose next value a thread computes while the present one is used.

    Args:
        make: Step -> value.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make, self._thread = make, ThreadPoolExecutor(1)
        self._step, self._future = -1, Future()  # what is under way

    def __getitem__(self, step: int) -> T:
        """The value of a step; raises what `make` raises for it."""
        future = self._future if self._step == step else self._thread.submit(self._make, step)
        value = future.result()
        self._step, self._future = step + 1, self._thread.submit(self._make, step + 1)
        return value
