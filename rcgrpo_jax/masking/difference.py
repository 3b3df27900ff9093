"""Masks from pairs of pictures: where the target is visibly another colour than the source."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.masking.method import HALF, Method, Scores
from rcgrpo_jax.rewards.colour import lab_from_srgb

SMOOTH, LEAST_SMOOTH = 1 / 256, 1.5  # shorter sides, pixels: standard deviation of the filter that takes out file noise
NOTICED = 8.0  # CIELAB units that a difference has at least where an edit is
SEED = 2.5  # times the threshold: what a region reaches somewhere
LEAST = 1 / 2000  # of the picture: smaller regions are specks


def difference_method() -> Method:
    """The method `difference`; its examples need targets."""
    return Method(_scores, {"smooth": [SMOOTH, LEAST_SMOOTH], "noticed": NOTICED, "seed": SEED, "least": LEAST})


def _scores(example: EditExample) -> Scores:
    if example.target is None:
        raise UserError(
            f"{example.name}: no target image; masks from differences need one.",
            "Add targets, or find the masks by --method editor or segment.",
        )
    return difference_scores(example.image, example.target)


def difference_scores(source: UInt8[np.ndarray, "H W 3"], target: UInt8[np.ndarray, "H W 3"]) -> Scores:
    """How surely a pixel was edited, by its difference `d` in CIELAB after a Gaussian filter of both pictures.

    The border is where `d` passes `t = max(NOTICED, o / 2)`, `o` the threshold of Otsu (1979). Half of it, since the
    weaker parts of an edit lie below `o`, and the noise of JPEG files far below. A region must reach `SEED t` somewhere
    and be no speck; its holes are filled. The score is a ramp across the border, `(d - t / 2) / t` in [0, 1], and 0
    away from all regions.

    Args:
        source: The picture before.
        target: The picture after, of the same size.
    """
    smooth = max(SMOOTH * min(source.shape[:2]), LEAST_SMOOTH)
    before, after = (np.asarray(lab_from_srgb(np.float32(picture) / 255)) for picture in (source, target))
    filtered = ndimage.gaussian_filter(after - before, (smooth, smooth, 0))
    d = np.linalg.norm(filtered, axis=-1)
    t = max(NOTICED, otsu_threshold(d) / 2)
    region = ndimage.binary_fill_holes(_regions(d, t))
    near = ndimage.binary_dilation(region, iterations=int(np.ceil(3 * smooth)))
    ramp = ((d - t / 2) / t).clip(0, 1)
    scores = np.where(region, np.maximum(ramp, HALF), np.minimum(ramp, np.nextafter(np.float32(HALF), 0)))
    return (scores * near).astype(np.float32)


def otsu_threshold(values: Float[np.ndarray, "..."], bins: int = 256) -> float:
    """The threshold that parts values into two classes with the largest variance between them (Otsu 1979).

    Args:
        values: Finite.
        bins: Of the histogram whose middles are tried.
    """
    counts, edges = np.histogram(values, bins)
    middles = (edges[:-1] + edges[1:]) / 2
    below, weighted = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = weighted / below - (weighted[-1] - weighted) / above
        between = below * above * apart**2
    return float(middles[np.argmax(np.nan_to_num(between, nan=-1.0))])  # NaN where a class is empty


def _regions(d: Float[np.ndarray, "H W"], t: float) -> Bool[np.ndarray, "H W"]:
    """Connected parts from `t` on that reach `SEED t` and are no specks."""
    labels, count = ndimage.label(d >= t)
    if not count:
        return labels > 0
    parts = np.arange(1, count + 1)
    sizes, peaks = ndimage.sum_labels(labels > 0, labels, parts), ndimage.maximum(d, labels, parts)
    return np.concatenate([[False], (sizes >= LEAST * d.size) & (peaks >= SEED * t)])[labels]
