"""The times at which the flow is evaluated: FLUX's schedule, shifted towards noise for larger images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.errors import UserError


def shift(
    num_image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift `mu = m N_img + b`, linear through (256, 0.5) and (4096, 1.15) (FLUX; target tokens only)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return slope * (num_image_tokens - base_tokens) + base_shift


def sigmas(num_steps: int, num_image_tokens: int, **shift_options: float) -> Float[np.ndarray, " {num_steps}+1"]:
    """Times `1 = s_0 > s_1 > ... > s_K = 0` of a K-step rollout.

    The linear times `1, 1 - 1/K, ..., 1/K` are shifted by `sigma' = e^mu / (e^mu + 1/sigma - 1)`, then 0 is appended
    (FLUX; the same times as diffusers' flow-matching Euler scheduler with dynamic shifting).

    Args:
        num_steps: K, at least 1.
        num_image_tokens: N_img, tokens of the target image (reference tokens do not count).
        **shift_options: The scheduler's own `base_tokens`, `max_tokens`, `base_shift`, `max_shift`, where not FLUX's.

    Returns:
        float32 `[K + 1]`, strictly decreasing from 1 to 0.

    Raises:
        ValueError: If `num_steps` is below 1.
        UserError: If the shift or the number of steps is so large that float32 does not tell all times apart.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a rollout needs at least 1 step")
    linear = np.linspace(1.0, 1.0 / num_steps, num_steps)
    mu = shift(num_image_tokens, **shift_options)
    with np.errstate(over="ignore", invalid="ignore"):  # what that leaves is refused next
        warp = np.exp(mu)
        times = np.append(warp / (warp + 1.0 / linear - 1.0), 0.0).astype(np.float32)
    if not np.all(np.diff(times) < 0):
        raise UserError(
            f"scheduler: {num_steps} steps shifted by {mu:.4g} for {num_image_tokens} image tokens; times that all "
            "decrease were wanted.",
            "Correct base_shift, max_shift and their image_seq_len in scheduler_config.json, or take fewer steps.",
        )
    return times
