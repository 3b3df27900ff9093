"""Flow matching: the straight path between data and noise, and the times it is learned at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.flow.schedule import shift


def interpolate(
    data: Float[Array, "*b N C"], noise: Float[Array, "*b N C"], sigma: Float[Array, "*b"]
) -> tuple[Float[Array, "*b N C"], Float[Array, "*b N C"]]:
    """A point on the path `x_sigma = (1 - sigma) x_0 + sigma noise` and its velocity `noise - x_0` (rectified flow).

    Args:
        data: x_0, at sigma = 0.
        noise: At sigma = 1.
        sigma: One time for each sample, in [0, 1].

    Returns:
        `x_sigma` and the velocity that a model at (`x_sigma`, `sigma`) is to predict.
    """
    sigma = sigma[..., None, None]
    return (1.0 - sigma) * data + sigma * noise, noise - data


def sample_sigmas(
    key: PRNGKeyArray, shape: tuple[int, ...], num_image_tokens: int, extra_shift: float = 0.0, **shift_options: float
) -> Float[Array, "..."]:
    """Training times: logit-normal (Esser et al. 2024), shifted towards noise as the schedule of that size is.

    `sigma = sigmoid(z + mu)`, `z ~ N(0, 1)`, `mu = schedule.shift(N_img) + extra_shift`: without the extra, the median
    is the image of 1/2 under the schedule's shift.

    Args:
        key: Random key.
        shape: Of the result.
        num_image_tokens: N_img, which sets the shift.
        extra_shift: Above 0, noisier times: what is where is decided close to sigma = 1, since a token of 64 channels
            shows through much noise.
        **shift_options: As for `schedule.sigmas`.

    Returns:
        float32 in (0, 1).
    """
    mu = shift(num_image_tokens, **shift_options) + extra_shift
    return jax.nn.sigmoid(jax.random.normal(key, shape) + mu)


def matching_loss(
    predicted: Float[Array, "*b N C"], velocity: Float[Array, "*b N C"], weights: Float[Array, "*b N"]
) -> Float[Array, ""]:
    """The weighted mean over tokens of the velocity's squared error; 0 where no token has a weight."""
    errors = jnp.square(predicted.astype(jnp.float32) - velocity).mean(-1)
    return (errors * weights).sum() / jnp.maximum(weights.sum(), 1e-6)
