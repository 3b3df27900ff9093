"""The times at which the flow is evaluated: FLUX's schedule, shifted towards noise for larger images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


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


def sigmas(num_steps: int, num_image_tokens: int, **shift_options: float) -> Float[np.ndarray, " K+1"]:
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
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a rollout needs at least 1 step")
    linear = np.linspace(1.0, 1.0 / num_steps, num_steps)
    warp = np.exp(shift(num_image_tokens, **shift_options))
    return np.append(warp / (warp + 1.0 / linear - 1.0), 0.0).astype(np.float32)
