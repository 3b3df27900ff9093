"""The window of solver steps that are random and carry the loss; all others are deterministic.

A window is its first step, counted from 0, and its size w. It ends before the last of the K steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray


def progressive_start(step: Int[Array, ""], size: int, num_steps: int, interval: int, stride: int) -> Int[Array, ""]:
    """`l = min(stride floor(step / interval), K - 1 - w)` (MixGRPO, arXiv 2507.21802): from noise towards data.

    Args:
        step: Training steps done.
        size: w.
        num_steps: K.
        interval: tau, training steps from one move to the next.
        stride: Solver steps of a move; with 0 the window stays at the first steps.
    """
    moves = jnp.minimum(step // interval, num_steps)  # no more are needed, and the product stays small
    return jnp.minimum(stride * moves, num_steps - 1 - size)


def random_start(key: PRNGKeyArray, size: int, first: int, end: int) -> Int[Array, ""]:
    """Uniform over the windows within the steps `[first, end)` (Flow-GRPO-Fast)."""
    return jax.random.randint(key, (), first, end - size + 1)


def covers(step: Int[Array, "..."], start: Int[Array, ""], size: int) -> Bool[Array, "..."]:
    """Whether solver steps are in the window."""
    return (start <= step) & (step < start + size)
