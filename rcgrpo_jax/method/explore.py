"""Neighbourhoods of the initial noise: what makes the candidates of a group differ (Eq. 6, 10, 11)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def _mix(
    reference: Float[Array, "N C"], delta: Float[Array, "g N C"], alpha: float | Float[Array, "#g N 1"]
) -> Float[Array, "g N C"]:
    """sqrt(1 - alpha^2) eps* + alpha delta: N(0, I) again if both are, at any alpha in [0, 1]."""
    return jnp.sqrt(1.0 - jnp.square(alpha)) * reference[None] + alpha * delta


def _around(
    key: PRNGKeyArray, reference: Float[Array, "N C"], group_size: int, alpha: Float[Array, "#g N 1"]
) -> Float[Array, "G N C"]:
    """The reference itself, and g = G - 1 candidates around it."""
    delta = jax.random.normal(key, (group_size - 1, *reference.shape), reference.dtype)
    return jnp.concatenate([reference[None], _mix(reference, delta, alpha)])


def neighbour_noise(
    key: PRNGKeyArray, reference: Float[Array, "N C"], group_size: int, sigma: float
) -> Float[Array, "G N C"]:
    """Perturbs the whole noise, eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i (Eq. 6, Neighbor GRPO).

    Args:
        key: Typed key (`jax.random.key`).
        reference: eps*, [N, C] float32 from N(0, I).
        group_size: G; all candidates are perturbed, the first one too.
        sigma: Strength in (0, 1).

    Returns:
        [G, N, C] float32, each candidate marginally N(0, I).
    """
    delta = jax.random.normal(key, (group_size, *reference.shape), reference.dtype)
    return _mix(reference, delta, sigma)


def perturbation_map(region: Float[Array, " N"], alpha_edit: float, alpha_base: float) -> Float[Array, " N"]:
    """The strength of the perturbation at each token, alpha = alpha_edit M + alpha_base (1 - M) (Eq. 10).

    Args:
        region: M, [N] in [0, 1].
        alpha_edit: Strength inside the edit region, in [0, 1].
        alpha_base: Strength in the background, in [0, 1]; small, so that the background is nearly shared by a group.

    Returns:
        [N] float32 in [0, 1].
    """
    return alpha_edit * region + alpha_base * (1.0 - region)


def region_decoupled_noise(
    key: PRNGKeyArray,
    reference: Float[Array, "N C"],
    region: Float[Array, " N"],
    group_size: int,
    alpha_edit: float,
    alpha_base: float,
) -> Float[Array, "G N C"]:
    """Perturbs mainly the edit region, eps_i = sqrt(1 - alpha^2) eps* + alpha delta_i, eps_0 = eps* (Eq. 11, RDP).

    Args:
        key: Typed key (`jax.random.key`).
        reference: eps*, [N, C] float32 from N(0, I).
        region: M, [N] in [0, 1], from `region.token_region`.
        group_size: G, the reference candidate included.
        alpha_edit: Strength inside the edit region, in [0, 1].
        alpha_base: Strength in the background, in [0, 1].

    Returns:
        [G, N, C] float32. Index 0 is the paper's i_0, bit for bit the reference; each candidate is marginally N(0, I).
    """
    alpha = perturbation_map(region, alpha_edit, alpha_base)
    return _around(key, reference, group_size, alpha[None, :, None])


def mixed_noise(
    key: PRNGKeyArray,
    reference: Float[Array, "N C"],
    region: Float[Array, " N"],
    group_size: int,
    alpha_edit: float,
    alpha_base: float,
    sigma: float,
) -> Float[Array, "G N C"]:
    """Perturbs the edit region in every other candidate and the whole noise in the rest (ours; Eq. 6 and 11).

    Differences in the background are what teaches preservation, and RDP leaves hardly any; here half a group has them.

    Args:
        key: Typed key (`jax.random.key`).
        reference: eps*, [N, C] float32 from N(0, I).
        region: M, [N] in [0, 1], from `region.token_region`.
        group_size: G, the reference candidate included.
        alpha_edit: Strength inside the edit region of candidates 1, 3, ..., in [0, 1].
        alpha_base: Strength in their background, in [0, 1].
        sigma: Strength everywhere of candidates 2, 4, ..., in [0, 1].

    Returns:
        [G, N, C] float32. Index 0 is the reference, bit for bit; each candidate is marginally N(0, I).
    """
    local = jnp.arange(1, group_size)[:, None] % 2 == 1
    alpha = jnp.where(local, perturbation_map(region, alpha_edit, alpha_base)[None], sigma)
    return _around(key, reference, group_size, alpha[..., None])


def region_decoupled_step_noise(
    shared: Float[Array, "N C"],
    own: Float[Array, "N C"],
    region: Float[Array, " N"],
    alpha_edit: float,
    alpha_base: float,
) -> Float[Array, "N C"]:
    """The noise of one candidate's random step, z_i = sqrt(1 - alpha^2) z* + alpha delta_i (ours; Eq. 10 and 11).

    Candidates differ mainly in the edit region, and each z_i is N(0, I): the policy of a step stays `N(mean, S^2 I)`.

    Args:
        shared: z*, which all candidates of the group have, [N, C] float32 from N(0, I).
        own: delta_i, likewise, of the candidate alone; the first candidate has one too.
        region: M, [N] in [0, 1], from `region.token_region`.
        alpha_edit: Strength inside the edit region, in [0, 1].
        alpha_base: Strength in the background, in [0, 1].
    """
    return _mix(shared, own[None], perturbation_map(region, alpha_edit, alpha_base)[None, :, None])[0]


def sample_anchors(key: PRNGKeyArray, group_size: int, num_anchors: int, first: int = 1) -> Int[Array, " B"]:
    """Draws B anchors uniformly without replacement from the perturbed candidates (Section 4.1).

    Args:
        key: Typed key (`jax.random.key`).
        group_size: G.
        num_anchors: B, from 1 to G - `first`.
        first: The first perturbed candidate: 1 where candidate 0 is the reference (`region_decoupled_noise`,
            `mixed_noise`), 0 where all are perturbed (`neighbour_noise`).

    Returns:
        [B] int32, distinct, in `first`..G-1.

    Raises:
        ValueError: There are not that many perturbed candidates.
    """
    perturbed = jnp.arange(first, group_size, dtype=jnp.int32)
    if not 1 <= num_anchors <= len(perturbed):
        raise ValueError(f"{num_anchors} anchors of a group of {group_size}: from 1 to {len(perturbed)} can be drawn")
    return jax.random.choice(key, perturbed, (num_anchors,), replace=False)
