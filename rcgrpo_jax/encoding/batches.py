"""Batches of encoded examples: what a training step reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from rcgrpo_jax.encoding.cache import EXAMPLE, EncodedSource
from rcgrpo_jax.encoding.order import BatchOrder
from rcgrpo_jax.encoding.prefetch import Prefetch
from rcgrpo_jax.parallel import distributed


class EditBatch(NamedTuple):
    """What a training step reads: one row a prompt, on the host."""

    encoded: dict[str, np.ndarray]  # what the family's `encode` gave, [P, ...] by name
    pixels: UInt8[np.ndarray, "P H W 3"]  # source, resized
    mask: Float[np.ndarray, "P H W"]  # edit region, resized
    instructions: tuple[str, ...]
    targets: UInt8[np.ndarray, "P H W 3"] | None = None  # reference edits, where every example has one
    captions: tuple[str, ...] | None = None  # of the edited pictures, where the entries hold them


def make_batch(rows: Sequence[Mapping[str, Any]]) -> EditBatch:
    """A batch of entries of the cache, as `EncodedSource` gives them."""

    def stack(name: str) -> np.ndarray:
        return np.stack([row[name] for row in rows])

    encoded = {name: stack(name) for name in rows[0].keys() - EXAMPLE}
    targets = stack("target") if all("target" in row for row in rows) else None
    instructions = tuple(row["instruction"] for row in rows)
    captions = tuple(row["caption"] for row in rows) if all("caption" in row for row in rows) else None
    return EditBatch(encoded, stack("pixels"), stack("mask"), instructions, targets, captions)


class Batches:
    """Batches of P prompts as a function of the step alone, so that a resumed run needs no iterator state.

    All pictures of a batch have one size: `BatchOrder` says which bucket a step takes, and how its examples follow.
    Each process gets its own rows of the P: which examples a step sees does not depend on how many processes there are.
    The batch of the next step is read in a thread while the device works on this one.

    Args:
        source: Encoded examples.
        prompts: P.
        seed: Of the order, which is drawn anew each epoch.
        buckets: The examples of each bucket, by index; all are in one by default.
    """

    def __init__(self, source: EncodedSource, prompts: int, seed: int, buckets: Sequence[Sequence[int]] = ()):
        import grain

        self.source, self._prompts = source, prompts
        buckets = buckets or [range(len(source))]
        self._indices = [grain.MapDataset.source(indices).seed(seed).shuffle().repeat() for indices in buckets]
        self._order = BatchOrder([len(indices) for indices in buckets], prompts, seed)
        self._prefetch = Prefetch(self._read)

    def __getitem__(self, step: int) -> EditBatch:
        """The batch of a step.

        Raises:
            UserError: If an entry of the cache cannot be read.
        """
        return self._prefetch[step]

    def _read(self, step: int) -> EditBatch:
        bucket, batch = self._order[step]
        own, indices = distributed.local_row_range(self._prompts), self._indices[bucket]
        return make_batch([self.source[int(indices[batch * self._prompts + i])] for i in own])
