"""Deterministic rollouts of the flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solver import Velocity, euler_step


def integrate(
    velocity: Velocity, x: Float[Array, "*b N C"], sigmas: Float[Array | np.ndarray, " K1"]
) -> Float[Array, "K1 *b N C"]:
    """All states `x_{s_0}, ..., x_{s_K}` of the rollout `Phi_{1->s}(x; theta, c)` (Eq. 3, 12).

    Args:
        velocity: `v_theta(., ., c)`.
        x: Initial noise at `sigmas[0]`, float32; states keep its dtype.
        sigmas: K1 = K + 1 decreasing times, `flow.schedule.sigmas`.

    Returns:
        The K + 1 states; index 0 is `x` itself and index K the sample.
    """
    return integrate_with_aux(lambda x, sigma: (velocity(x, sigma), None), x, sigmas)[0]


def integrate_with_aux(
    velocity: Callable[[Array, Array], tuple[Array, Any]],
    x: Float[Array, "*b N C"],
    sigmas: Float[Array | np.ndarray, " K1"],
) -> tuple[Float[Array, "K1 *b N C"], Any]:
    """`integrate` for a velocity that returns `(v, aux)`; the arrays of `aux` come back as `[K, ...]`, one a step."""

    def step(x: Array, times: tuple[Array, Array]) -> tuple[Array, tuple]:
        sigma, sigma_next = times
        v, aux = velocity(x, sigma)
        x = euler_step(lambda *_: v, x, sigma, sigma_next)
        return x, (x, aux)

    sigmas = jnp.asarray(sigmas, jnp.float32)
    _, (states, aux) = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
    return jnp.concatenate([x[None], states]), aux
