"""Batches made before they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


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
