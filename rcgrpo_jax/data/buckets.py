"""Aspect-ratio buckets: sizes of about one area in several shapes, of which each picture takes the nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import KONTEXT_SIZES

Size = tuple[int, int]  # (height, width), pixels
NONE, KONTEXT = "none", "kontext"
KINDS = (NONE, KONTEXT)  # values of `data.buckets`
KONTEXT_SIDE = 1024  # of its square, whose area all its shapes have about
SIDE = 16  # sides are multiples of it, as those of `data.size`


class Fitted(NamedTuple):
    """An example in the shape of its bucket."""

    example: EditExample  # its image, mask and target are what is kept of them
    size: Size  # that they are resized to
    window: tuple[slice, slice]  # rows and columns of the picture that are kept
    cut: float  # share of the picture that is not, in [0, 1)
    lost: float  # share of the region that is not, in [0, 1); 0 where the region is the whole picture


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to.

    Attributes:
        sizes: Of the buckets.
        crops: Whether a picture is cropped to the shape of its bucket; else it is squeezed into it.
    """

    sizes: tuple[Size, ...]
    crops: bool

    @property
    def largest(self) -> Size:
        """The size with the most pixels, which needs the most memory."""
        return max(self.sizes, key=math.prod)

    def nearest(self, height: int, width: int) -> Size:
        """The size whose aspect ratio is nearest to a picture's, by the difference of their logarithms."""
        return min(self.sizes, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))

    def fit(self, example: EditExample) -> Fitted:
        """An example in its bucket; without `crops` nothing of it is cut.

        A region is never lost as a whole: `window` keeps the most of it that it can.
        """
        height, width = example.mask.shape
        size = self.nearest(height, width)
        if not self.crops:
            return Fitted(example, size, (slice(0, height), slice(0, width)), 0.0, 0.0)
        kept = window(example.mask, size)
        target = None if example.target is None else example.target[kept]
        cropped = replace(example, image=example.image[kept], mask=example.mask[kept], target=target)
        levels = _levels(example.mask)
        lost = 1 - levels[kept].sum() / levels.sum() if np.ptp(levels) else 0.0
        return Fitted(cropped, size, kept, 1 - cropped.mask.size / example.mask.size, float(lost))


def make_buckets(kind: str, size: Size) -> Buckets:
    """The buckets of a value of `data.buckets`.

    Args:
        kind: `none`: the given size alone. `kontext`: the 17 sizes that FLUX.1-Kontext was trained at, scaled to the
            area of the given size, each side rounded to a multiple of 16. Those that become equal are one bucket.
        size: `data.size`.
    """
    if kind == NONE:
        return Buckets((size,), crops=False)
    scale = math.sqrt(math.prod(size)) / KONTEXT_SIDE

    def scaled(side: int) -> int:
        return max(SIDE, math.floor(side * scale / SIDE + 0.5) * SIDE)

    return Buckets(tuple(dict.fromkeys((scaled(height), scaled(width)) for width, height in KONTEXT_SIZES)), crops=True)


def window(mask: Float[np.ndarray, "H W"], size: Size) -> tuple[slice, slice]:
    """The rows and columns that are kept of a picture that is cropped to the shape of `size`.

    It is the largest part of that shape, to a pixel. Of all such parts it holds the most of the region; of equal ones
    it is the nearest to the middle. So pictures are cropped to their middle, unless that would cut into the region.
    """
    height, width = mask.shape
    rows = max(1, min(height, round(width * size[0] / size[1])))
    columns = max(1, min(width, round(height * size[1] / size[0])))
    levels = _levels(mask)
    top, left = _start(levels.sum(axis=1), rows), _start(levels.sum(axis=0), columns)
    return slice(top, top + rows), slice(left, left + columns)


def _levels(mask: Float[np.ndarray, "H W"]) -> Integer[np.ndarray, "H W"]:
    """A mask in 255ths: whole numbers, whose sums are exact and can be equal."""
    return np.rint(255 * mask).astype(np.int64)


def _start(profile: Integer[np.ndarray, " n"], count: int) -> int:
    """Where those `count` places in a row begin that hold the most; of equal ones the nearest to the middle."""
    total = np.concatenate([[0], np.cumsum(profile)])
    held = total[count:] - total[:-count]
    best = np.flatnonzero(held == held.max())
    return int(best[np.argmin(np.abs(2 * best - (len(profile) - count)))])
