"""How well an edit leaves the rest of the picture alone: PSNR and SSIM outside the mask, against the source."""

from __future__ import annotations

from dataclasses import dataclass

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.rewards.base import RewardInputs, register

PSNR_CAP = 50.0  # dB; rounding to 8 bits alone leaves 59 dB, so a background equal up to rounding is at the cap
SSIM_WINDOW = 11  # pixels a side, Gaussian of sigma 1.5: the usual SSIM


def masked_psnr(
    a: Float[Array, "*batch H W 3"], b: Float[Array, "*batch H W 3"], mask: Float[Array, "*batch H W"],
    cap: float = PSNR_CAP,
) -> Float[Array, "*batch"]:  # fmt: skip
    """Computes the peak signal-to-noise ratio of the background, `min(cap, 10 log10(1 / MSE))`.

    The MSE is the mean over channels and pixels, weighted by the background share `1 - mask`. Equal backgrounds give
    the cap, and so does a full mask, which leaves nothing to preserve.

    Args:
        a: A picture in [0, 1], float32.
        b: The other.
        mask: The edit region, in [0, 1].
        cap: The largest value, dB.

    Returns:
        Decibels in [0, cap], float32; NaN if a pixel is NaN.
    """
    background = 1 - mask
    squared_error = jnp.mean((a - b) ** 2, axis=-1)
    total = jnp.sum(background * squared_error, axis=(-2, -1))
    # With no background the sum is zero, and any positive divisor keeps it so.
    mse = total / jnp.maximum(jnp.sum(background, axis=(-2, -1)), 1e-6)
    return jnp.minimum(-10 * jnp.log10(mse), cap)


def masked_ssim(
    a: Float[Array, "*batch H W 3"], b: Float[Array, "*batch H W 3"], mask: Float[Array, "*batch H W"]
) -> Float[Array, "*batch"]:  # fmt: skip
    """Computes the mean structural similarity of the background (Wang et al. 2004, `dm_pix.ssim`).

    Each window of the SSIM map counts with the smallest background share, `1 - mask`, of its pixels: for a binary mask,
    only the windows that lie wholly in the background count, and the edit cannot leak in. Where no window does, the
    result is 1. A picture with a side under 11 pixels is compared by the largest odd window that fits.

    Args:
        a: A picture in [0, 1], float32.
        b: The other.
        mask: The edit region, in [0, 1].

    Returns:
        Similarities in [-1, 1], float32; NaN if a pixel that any window sees is NaN.
    """
    *batch, height, width, channels = a.shape
    window = min(SSIM_WINDOW, height, width)
    window -= 1 - window % 2
    flat = (-1, height, width, channels)  # dm_pix takes one batch axis
    similarity = dm_pix.ssim(a.reshape(flat), b.reshape(flat), filter_size=window, return_map=True)
    similarity = jnp.mean(similarity, axis=-1)

    reach = jax.lax.reduce_window(
        mask.reshape(-1, height, width), -jnp.inf, jax.lax.max, (1, window, window), (1, 1, 1), "VALID"
    )
    share = 1 - reach
    # The mean is taken of `similarity - 1`, so that no window at all gives 1.
    deficit = jnp.sum(share * (similarity - 1), axis=(-2, -1)) / jnp.maximum(jnp.sum(share, axis=(-2, -1)), 1e-6)
    return (1 + deficit).reshape(batch)


@jax.jit
def _score(
    source: Float[Array, "P H W 3"], edited: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"], cap: float
) -> Float[Array, "P G"]:
    sources = jnp.broadcast_to(source[:, None], edited.shape)
    masks = jnp.broadcast_to(mask[:, None], edited.shape[:-1])
    return (masked_psnr(sources, edited, masks, cap) / cap + masked_ssim(sources, edited, masks)) / 2


@register("preservation")
@dataclass(frozen=True)
class Preservation:
    """Rewards an untouched background with `(PSNR / cap + SSIM) / 2`, both outside the mask.

    1 is an untouched background, or a full mask, which has none; values lie in [-0.5, 1].
    """

    cap: float = PSNR_CAP  # dB of PSNR that count as perfect

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        return _score(inputs.source, inputs.edited, inputs.mask, self.cap)
