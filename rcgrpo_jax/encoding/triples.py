"""Supervised batches: source, instruction and target, drawn and tokenized ahead in a thread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from rcgrpo_jax.data.example import Needs, Source, check_needs
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.encoding.prefetch import Prefetch
from rcgrpo_jax.parallel.distributed import local_row_range
from rcgrpo_jax.weights.tokenizers import Tokenizers, tokenize

SUPERVISED = Needs(target="supervised training")


class Triples(NamedTuple):
    """A batch of S examples on the host."""

    source: UInt8[np.ndarray, "S H W 3"]
    target: UInt8[np.ndarray, "S H W 3"]
    mask: Float[np.ndarray, "S H W"]
    clip: Int[np.ndarray, "S 77"]
    t5: Int[np.ndarray, "S N_txt"]
    instructions: tuple[str, ...]


class TripleBatches:
    """Batches as a function of the step alone, so that a resumed run needs no iterator state.

    The batch of the next step is made in a thread while the device works on this one.

    Args:
        source: Examples with targets.
        size: (height, width) that images and masks are resized to.
        count: S over all processes; each gets its own rows.
        seed: Of the order, which is drawn anew each epoch.
        tokenizers: Of the model folder.
        max_text_tokens: N_txt.
    """

    def __init__(
        self, source: Source, size: tuple[int, int], count: int, seed: int, tokenizers: Tokenizers, max_text_tokens: int
    ):
        import grain

        self._size, self._count, self._tokenizers, self._length = size, count, tokenizers, max_text_tokens
        self._dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        self._prefetch = Prefetch(self._make)

    def __getitem__(self, step: int) -> Triples:
        """The batch of a step.

        Raises:
            UserError: If an example cannot be read or has no target.
        """
        return self._prefetch[step]

    def _make(self, step: int) -> Triples:
        examples = [self._dataset[step * self._count + i] for i in local_row_range(self._count)]
        for example in examples:
            check_needs(example, SUPERVISED)
        instructions = tuple(example.instruction for example in examples)
        tokens = tokenize(self._tokenizers, instructions, self._length)
        return Triples(
            np.stack([resize_image(example.image, self._size) for example in examples]),
            np.stack([resize_image(example.target, self._size) for example in examples]),
            np.stack([resize_mask(example.mask, self._size) for example in examples]),
            tokens.clip,
            tokens.t5,
            instructions,
        )
