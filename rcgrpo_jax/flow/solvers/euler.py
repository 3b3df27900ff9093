"""Euler's method, the paper's."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.flow.solvers.base import Velocity, move, scan_steps


def euler_step(
    velocity: Velocity, x: Float[Array, "*b N C"], sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> Float[Array, "*b N C"]:
    """The state at `sigma_next`: `x + (sigma_next - sigma) v(x, sigma)` (Eq. 2); first-order accurate.

    Args:
        velocity: `v_theta(., ., c)`; the flow's `noise - data`.
        x: State at `sigma`, float32.
        sigma: Time now, in [0, 1]; 1 is noise.
        sigma_next: Time after the step; lower than `sigma` when sampling.

    Returns:
        State at `sigma_next`, in the dtype of `x`.
    """
    return x + (sigma_next - sigma).astype(x.dtype) * velocity(x, sigma).astype(x.dtype)


class Euler:
    """`euler_step` after `euler_step`. The times may be traced."""

    least_steps = 1

    def evaluations(self, num_steps):
        return [1] * num_steps

    def integrate(self, velocity, x, sigmas):
        def step(x, memory, sigma, sigma_next):
            v, aux = velocity(x, sigma)
            return move(x, v, sigma, sigma_next), memory, aux

        return scan_steps(step, x, (), sigmas)


EULER = Euler()
