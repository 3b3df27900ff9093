"""The ratio of new and old likelihood (Eq. 15), for all policies that have one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rcgrpo_jax.method import grpo, surrogate


def log_ratio(
    log_pi: Float[Array, "T M"], log_old: Float[Array, "T M"], first: Bool[Array, ""]
) -> tuple[Float[Array, "T M"], Float[Array, "T M"]]:
    """`log pi_theta - log pi_old`, and `log pi_old`: the first update compares the policy with itself.

    Args:
        log_pi: Under theta, with gradient.
        log_old: What the first update on this rollout found; ignored in the first.
        first: Whether this is the first update.

    Returns:
        The log-ratio with the gradient of `log_pi`, exactly 0 in the first update, and the log-policy it compares with.
    """
    ratio = jnp.where(first, surrogate.log_ratio_to_itself(log_pi), log_pi - log_old)
    return ratio, jnp.where(first, jax.lax.stop_gradient(log_pi), log_old)


def ratio_metrics(log_ratio: Float[Array, "T M"], clip: float) -> dict[str, Float[Array, ""]]:
    """Mean, largest deviation from 1 and clipped share of the ratios of a unit."""
    bounded = jnp.minimum(log_ratio, grpo.MAX_LOG_RATIO)
    return {
        "ratio_mean": jnp.exp(bounded).mean(),
        "ratio_deviation": jnp.abs(jnp.expm1(bounded)).max(),
        "clip_fraction": grpo.clip_fraction(log_ratio, clip),
    }
