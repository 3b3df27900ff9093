"""Deterministic rollouts of the flow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solver import EULER, Solver, Velocity, VelocityWithAux


def integrate(
    velocity: Velocity, x: Float[Array, "*b N C"], sigmas: Float[Array, " K+1"], solver: Solver = EULER
) -> Float[Array, "K+1 *b N C"]:
    """All states `x_{s_0}, ..., x_{s_K}` of the rollout `Phi_{1->s}(x; theta, c)` (Eq. 3, 12).

    Args:
        velocity: `v_theta(., ., c)`.
        x: Initial noise at `sigmas[0]`, float32; states keep its dtype.
        sigmas: Decreasing times, `flow.schedule.sigmas`.
        solver: Takes the steps; the paper's is Euler's.

    Returns:
        The K + 1 states; index 0 is `x` itself and index K the sample.
    """
    return integrate_with_aux(lambda x, sigma: (velocity(x, sigma), None), x, sigmas, solver)[0]


def integrate_with_aux(
    velocity: VelocityWithAux, x: Float[Array, "*b N C"], sigmas: Float[Array, " K+1"], solver: Solver = EULER
) -> tuple[Float[Array, "K+1 *b N C"], Any]:
    """`integrate` for a velocity that returns `(v, aux)`; the arrays of `aux` come back as `[K, ...]`, one a step."""

    def step(carry: tuple[Array, Any], times: tuple[Array, Array]) -> tuple[tuple[Array, Any], tuple]:
        x, memory, aux = solver.step(velocity, carry[0], *times, carry[1])
        return (x, memory), (x, aux)

    sigmas = jnp.asarray(sigmas, jnp.float32)
    _, (states, aux) = jax.lax.scan(step, (x, solver.init(x, sigmas)), (sigmas[:-1], sigmas[1:]))
    return jnp.concatenate([x[None], states]), aux
