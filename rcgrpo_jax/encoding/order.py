"""Which bucket each step takes its prompts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


class BatchOrder:
    """The order of the batches of several buckets: a function of the step, the seed and the buckets' sizes alone.

    A step takes all its P prompts from one bucket. Time is counted in epochs: in one of them every example is due once,
    so that a bucket of n examples gives n / P batches, a fraction where it is a small one. Its k-th batch is due at

        due_k = (k + u_k) P / n,   u_k uniform in [0, 1), k = 0, 1, ...

    and the batches of all buckets follow each other by the times at which they are due. So after e epochs a bucket has
    given e n / P batches, up to one, and each step is of a bucket with a probability proportional to its examples.

    The k-th batch of a bucket holds the examples k P to (k + 1) P - 1 of an endless sequence, in which the bucket's
    examples come in an order that is drawn anew each time all of them have come. A bucket with fewer than P examples
    has some of them several times in a batch, and gives a batch that much more seldom.

    Args:
        counts: Examples of each bucket, none of them 0.
        prompts: P.
        seed: Of the u_k.
    """

    def __init__(self, counts: Sequence[int], prompts: int, seed: int):
        self._counts, self._prompts, self._seed = counts, prompts, seed
        self._order = self._first(256)

    def __getitem__(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of its batches it is."""
        if step >= len(self._order):
            self._order = self._first(2 * step)
        bucket, batch = self._order[step]
        return int(bucket), int(batch)

    def _first(self, steps: int) -> Int[np.ndarray, "steps 2"]:
        """Bucket and number of the first batches.

        Up to the time `until` all buckets together have given at least `steps` batches, and all of them are among those
        that are put in order here. What lies before it does not depend on it.
        """
        until = (steps + len(self._counts) + 1) * self._prompts / sum(self._counts)
        rows, due = [], []
        for bucket, count in enumerate(self._counts):
            numbers = np.arange(int(until * count / self._prompts) + 1)
            due.append((numbers + self._uniform(bucket, len(numbers))) * self._prompts / count)
            rows.append(np.stack([np.full_like(numbers, bucket), numbers], axis=1))
        by_time = np.argsort(np.concatenate(due), kind="stable")
        return np.concatenate(rows)[by_time[:steps]]

    def _uniform(self, bucket: int, count: int) -> Float[np.ndarray, " count"]:
        """The first numbers of a bucket; from raw bits, which stay the same in all versions of NumPy."""
        return (np.random.Philox([self._seed, bucket]).random_raw(count) >> np.uint64(11)) * 2.0**-53
