"""The edit region on the token grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def token_region(
    mask_pixels: Float[Array, "h_px w_px"],
    grid: tuple[int, int],
    *,
    threshold: float | None = None,
    dilation: int = 0,
) -> Float[Array, " N_img"]:
    """Brings a pixel mask to the token grid, M(u) = max of the pixels of token u.

    The paper defines its mask "in latent space" without saying how a token on the border is decided. Here any touched
    token is in the region by default, so that exploration can reach every pixel that the user asked to change.

    Args:
        mask_pixels: [h_px, w_px], values in [0, 1], 1 = edit region.
        grid: (rows, columns) of the target image's tokens; must divide the mask's size.
        threshold: Share of a token's area, in (0, 1], from which the token is in the region; where none has so much,
            those with the most are. The result is then binary; without it a soft mask stays soft.
        dilation: Radius in tokens by which the region grows, as a square. Applied last.

    Returns:
        [N_img] = [rows * columns] float32 in [0, 1], row-major like the packed latents.

    Raises:
        ValueError: The grid does not divide the mask.
    """
    (height, width), (rows, columns) = mask_pixels.shape, grid
    if height % rows or width % columns:
        raise ValueError(
            f"a mask of {height} x {width} pixels does not divide into a grid of {rows} x {columns} tokens"
        )
    cells = mask_pixels.astype(jnp.float32).reshape(rows, height // rows, columns, width // columns)
    tokens = cells.max(axis=(1, 3))
    if threshold is not None:
        share = cells.mean(axis=(1, 3))
        tokens = ((share > 0) & (share >= jnp.minimum(threshold, share.max()))).astype(jnp.float32)
    return dilate(tokens.reshape(-1), grid, dilation)


def dilate(tokens: Float[Array, " N"], grid: tuple[int, int], radius: int) -> Float[Array, " N"]:
    """The largest value within a square around each token; outside of the picture there is nothing.

    Args:
        tokens: Not negative, row-major.
        grid: (rows, columns).
        radius: In tokens; 0 changes nothing.
    """
    side = 2 * radius + 1
    return jax.lax.reduce_window(tokens.reshape(grid), 0.0, jax.lax.max, (side, side), (1, 1), "SAME").reshape(-1)
