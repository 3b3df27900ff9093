"""The examples that are edited and measured: brought to one size, in batches of one shape, under one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.data.buckets import Buckets, Size
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.errors import UsageError, UserError


class ExampleBatch(NamedTuple):
    """Examples in one size. Rows from `count` on repeat the last: all batches have one shape, and one compilation."""

    examples: tuple[EditExample, ...]  # P of them
    indices: Int[np.ndarray, " P"]  # in the source
    count: int

    @property
    def pixels(self) -> UInt8[np.ndarray, "P H W 3"]:
        return np.stack([example.image for example in self.examples])

    @property
    def masks(self) -> Float[np.ndarray, "P H W"]:
        return np.stack([example.mask for example in self.examples])

    @property
    def targets(self) -> UInt8[np.ndarray, "P H W 3"] | None:
        """The right results; None where an example has none."""
        targets = [example.target for example in self.examples]
        return None if any(target is None for target in targets) else np.stack(targets)

    @property
    def instructions(self) -> list[str]:
        return [example.instruction for example in self.examples]

    @property
    def own(self) -> tuple[EditExample, ...]:
        """The examples without the rows that repeat."""
        return self.examples[: self.count]


class EditedBatch(NamedTuple):
    """A batch of examples with one edit of each."""

    batch: ExampleBatch
    pictures: UInt8[np.ndarray, "P H W 3"]
    acd: Float[np.ndarray, "P ..."] | None  # R_acd, or what `edit_batches` keeps; None if pictures alone are known


def read_example(source: Source, index: int, size: Size | Buckets) -> EditExample:
    """An example with its pictures and its mask in `size = (height, width)`, or in the bucket of the nearest shape.

    It is squeezed into either, and nothing is cropped: an edit is judged beside the whole of its source.
    """
    example = source[index]
    size = size.nearest(*example.image.shape[:2]) if isinstance(size, Buckets) else size
    target = None if example.target is None else resize_image(example.target, size)
    image, mask = resize_image(example.image, size), resize_mask(example.mask, size)
    return replace(example, image=image, mask=mask, target=target)


def read_batches(source: Source, indices: Sequence[int], batch: int, size: tuple[int, int]) -> Iterator[ExampleBatch]:
    """Reads examples batch by batch.

    Args:
        source: The examples.
        indices: Which of them, in this order.
        batch: P.
        size: (height, width) that they are brought to.

    Yields:
        Batches of P rows each.

    Raises:
        UserError: An example cannot be read, or memory cannot hold a batch.
    """
    check_room(batch, size)
    for start in range(0, len(indices), batch):
        chosen = list(indices[start : start + batch])
        examples = [read_example(source, index, size) for index in chosen]
        missing = batch - len(chosen)
        yield ExampleBatch((*examples, *examples[-1:] * missing), np.array(chosen + chosen[-1:] * missing), len(chosen))


def check_room(batch: int, size: tuple[int, int]) -> None:
    """Refuses pictures that no memory holds.

    Raises:
        UserError: They are such.
    """
    height, width = size
    needed = batch * height * width * (2 * 3 + 4)  # source and edit in 8 bits, and the mask
    what = f"size: {width} x {height} pixels, {batch} pictures at a time,"
    check_memory(what, needed, "Choose a smaller size, or fewer at a time.")


def right_batches(batches: Iterable[ExampleBatch], need_targets: bool = False) -> Iterator[ExampleBatch]:
    """The batches as they come.

    Raises:
        UserError: A target is flawed on purpose, or missing where one is needed.
    """
    for batch in batches:
        for example in batch.own:
            if need_targets and example.target is None:
                raise UserError(
                    f"{example.name}: no target image; the success of an edit is measured against one.",
                    "Add targets, or evaluate on scenes:heldout:500.",
                )
            check_right(example)
        yield batch


def check_right(example: EditExample) -> None:
    """Refuses an example that nothing can be measured against.

    Raises:
        UserError: Its target is flawed on purpose.
    """
    if example.flawed:
        raise UserError(
            f"{example.name}: its target is flawed on purpose; a right one was wanted.", "Leave such examples out."
        )


def check_targets(source: Source) -> None:
    """Refuses scenes of which a share of the targets is flawed on purpose, before any of them is read.

    Raises:
        UsageError: They are such.
    """
    if isinstance(source, Scenes) and source.flaws:
        raise UsageError(
            f"evaluate: scenes with {source.flaws:.0%} flawed targets found; right targets were wanted.",
            "Leave the share of flaws out.",
        )


class Digest:
    """A hash of the pictures, masks, targets and instructions of examples in their order."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, example: EditExample) -> None:
        for array in (example.image, example.target, example.mask):
            if array is not None:
                self._hash.update(array.tobytes())
        self._hash.update(example.instruction.encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()
