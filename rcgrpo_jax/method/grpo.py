"""From rewards to the objective: minibatch z-scores, group advantages, the clipped ratio and its KL (Eq. 4, 5)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A standard deviation up to this share of the largest |reward|, or of 1 if that is larger, is rounding and not signal:
# float32 holds seven digits, and dividing by the rounding of equal rewards would give a group without news full weight.
NEGLIGIBLE_STD = 1e-6

# Flow-GRPO's, beside the standard deviation of a whole batch.
BATCH_EPSILON = 1e-4

# exp(20) is far beyond any clip. Without this bound an overflowing ratio times a zero advantage would be NaN.
MAX_LOG_RATIO = 20.0


def _negligible(std: Float[Array, "..."], largest: Float[Array, "..."]) -> Bool[Array, "..."]:
    return std <= NEGLIGIBLE_STD * jnp.maximum(largest, 1.0)


def _z_score(reward: Float[Array, "P G"], valid: Bool[Array, "P G"]) -> Float[Array, "P G"]:
    """(r - mean) / std with the statistics of the valid entries of the whole array; zeros if they do not differ."""
    mean, std = jnp.mean(reward, where=valid), jnp.std(reward, where=valid)
    flat = _negligible(std, jnp.max(jnp.abs(reward), where=valid, initial=0.0))
    return jnp.where(flat, 0.0, (reward - mean) / jnp.where(flat, 1.0, std))


def combine_rewards(
    rewards: Mapping[str, Float[Array, "P G"]], weights: Mapping[str, float], least_scored: float = 1.0
) -> Float[Array, "P G"]:
    """The weighted sum of the rewards, each first z-scored over the whole minibatch (Section 5.1).

    The statistics are those of all P x G entries, not of a group: they settle how much one reward counts against
    another, and a reward that hardly varies within a group is not blown up there.

    Args:
        rewards: A [P, G] array for each reward; P counts the prompts of all devices.
        weights: A weight for each reward, under the same names.
        least_scored: Share of its candidates that a group must have all rewards of.

    Returns:
        [P, G] float32. A candidate without one of its rewards, which is NaN or infinite there, is left out of all
        statistics and comes out as NaN; so is a group with fewer scored candidates than `least_scored`. A reward that
        is the same for the whole minibatch contributes zeros.

    Raises:
        ValueError: A reward has no weight, or a weight no reward.
    """
    if set(rewards) != set(weights):
        missing, unknown = sorted(set(rewards) - set(weights)), sorted(set(weights) - set(rewards))
        raise ValueError(
            f"weights and rewards differ: rewards without a weight {missing}, weights without one {unknown}"
        )
    valid = jnp.all(jnp.stack([jnp.isfinite(reward) for reward in rewards.values()]), axis=0)
    valid &= (valid.mean(axis=-1) >= least_scored)[:, None]
    total = sum(weights[name] * _z_score(reward, valid) for name, reward in rewards.items())
    return jnp.where(valid, total, jnp.nan)


def zero_std_groups(rewards: Float[Array, "... G"]) -> Bool[Array, "..."]:
    """Which groups have rewards that do not differ: population std <= 1e-6 max(1, max |r|), over those that are finite.

    Args:
        rewards: [..., G].

    Returns:
        [...]; false for a group without a finite reward, which failed and is no tie.
    """
    finite = jnp.isfinite(rewards)
    std, largest = (
        jnp.std(rewards, axis=-1, where=finite),
        jnp.max(jnp.abs(rewards), axis=-1, where=finite, initial=0.0),
    )
    return _negligible(std, largest) & finite.any(axis=-1)


def group_advantages(
    rewards: Float[Array, "... G"], clip: float = 5.0, quasi_norm: float | None = None, over: str = "group"
) -> Float[Array, "... G"]:
    """The rewards standardised in their group, A_i = (r_i - mean) / std, clipped to +-clip (Eq. 4).

    With `quasi_norm` = p it is Neighbor GRPO's A_i = r'_i / (sum_j |r'_j|^p)^(1/p), r' = r - mean, which gives less
    weight to groups in which many candidates differ than to those with one that stands out. `over="batch"` is
    Flow-GRPO's A_i = (r_i - mean of the group) / (std of all rewards + 1e-4): groups that differ little weigh little.

    Args:
        rewards: [..., G].
        clip: Largest |A_i|.
        quasi_norm: p > 0 (Neighbor GRPO: 0.8), or None for the population standard deviation.
        over: Whose standard deviation it is: of the `group`, or of the whole `batch`.

    Returns:
        [..., G] float32, always finite. Rewards that are not finite are left out of the statistics, and their
        candidates have an advantage of zero. Groups without signal are zeros: those of `zero_std_groups` (so no epsilon
        is needed in the denominator), and those without a finite reward.
    """
    finite = jnp.isfinite(rewards)
    usable = finite.any(axis=-1, keepdims=True) & ~zero_std_groups(rewards)[..., None]
    mean = jnp.mean(rewards, axis=-1, keepdims=True, where=finite)
    centred = jnp.where(usable & finite, rewards - mean, 0.0)
    if quasi_norm is not None:
        scale = jnp.sum(jnp.abs(centred) ** quasi_norm, axis=-1, keepdims=True) ** (1.0 / quasi_norm)
    elif over == "batch":
        scale = jnp.std(rewards, keepdims=True, where=finite) + BATCH_EPSILON
    else:
        scale = jnp.std(rewards, axis=-1, keepdims=True, where=finite)
    return jnp.clip(centred / jnp.where(usable, scale, 1.0), -clip, clip)


def clipped_objective(
    log_ratio: Float[Array, "... G"],
    advantages: Float[Array, "... G"],
    clip: float,
    weights: Float[Array, "... G"] | None = None,
) -> Float[Array, ""]:
    """J = E[min(A rho, A clip(rho, 1 - c, 1 + c))], to be maximised (the first term of Eq. 5).

    Args:
        log_ratio: log rho = log pi_theta - log pi_old (Eq. 15), [..., G]; groups, anchors and steps are in front.
        advantages: A, [..., G], or a shape of the same rank that broadcasts.
        clip: c, > 0.
        weights: Weights of the candidates (for example pi_old) in place of the uniform 1 / G of Eq. 5; constants,
            [..., G] or a shape of the same rank that broadcasts.

    Returns:
        A scalar: the weighted sum over candidates, averaged over every other axis.
    """
    ratio = jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))
    gain = jnp.minimum(advantages * ratio, advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))
    if weights is None:
        return jnp.mean(gain)
    return jnp.mean(jnp.sum(weights * gain, axis=-1))


def clip_fraction(log_ratio: Float[Array, "..."], clip: float) -> Float[Array, ""]:
    """The share of ratios outside 1 +- c, whichever side the objective clips.

    Args:
        log_ratio: log rho, of any shape.
        clip: c, > 0.

    Returns:
        A scalar in [0, 1].
    """
    return jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip)


def categorical_kl(log_old: Float[Array, "... G"], log_new: Float[Array, "... G"]) -> Float[Array, "..."]:
    """KL[pi_old || pi_theta] = sum_i pi_old(i) (log pi_old(i) - log pi_theta(i)), the closed form of Eq. 5's penalty.

    Args:
        log_old: [..., G] log-probabilities under theta_old.
        log_new: [..., G] log-probabilities under theta.

    Returns:
        [...] in nats, >= 0 up to rounding.
    """
    return jnp.sum(jnp.exp(log_old) * (log_old - log_new), axis=-1)
