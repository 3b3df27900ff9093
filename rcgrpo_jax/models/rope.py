"""Rotary position embedding over (frame, row, column), computed and applied in fp32."""

from __future__ import annotations

import jax
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
    """Rotates the interleaved pairs `(x_0, x_1), (x_2, x_3), ...` of each head; result in the dtype of `x`.

    `x cos + (-x_1, x_0, -x_3, x_2, ...) sin`: a channel meets its partner by shifts along the channels, since a last
    axis of two, for pairs, costs TPUs memory traffic.
    """
    shape = (1,) * (x.ndim - 3) + (angles.shape[0], 1, x.shape[-1])
    cos, sin = (jnp.repeat(f(angles), 2, axis=-1).reshape(shape) for f in (jnp.cos, jnp.sin))
    even = jnp.arange(x.shape[-1]) % 2 == 0
    x32 = x.astype(jnp.float32)
    turned = jnp.where(even, -_shift(x32, -1), _shift(x32, 1))
    return (x32 * cos + turned * sin).astype(x.dtype)


def _shift(x: Array, by: int) -> Array:
    """`x` moved along its last axis, zeros moving in."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)])
