"""Heun's method: two evaluations of the velocity a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solvers.base import VelocityWithAux, move, scan_steps
from rcgrpo_jax.flow.solvers.euler import EULER


def heun_step(
    velocity: VelocityWithAux, x: Float[Array, "*b N C"], sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> tuple[Float[Array, "*b N C"], Any]:
    """The mean of the velocities at both ends of an Euler step; second-order accurate (Karras et al. 2022, Alg. 1).

    `y = x + (t - s) v(x, s)`, `x' = x + (t - s) (v(x, s) + v(y, t)) / 2`, from `s = sigma` to `t = sigma_next`.

    Returns:
        x' in the dtype of `x`, and the aux of `v(x, s)`.
    """
    v, aux = velocity(x, sigma)
    v_next, _ = velocity(move(x, v, sigma, sigma_next), sigma_next)
    return move(x, (v.astype(x.dtype) + v_next.astype(x.dtype)) / 2, sigma, sigma_next), aux


class Heun:
    """`heun_step` after `heun_step`. A step to sigma = 0 is Euler's: the velocity is asked for at no data."""

    least_steps = 2

    def evaluations(self, num_steps):
        return [2] * (num_steps - 1) + [1]

    def integrate(self, velocity, x, sigmas):
        def step(x, memory, sigma, sigma_next):
            x, aux = heun_step(velocity, x, sigma, sigma_next)
            return x, memory, aux

        sigmas = np.asarray(sigmas)
        if sigmas[-1] > 0:
            return scan_steps(step, x, (), sigmas)
        # Beside the loop: a step within it costs two evaluations, whatever becomes of the second.
        states, aux = scan_steps(step, x, (), sigmas[:-1])
        last, aux_of_last = EULER.integrate(velocity, states[-1], sigmas[-2:])
        return jnp.concatenate([states, last[1:]]), jax.tree.map(lambda *x: jnp.concatenate(x), aux, aux_of_last)
