"""The initial noises of the groups of a step; the option `explore.kind`, for all policies."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.method import explore
from rcgrpo_jax.rl.options import StepOptions
from rcgrpo_jax.rl.policy.base import Prompts


def initial_noise(
    keys: Sequence[PRNGKeyArray], prompts: Prompts, networks: Networks, options: StepOptions
) -> Float[Array, "P G N C"]:
    """Noises around one reference a group (Eq. 6 or 10-11).

    With `global` and sigma = 1 a group's noises are independent; with sigma = 0 all of them are the reference.

    Args:
        keys: Two: of the references, and of what differs from them.
        prompts: The batch.
        networks: They know the shape.
        options: The run's.
    """
    key_reference, key_deltas = keys
    settings, group = options.explore, options.rollout.group_size
    references = jax.random.normal(key_reference, networks.source(prompts.condition).shape, jnp.float32)
    alphas = (settings.alpha_edit, settings.alpha_base)

    def perturb(key: Array, reference: Array, region: Array) -> Array:
        match settings.kind:
            case "global":
                return explore.neighbour_noise(key, reference, group, settings.sigma)
            case "mixed":
                return explore.mixed_noise(key, reference, region, group, *alphas, settings.sigma)
        return explore.region_decoupled_noise(key, reference, region, group, *alphas)

    return jax.vmap(perturb)(jax.random.split(key_deltas, len(references)), references, prompts.explored)
