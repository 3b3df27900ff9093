"""How data sets store their masks: as pictures in black and white, or within a copy of the source."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.data.images import to_8_bits
from rcgrpo_jax.data.masks import edit_region
from rcgrpo_jax.errors import UserError

_DARK = 16  # of 255: the source is as good as black
_SAME_SHAPE = 0.02  # by which width / height of a mask and of its picture may differ: rounding of their sides

MaskForm = Callable[[Image.Image, UInt8[np.ndarray, "H W 3"], str], Float[np.ndarray, "H W"]]


def _white(mask: Image.Image, source: UInt8[np.ndarray, "H W 3"], where: str) -> Float[np.ndarray, "H W"]:
    """White is the edit region; greys make a soft mask (`masks.read_mask`)."""
    return edit_region(mask, where, "white", "")


def _black(mask: Image.Image, source: UInt8[np.ndarray, "H W 3"], where: str) -> Float[np.ndarray, "H W"]:
    """Black is the edit region, and white the background."""
    return edit_region(mask, where, "black", "")


def _transparent(mask: Image.Image, source: UInt8[np.ndarray, "H W 3"], where: str) -> Float[np.ndarray, "H W"]:
    """What is not opaque is the edit region: the file is the source with the region erased."""
    if not mask.has_transparency_data:
        raise UserError(
            f"{where}: a picture of mode {mask.mode} without transparency; one with a transparent region was wanted.",
            "Choose another mask form.",
        )
    picture = to_8_bits(mask, where) if mask.mode.startswith("I") else mask
    return (np.asarray(picture.convert("RGBA").getchannel("A")) < 255).astype(np.float32)


def _pure_black(mask: Image.Image, source: UInt8[np.ndarray, "H W 3"], where: str) -> Float[np.ndarray, "H W"]:
    """What is wholly black is the edit region: the file is the source with the region painted over.

    Black things of the source are black in it too. A connected area of black is therefore left out where the source is
    dark throughout (no grey above `_DARK`): nothing shows that it was painted.
    """
    from scipy import ndimage

    picture = to_8_bits(mask, where) if mask.mode.startswith("I") else mask
    black: Bool[np.ndarray, "H W"] = np.asarray(picture.convert("RGB").convert("L")) == 0
    areas, count = ndimage.label(black, structure=np.ones((3, 3)))
    brightest = ndimage.maximum(np.asarray(Image.fromarray(source).convert("L")), areas, np.arange(count + 1))
    painted = np.asarray(brightest) > _DARK
    painted[0] = False  # the area 0 is what is not black
    return painted[areas].astype(np.float32)


MASK_FORMS: dict[str, MaskForm] = {
    "white": _white,
    "black": _black,
    "transparent": _transparent,
    "pure-black": _pure_black,
}


RUNS = "runs"  # the form of masks that are no pictures


def decode_runs(cell: Any, size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """The edit region from run lengths: pairs of the start and the length of each run, row by row, from 0.

    PIE-Bench stores its masks so. A run past the last pixel ends there, as its authors have it.

    Args:
        cell: Whole numbers, as a list or as a text with blanks or commas between them.
        size: (width, height) of the picture.

    Raises:
        UserError: They are no such pairs, or a run begins outside the picture.
    """
    parts = re.split(r"[\s,]+", cell.strip(" []\n")) if isinstance(cell, str) else cell
    count = size[0] * size[1]
    try:
        numbers = [int(part) for part in parts]
        if any(isinstance(part, float) and not part.is_integer() for part in parts):
            numbers = []  # half a pixel
    except (TypeError, ValueError, OverflowError):  # the last of infinity
        numbers = []
    if not numbers or len(numbers) % 2 or min(numbers) < 0 or max(numbers[::2]) >= count:
        raise UserError(
            f"mask: {shorten(cell)} found; pairs of start and length, starts below {count:,}, were wanted.",
            "Choose another mask form.",
        )
    mask = np.zeros(count, np.float32)
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        mask[start : start + length] = 1
    return mask.reshape(size[::-1])


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask at another size of the same shape, by its nearest pixels; as it is where the shapes differ.

    Args:
        mask: Of any mode.
        size: (width, height), pixels.
    """
    shapes = mask.width / mask.height, size[0] / size[1]
    if mask.size == size or abs(shapes[0] / shapes[1] - 1) > _SAME_SHAPE:
        return mask
    resized = mask.resize(size, Image.Resampling.NEAREST)
    resized.format = mask.format
    return resized
