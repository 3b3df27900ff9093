"""What buckets do to the pictures of a data set: a table, and a sheet with the crops drawn."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rcgrpo_jax.data.buckets import Buckets, Fitted, Size
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import for_display, outline
from rcgrpo_jax.runs.grid import PictureRow, draw_rows

_BLUE, _FADED = (20, 90, 220), 0.35  # colour of a crop, contrast outside of it


class BucketCuts(NamedTuple):
    """What the pictures of one bucket lose."""

    size: Size  # (height, width)
    cuts: list[float]  # share of each picture that is cut

    def __str__(self) -> str:
        height, width = self.size
        mean, most = 100 * np.mean(self.cuts), 100 * max(self.cuts)
        return f"{width:5} x {height:<5} {len(self.cuts):8}  {mean:10.1f} %  {most:10.1f} %"


class Preview(NamedTuple):
    """What buckets do to a data set."""

    buckets: list[BucketCuts]  # of those that have pictures
    lost: dict[str, float]  # example -> share of its region that is cut, where some is; the most first
    sheet: UInt8[np.ndarray, "_ _ 3"]

    def __str__(self) -> str:
        lines = [f"{'width x height':<13} {'pictures':>8}  {'cut, mean':>12}  {'cut, most':>12}"]
        lines += map(str, self.buckets)
        if self.lost:
            lines.append(f"\nregions wider than what their bucket keeps: {len(self.lost)}")
            lines += (f"  {name}: {100 * share:.1f} % of the region is cut" for name, share in self.lost.items())
        return "\n".join(lines)


def preview(source: Source, buckets: Buckets, shown: int, progress: Callable[[], None] = lambda: None) -> Preview:
    """Fits every example of a source into its bucket.

    Args:
        source: The examples.
        buckets: Where they go.
        shown: Pictures of each bucket on the sheet: those that lose most of their region, and then of themselves.
        progress: Called after each example.

    Raises:
        UserError: An example cannot be read.
    """
    cuts, lost = {size: BucketCuts(size, []) for size in buckets.sizes}, {}
    worst: dict[Size, list[tuple]] = {size: [] for size in buckets.sizes}
    for index in range(len(source)):
        example = source[index]
        fitted = buckets.fit(example)
        cuts[fitted.size].cuts.append(fitted.cut)
        if fitted.lost:
            lost[example.name] = fitted.lost
        heap, rank = worst[fitted.size], (fitted.lost, fitted.cut, -index)  # no two are equal
        if len(heap) < shown or rank > heap[0][0]:
            kept = rank, f"{example.name}  {100 * fitted.cut:.1f} % cut", draw_crop(example, fitted)
            (heapq.heappush if len(heap) < shown else heapq.heapreplace)(heap, kept)
        progress()
    found = [x for x in cuts.values() if x.cuts]
    rows = [
        PictureRow(
            f"{size[1]} x {size[0]}: {len(x)} picture{'s' * (len(x) > 1)}, {100 * np.mean(x):.1f} % cut on average",
            [picture for _, *picture in sorted(worst[size], reverse=True)],
        )
        for size, x in found
    ]
    ordered = dict(sorted(lost.items(), key=lambda item: -item[1]))
    return Preview(found, ordered, draw_rows(rows, "What is cut is pale; the crop is blue, the region red."))


def draw_crop(example: EditExample, fitted: Fitted) -> UInt8[np.ndarray, "_ _ 3"]:
    """A source with its region outlined and what its bucket keeps of it; the rest is pale."""
    kept = np.zeros(example.mask.shape, bool)
    kept[fitted.window] = True
    picture = for_display(example.image)
    inside = np.asarray(Image.fromarray(kept).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
    pale = np.rint(255 - _FADED * (255.0 - picture)).astype(np.uint8)
    return outline(outline(np.where(inside[..., None], picture, pale), kept, _BLUE), example.mask)
