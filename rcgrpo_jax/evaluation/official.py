"""Examples and edits as CompBench's script reads them: 512 x 512, its own resampling, masks as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.evaluation.examples import EditedBatch

SIDE = 512  # pixels of what is measured


def official_picture(picture: UInt8[np.ndarray, "H W 3"], side: int = SIDE) -> UInt8[np.ndarray, "side side 3"]:
    """A picture at `side x side` by Pillow's bicubic filter on 8 bits, whatever its shape."""
    return resized(picture, (side, side))


def resized(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture in `size = (height, width)` by Pillow's bicubic filter on 8 bits, as benchmarks' scripts resize."""
    return np.array(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


def official_mask(mask: Float[np.ndarray, "H W"], side: int = SIDE) -> Float[np.ndarray, "side side"]:
    """A mask at `side x side` by Pillow's nearest pixel, with the greys that it has."""
    return np.array(Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.NEAREST))


def official_example(example: EditExample, side: int = SIDE) -> EditExample:
    """An example in that form, from one as its source has it."""
    target = None if example.target is None else official_picture(example.target, side)
    return replace(
        example, image=official_picture(example.image, side), mask=official_mask(example.mask, side), target=target
    )


def official_batch(edited: EditedBatch, source: Source, side: int = SIDE) -> EditedBatch:
    """A batch in that form: examples anew from their source, edits from the size that they were made in.

    Args:
        edited: The batch, in any size.
        source: What its examples are of.
        side: Pixels.
    """
    own = [official_example(source[int(index)], side) for index in edited.batch.indices[: edited.batch.count]]
    repeated = len(edited.batch.examples) - len(own)
    pictures = np.stack([official_picture(picture, side) for picture in edited.pictures])
    return EditedBatch(edited.batch._replace(examples=(*own, *own[-1:] * repeated)), pictures, edited.acd)
