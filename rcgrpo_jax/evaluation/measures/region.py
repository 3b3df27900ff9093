"""CompBench's five measures with their flaws corrected, and how much an edit changed its region.

The background is what is really outside: the mask is made black and white and widened by a few pixels, and what is
within counts for nothing. docs/compbench.md has every difference from `official`.
"""

from __future__ import annotations

from functools import partial

import dm_pix
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs
from rcgrpo_jax.evaluation.measures.clip import REMEDY, lc_i, lc_t, load_model, region_vectors
from rcgrpo_jax.evaluation.measures.official import SQUEEZE, load_squeeze_weights
from rcgrpo_jax.evaluation.measures.psnr import CAP
from rcgrpo_jax.evaluation.measures.success import TARGETS
from rcgrpo_jax.models.lpips import Layer, lpips
from rcgrpo_jax.rewards.change import change_score

WIDENED = 4  # pixels on every side, for what an editor blends at the border of a region
_WINDOW = 11  # pixels a side of SSIM's windows
CHANGE_SCALE = 12.0  # CIELAB units, as the reward `change` has it
NO_BACKGROUND = "the mask leaves no background, or no region in the size that is measured"


def binarise(mask: Float[Array, "P H W"]) -> Float[Array, "P H W"]:
    """The region of a soft mask: 1 where it has half of its largest value or more, else 0; NaN where it is empty."""
    largest = jnp.max(mask, axis=(1, 2), keepdims=True)
    return jnp.where(largest > 0, jnp.asarray(mask >= largest / 2, jnp.float32), jnp.nan)


def outside(mask: Float[Array, "P H W"]) -> Float[Array, "P H W"]:
    """1 on the background, which begins `WIDENED` pixels beyond the region (in either direction), else 0."""
    side = 2 * WIDENED + 1
    return 1 - nn.max_pool(binarise(mask)[..., None], (side, side), padding="SAME")[..., 0]


def region_psnr(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes `min(60, 10 log10(1 / MSE))` over the pixels of the background alone, in decibels."""
    error = jnp.mean((inputs.edited - inputs.source) ** 2, axis=-1)
    return jnp.minimum(-10 * jnp.log10(_mean(error, outside(inputs.mask))), CAP)


def region_ssim(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes the mean structural similarity of the windows that lie in the background wholly, in [-1, 1]."""
    similarity = dm_pix.ssim(inputs.source, inputs.edited, return_map=True)
    touched = nn.max_pool(1 - outside(inputs.mask)[..., None], (_WINDOW, _WINDOW))[..., 0]
    return _mean(jnp.mean(similarity, axis=-1), 1 - touched)


def region_lpips(inputs: MeasureInputs, weights: tuple[Layer, ...]) -> Float[Array, " P"]:
    """Computes LPIPS of the source and the edit with the source's own region, by the share of the background.

    Both have the same region, so that no feature sees the edit, however far it looks; a zeroed region would have an
    edge that no picture has. What the region adds to the mean over the frame is next to nothing, and the division
    makes it one over the background.
    """
    shown = outside(inputs.mask)
    edited = jnp.where(shown[..., None] > 0, inputs.edited, inputs.source)
    share = jnp.mean(shown, axis=(1, 2))
    return jnp.where(share > 0, lpips(weights, inputs.source, edited, net="squeeze") / share, jnp.nan)


def region_change(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes how much of the region plainly changed (`rewards.change.change_score`), in [0, 1]."""
    return change_score(inputs.source, inputs.edited[:, None], binarise(inputs.mask), CHANGE_SCALE)[:, 0]


def _mean(values: Float[Array, "P h w"], weights: Float[Array, "P h w"]) -> Float[Array, " P"]:
    """The weighted mean; NaN without weight."""
    # A value without weight may be NaN; 0 times NaN would be NaN.
    total = jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=(1, 2))
    return total / jnp.sum(weights, axis=(1, 2))


_vectors = partial(region_vectors, binarise)
REGION = (
    Measure(
        "region_lc_i", "LC-I", 3, "↑", lc_i, load=load_model, prepare=_vectors, wanted=TARGETS, remedy=REMEDY,
        group="region",
    ),
    Measure(
        "region_lc_t", "LC-T", 3, "↑", lc_t, load=load_model, prepare=_vectors, remedy=REMEDY, group="region",
        wanted="it compares with the caption, and an example has none",
    ),
    Measure("region_psnr", "PSNR", 3, "↑", region_psnr, wanted=NO_BACKGROUND, group="region"),
    Measure("region_ssim", "SSIM", 3, "↑", region_ssim, wanted=NO_BACKGROUND, group="region"),
    Measure(
        "region_lpips", "LPIPS", 3, "↓", region_lpips, load=load_squeeze_weights, wanted=NO_BACKGROUND,
        remedy=SQUEEZE, group="region",
    ),
    Measure("region_change", "change", 3, "↑", region_change, group="region"),
)  # fmt: skip
