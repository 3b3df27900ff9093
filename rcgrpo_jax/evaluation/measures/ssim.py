"""How far the background has the structure of the source's."""

from __future__ import annotations

import dm_pix
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, without_region


def ssim(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes the structural similarity of the whole frame without the region, as CompBench does.

    Windows are 11 x 11 pixels and Gaussian; the mean is over them and the channels.

    Args:
        inputs: A batch.

    Returns:
        Similarities in [-1, 1], float32.
    """
    return dm_pix.ssim(*without_region(inputs))


SSIM = Measure("ssim", "SSIM", 3, "↑", ssim)
