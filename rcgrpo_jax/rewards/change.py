"""How much the region changed, whatever it became: beside rewards that an untouched picture satisfies."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.rewards.base import RewardInputs, register
from rcgrpo_jax.rewards.colour import lab_from_srgb


@jax.jit
def change_score(
    source: Float[Array, "P H W 3"], edited: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"], scale: float
) -> Float[Array, "P G"]:
    """Computes the mask-weighted mean of `1 - exp(-(dE / scale)^2)`, `dE` the CIELAB difference from the source (ours).

    It grows with the difference of every pixel. Noise of a small part of `scale` hardly counts, and a pixel that has
    plainly changed gains nothing by changing further: the score asks for an edit, and does not say which.

    Args:
        source: sRGB in [0, 1].
        edited: Candidates.
        mask: The edit region, in [0, 1].
        scale: CIELAB units at which a pixel's score is `1 - 1 / e` = 0.63; > 0.

    Returns:
        Scores in [0, 1], float32: 0 for an unchanged region; NaN for an empty mask, or a NaN pixel.
    """
    squared = jnp.sum((lab_from_srgb(edited) - lab_from_srgb(source)[:, None]) ** 2, axis=-1)
    changed = 1 - jnp.exp(-squared / scale**2)
    return jnp.sum(mask[:, None] * changed, axis=(-2, -1)) / jnp.sum(mask, axis=(-2, -1))[:, None]


@register("change")
@dataclass(frozen=True)
class Change:
    """Rewards a region that differs from the source's: `change_score`. An edit that does nothing scores 0."""

    scale: float = 12.0  # CIELAB units; 2 are just seen, 12 plainly

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        return change_score(inputs.source, inputs.edited, inputs.mask, self.scale)
