"""The initial noises of a step's groups, for all policies that roll out from noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.method import explore
from rcgrpo_jax.rl.options import ExploreOptions


def initial_noises(
    settings: ExploreOptions,
    key_reference: PRNGKeyArray,
    key_noise: PRNGKeyArray,
    explored: Float[Array, "P N"],
    group_size: int,
    num_channels: int,
) -> Float[Array, "P G N C"]:
    """A reference for each prompt, and a group around it (Eq. 6 or 10-11).

    Args:
        settings: Of the run.
        key_reference: Draws eps*.
        key_noise: Draws the perturbations.
        explored: M, perhaps dilated.
        group_size: G.
        num_channels: C.
    """
    references = jax.random.normal(key_reference, (*explored.shape, num_channels), jnp.float32)
    keys = jax.random.split(key_noise, len(explored))
    alphas = (settings.alpha_edit, settings.alpha_base)

    def perturb(key: Array, reference: Array, region: Array) -> Array:
        match settings.kind:
            case "global":
                return explore.neighbour_noise(key, reference, group_size, settings.sigma)
            case "mixed":
                return explore.mixed_noise(key, reference, region, group_size, *alphas, settings.sigma)
        return explore.region_decoupled_noise(key, reference, region, group_size, *alphas)

    return jax.vmap(perturb)(keys, references, explored)
