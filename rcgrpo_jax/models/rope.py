"""Rotary position embedding over (frame, row, column), computed and applied in fp32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def token_ids(grid: tuple[int, int], frame: int) -> Int[np.ndarray, "N 3"]:
    """Position `(frame, row, column)` of each token of a grid, row-major; frame 0 is the target, 1 the reference."""
    rows, columns = np.indices(grid).reshape(2, -1)
    return np.stack([np.full_like(rows, frame), rows, columns], axis=-1)


def kontext_ids(num_text_tokens: int, grid: tuple[int, int]) -> Int[np.ndarray, "N 3"]:
    """Positions of the whole sequence [text, target, reference]; text sits at the origin.

    Target and reference share one grid: resized by different rules, region masks and outputs would shift.
    """
    return np.concatenate([np.zeros((num_text_tokens, 3), int), token_ids(grid, 0), token_ids(grid, 1)])


def angles(ids: Int[np.ndarray, "N A"], axes_dims: tuple[int, ...], theta: float) -> Float[Array, "N D/2"]:
    """Rotation angles `position / theta^(2 i / d)` of each pair of channels, the axes side by side; fp32."""
    parts = [
        ids[:, axis, None] * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    return jnp.asarray(np.concatenate(parts, axis=-1), jnp.float32)


def rotate(x: Float[Array, "*b N H D"], angles: Float[Array, "N D/2"]) -> Float[Array, "*b N H D"]:
    """Rotates the interleaved pairs `(x_0, x_1), (x_2, x_3), ...` of each head; result in the dtype of `x`."""
    shape = (1,) * (x.ndim - 3) + (angles.shape[0], 1, angles.shape[1])
    cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
