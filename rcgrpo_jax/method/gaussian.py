"""The likelihood of a step with noise: its policy is N(mean, S^2 I) (Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_prob(
    after: Float[Array, "*b N C"], mean: Float[Array, "*b N C"], std: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """`log p = mean over N and C of [-(x' - mean)^2 / (2 S^2) - log S - log(2 pi) / 2]`.

    A density would be the sum. All published code takes the mean, which makes a ratio its (N C)-th root; published
    clips belong to that.

    Args:
        after: x', the state that the step came to; no gradient flows through it.
        mean: Of the policy, with gradient.
        std: S, above 0.
    """
    z = (jax.lax.stop_gradient(after) - mean) / std[..., None, None]
    return -0.5 * jnp.square(z).mean((-2, -1)) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def published_cps_log_prob(
    after: Float[Array, "*b N C"], mean: Float[Array, "*b N C"], std: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """`-mean over N and C of (x' - mean)^2`, as in Flow-CPS' code; arguments as for `log_prob`.

    Without the factor `1 / (2 S^2)` a log-ratio is `2 S^2` times that of the density: late steps weigh less.
    """
    del std
    return -jnp.square(jax.lax.stop_gradient(after) - mean).mean((-2, -1))


LOG_PROBS = {"density": log_prob, "published": published_cps_log_prob}


def kl(mean: Float[Array, "*b N C"], reference: Float[Array, "*b N C"], std: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`KL[N(mean, S^2 I) || N(reference, S^2 I)] / (N C) = mean over N and C of (mean - reference)^2 / (2 S^2)`.

    Flow-GRPO's code divides by `2 g^2 = 2 S^2 / D` instead, which gives D times this (D, the step's length).

    Args:
        mean: Of the policy, with gradient.
        reference: Of the policy to stay near.
        std: S of both, above 0.
    """
    return jnp.square(mean - reference).mean((-2, -1)) / (2.0 * jnp.square(std))
