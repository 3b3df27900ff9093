"""Deterministic rollouts of the flow."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solvers.base import Solver, Velocity, VelocityWithAux
from rcgrpo_jax.flow.solvers.euler import EULER


def integrate(
    velocity: Velocity, x: Float[Array, "*b N C"], sigmas: Float[Array | np.ndarray, " K1"], solver: Solver = EULER
) -> Float[Array, "K1 *b N C"]:
    """All states `x_{s_0}, ..., x_{s_K}` of the rollout `Phi_{1->s}(x; theta, c)` (Eq. 3, 12).

    Args:
        velocity: `v_theta(., ., c)`.
        x: Initial noise at `sigmas[0]`, float32; states keep its dtype.
        sigmas: K1 = K + 1 decreasing times, `flow.schedule.sigmas`. All solvers but Euler's look at them ahead of the
            loop: they must not be traced.
        solver: Takes the steps; the paper's is Euler's.

    Returns:
        The K + 1 states; index 0 is `x` itself and index K the sample.
    """
    return integrate_with_aux(lambda x, sigma: (velocity(x, sigma), None), x, sigmas, solver)[0]


def integrate_with_aux(
    velocity: VelocityWithAux,
    x: Float[Array, "*b N C"],
    sigmas: Float[Array | np.ndarray, " K1"],
    solver: Solver = EULER,
) -> tuple[Float[Array, "K1 *b N C"], Any]:
    """`integrate` for a velocity that returns `(v, aux)`; the arrays of `aux` come back as `[K, ...]`, one a step."""
    return solver.integrate(velocity, x, sigmas)
