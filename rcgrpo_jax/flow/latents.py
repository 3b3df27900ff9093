"""Packing of VAE latents into the tokens that the transformer sees."""

from __future__ import annotations

from jaxtyping import Array, Float

PATCH = 2  # latent cells a side of one token


def token_grid(height: int, width: int, downscale: int = 8) -> tuple[int, int]:
    """Rows and columns of tokens of an image of `height x width` pixels (16 pixels a side of a token in FLUX).

    Raises:
        ValueError: If a side is not a positive multiple of the token's side.
    """
    side = PATCH * downscale
    if height < side or width < side or height % side or width % side:
        raise ValueError(f"an image of {height} x {width} pixels does not divide into tokens of {side} x {side} pixels")
    return height // side, width // side


def pack(latents: Float[Array, "*b h w c"]) -> Float[Array, "*b N C"]:
    """Tokens of 2 x 2 latent cells, row-major; channels of a token are ordered (c, row, column), as FLUX does."""
    *batch, h, w, c = latents.shape
    x = latents.reshape(*batch, h // PATCH, PATCH, w // PATCH, PATCH, c)
    n = len(batch)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*batch, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Float[Array, "*b N C"], grid: tuple[int, int]) -> Float[Array, "*b h w c"]:
    """The inverse of `pack`, for a token grid of (rows, columns)."""
    *batch, _, channels = tokens.shape
    rows, columns = grid
    x = tokens.reshape(*batch, rows, columns, channels // PATCH**2, PATCH, PATCH)
    n = len(batch)
    x = x.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return x.reshape(*batch, rows * PATCH, columns * PATCH, channels // PATCH**2)
