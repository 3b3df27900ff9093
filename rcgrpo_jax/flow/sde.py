"""Steps with noise: stochastic samplers of the flow in one form, of which two numbers a step say which it is.

From `s = sigma` to `t = sigma_next`, `v = v(x, s)`, and with the predicted noise `e = x + (1 - s) v`:

    mean = x + (t - s) v + kappa e        x' = mean + S z        z ~ N(0, I)

With kappa = S = 0 this is Euler's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.flow.solvers.base import move

Times = Float[np.ndarray, " k"]


def flow_grpo(sigma: Times, sigma_next: Times, level: float) -> tuple[Times, Times]:
    """`kappa = -g^2 D / (2 s)`, `S = g sqrt(D)`, `g = a sqrt(s / (1 - s))`, `D = s - t` (Flow-GRPO, arXiv 2505.05470).

    One Euler-Maruyama step of `dx = [v + g^2 / (2 s) e] ds + g dw`, whose paths have the marginals of the ODE. In the
    first step s is 1 and g infinite: there `1 - s` becomes `1 - s_1`, as in the published code, and S is a.
    """
    data = 1.0 - sigma
    data[0] = 1.0 - sigma_next[0]  # by its place: a schedule's first time may miss 1 by rounding
    g, length = level * np.sqrt(sigma / data), sigma - sigma_next
    return -(g**2) * length / (2.0 * sigma), g * np.sqrt(length)


def cps(sigma: Times, sigma_next: Times, level: float) -> tuple[Times, Times]:
    """`kappa = -t (1 - cos(a pi / 2))`, `S = t sin(a pi / 2)` (Flow-CPS, arXiv 2509.05952).

    That is `mean = (1 - t) x0 + t cos(a pi / 2) e`: the new state has as much noise as its time says. Level 1 throws
    the noise of before away. Marginals are not those of the ODE.
    """
    angle = level * math.pi / 2
    return -sigma_next * (1.0 - math.cos(angle)), sigma_next * math.sin(angle)


def dance(sigma: Times, sigma_next: Times, level: float) -> tuple[Times, Times]:
    """`kappa = -eta^2 D / (2 s)`, `S = eta sqrt(D)`, `D = s - t`: the same noise at every time (DanceGRPO)."""
    length = sigma - sigma_next
    return -(level**2) * length / (2.0 * sigma), level * np.sqrt(length)


class Kind(NamedTuple):
    """A way to make steps random."""

    coefficients: Callable[[Times, Times, float], tuple[Times, Times]]  # s, t, level -> kappa, S
    highest_level: float


KINDS = {"flow_grpo": Kind(flow_grpo, math.inf), "cps": Kind(cps, 1.0), "dance": Kind(dance, math.inf)}


def coefficients(
    kind: str, sigmas: Float[np.ndarray, " K1"], level: float
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """kappa and S of all K steps, float64; the last step is Euler's, since nothing would remove its noise.

    Args:
        kind: Of `KINDS`.
        sigmas: K1 = K + 1 decreasing times, from 1 to 0.
        level: a or eta, >= 0; 0 gives Euler's steps.
    """
    times = np.asarray(sigmas, np.float64)
    if len(times) == 2:  # the last step alone
        return np.zeros(1), np.zeros(1)
    kappa, std = KINDS[kind].coefficients(times[:-2].copy(), times[1:-1], level)
    return np.append(kappa, 0.0), np.append(std, 0.0)


def mean(
    v: Float[Array, "*b N C"],
    x: Float[Array, "*b N C"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    kappa: Float[Array, ""],
) -> Float[Array, "*b N C"]:
    """The mean of the next state, `x + (t - s) v + kappa (x + (1 - s) v)`, in the dtype of `x`.

    Args:
        v: The velocity at `x`.
        x: State at `sigma`, float32: where it is rounded to bfloat16, the likelihoods of old and new state differ.
        sigma: s, time now.
        sigma_next: t, time after the step.
        kappa: Of `coefficients`.
    """
    v = v.astype(x.dtype)
    noise = x + (1.0 - sigma).astype(x.dtype) * v
    return move(x, v, sigma, sigma_next) + kappa.astype(x.dtype) * noise


def step(
    v: Float[Array, "*b N C"],
    x: Float[Array, "*b N C"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    kappa: Float[Array, ""],
    std: Float[Array, ""],
    z: Float[Array, "*b N C"],
) -> Float[Array, "*b N C"]:
    """The next state, `mean + S z`; arguments as for `mean`, with S and a draw z of N(0, I)."""
    return mean(v, x, sigma, sigma_next, kappa) + std.astype(x.dtype) * z
