"""How far the background is that of the source, in decibels."""

from __future__ import annotations

import dm_pix
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, without_region

CAP = 60.0  # dB, for equal backgrounds too: rounding to 8 bits alone leaves 59 dB of a whole frame


def psnr(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes `min(60, 10 log10(1 / MSE))` of the whole frame without the region, as CompBench does.

    Args:
        inputs: A batch.

    Returns:
        Decibels, float32.
    """
    return jnp.minimum(dm_pix.psnr(*without_region(inputs)), CAP)


PSNR = Measure("psnr", "PSNR", 2, "↑", psnr)
