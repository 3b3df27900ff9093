"""The initial noises of the groups of a step; the option `explore.kind`, for all policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.method import explore
from rcgrpo_jax.rl.options import ExploreOptions, StepOptions
from rcgrpo_jax.rl.policy.base import Prompts

Explorer = Callable[[PRNGKeyArray, Array, Array, int, ExploreOptions], Array]
"""`(key, reference [N, C], region [N], G, options) -> noises [G, N, C]`, each of them N(0, I)."""


def _region(key: PRNGKeyArray, reference: Array, region: Array, group: int, options: ExploreOptions) -> Array:
    return explore.region_decoupled_noise(key, reference, region, group, options.alpha_edit, options.alpha_base)


def _global(key: PRNGKeyArray, reference: Array, region: Array, group: int, options: ExploreOptions) -> Array:
    return explore.neighbour_noise(key, reference, group, options.sigma)


def _mixed(key: PRNGKeyArray, reference: Array, region: Array, group: int, options: ExploreOptions) -> Array:
    alphas = options.alpha_edit, options.alpha_base, options.sigma
    return explore.mixed_noise(key, reference, region, group, *alphas)


EXPLORERS: dict[str, Explorer] = {"region": _region, "global": _global, "mixed": _mixed}


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
    explorer = EXPLORERS[settings.kind]
    perturb = jax.vmap(lambda key, reference, region: explorer(key, reference, region, group, settings))
    return perturb(jax.random.split(key_deltas, len(references)), references, prompts.explored)
