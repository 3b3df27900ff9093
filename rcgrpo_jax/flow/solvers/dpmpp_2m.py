"""DPM-Solver++(2M): second order from one evaluation a step, with the memory of the step before."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solvers.base import VelocityWithAux, move, scan_steps


def multistep_weights(sigmas: Float[np.ndarray, " K1"]) -> Float[np.ndarray, " K"]:
    """`w_k = h_k / (2 h_{k-1})`, `h_k = lambda(s_k) - lambda(s_{k-1})`, `lambda(s) = log((1 - s) / s)`; float64.

    It is 0, and the step Euler's, where there is no step before, where the one before began at s = 1 (its h is
    infinite), and where a step ends at s = 0 (its own is). A shift of the schedule adds a constant to lambda, and
    leaves w as it is.

    Args:
        sigmas: Decreasing times in [0, 1].
    """
    times = np.asarray(sigmas, np.float64)
    with np.errstate(divide="ignore"):
        lengths = np.diff(np.log1p(-times) - np.log(times))
    weights, there = np.zeros(len(lengths)), np.isfinite(lengths[1:])
    weights[1:][there] = lengths[1:][there] / (2 * lengths[:-1][there])
    return weights


def dpmpp_2m_step(
    velocity: VelocityWithAux,
    x: Float[Array, "*b N C"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    weight: Float[Array, ""],
    before: Float[Array, "*b N C"],
) -> tuple[Float[Array, "*b N C"], Float[Array, "*b N C"], Any]:
    """`x' = x + (t - s) v + (1 - t / s) w (x0 - x0_before)`, `x0 = x - s v`: from `s = sigma` to `t = sigma_next`.

    This is `(t / s) x - (1 - t) expm1(-h) (x0 + w (x0 - x0_before))` (Lu et al. 2022, arXiv 2211.01095, Alg. 2), since
    `-(1 - t) expm1(-h) = 1 - t / s`: no exponential, and nothing infinite at either end. With w = 0 it is Euler's.

    Args:
        velocity: `v_theta(., ., c)` with aux.
        x: State at `sigma`.
        sigma: Time now, in (0, 1].
        sigma_next: Time after the step.
        weight: w, of `multistep_weights`.
        before: The data that the step before predicted.

    Returns:
        x', the predicted data x0, and the aux; arrays in the dtype of `x`.
    """
    v, aux = velocity(x, sigma)
    data = x - sigma.astype(x.dtype) * v.astype(x.dtype)
    extrapolation = ((1 - sigma_next / sigma) * weight).astype(x.dtype) * (data - before)
    return move(x, v, sigma, sigma_next) + extrapolation, data, aux


class DPMpp2M:
    """`dpmpp_2m_step` after `dpmpp_2m_step`. Its first, second and last step are Euler's."""

    least_steps = 3

    def evaluations(self, num_steps):
        return [1] * num_steps

    def integrate(self, velocity, x, sigmas):
        def step(x, before, sigma, sigma_next, weight):
            return dpmpp_2m_step(velocity, x, sigma, sigma_next, weight, before)

        # The first step's weight is 0: it looks at no data from before, and any will do.
        return scan_steps(step, x, x, sigmas, multistep_weights(sigmas))
