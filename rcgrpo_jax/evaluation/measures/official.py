"""CompBench's five measures as its script computes them, flaws included; `region` has them without.

The inputs are those of `evaluation.official`. The background is `image (1 - mask)` over the whole frame, so that the
region counts as equal. docs/compbench.md has every difference.
"""

from __future__ import annotations

import dm_pix
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, MeasureOptions, without_region
from rcgrpo_jax.evaluation.measures.clip import REMEDY, lc_i, lc_t, load_model, official_vectors
from rcgrpo_jax.evaluation.measures.success import TARGETS
from rcgrpo_jax.models.lpips import Layer, lpips
from rcgrpo_jax.weights.lpips import SQUEEZE_REMEDY, load_squeeze

CAP = 100.0  # dB, of equal backgrounds: the script has infinity, which no mean survives
_REFLECTED = 5  # pixels that torchmetrics reflects at every border, for windows of 11 x 11
SQUEEZE = f"Give --lpips_squeeze FILE. {SQUEEZE_REMEDY}"


def official_psnr(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes `min(100, 10 log10(1 / MSE))` of the whole frame without the region, in decibels."""
    return jnp.minimum(dm_pix.psnr(*without_region(inputs)), CAP)


def official_ssim(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes torchmetrics' structural similarity of the whole frame without the region, in [-1, 1].

    Windows are 11 x 11 and Gaussian (sigma 1.5), one around each pixel: the borders are reflected.
    """
    padding = ((0, 0), (_REFLECTED, _REFLECTED), (_REFLECTED, _REFLECTED), (0, 0))
    return dm_pix.ssim(*(jnp.pad(x, padding, mode="reflect") for x in without_region(inputs)))


def official_lpips(inputs: MeasureInputs, weights: tuple[Layer, ...]) -> Float[Array, " P"]:
    """Computes LPIPS with SqueezeNet of the whole frame without the region; >= 0."""
    return lpips(weights, *without_region(inputs), net="squeeze")


def load_squeeze_weights(options: MeasureOptions) -> tuple[Layer, ...] | None:
    """The weights of `load_squeeze`, or None where no file is named."""
    return load_squeeze(options.lpips_squeeze) if options.lpips_squeeze else None


OFFICIAL = (
    Measure(
        "official_lc_i", "LC-I", 3, "↑", lc_i, load=load_model, prepare=official_vectors, wanted=TARGETS,
        remedy=REMEDY, group="official",
    ),
    Measure(
        "official_lc_t", "LC-T", 3, "↑", lc_t, load=load_model, prepare=official_vectors, remedy=REMEDY,
        group="official",
    ),
    Measure("official_psnr", "PSNR", 3, "↑", official_psnr, group="official"),
    Measure("official_ssim", "SSIM", 3, "↑", official_ssim, group="official"),
    Measure(
        "official_lpips", "LPIPS", 3, "↓", official_lpips, load=load_squeeze_weights, remedy=SQUEEZE, group="official"
    ),
)  # fmt: skip
