"""Solvers of the flow's ODE: one step, and what a step must remember of the ones before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], Array]
"""`(x [..., N, C], sigma scalar) -> v [..., N, C]`: the condition `c` of the paper is already bound."""

VelocityWithAux = Callable[[Array, Array], tuple[Array, Any]]
"""The same, with arrays beside it that are kept of each step, such as attention masses."""


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


@runtime_checkable
class Solver(Protocol):
    """A method for `dx / dsigma = v(x, sigma)`; it may remember earlier steps, and evaluate v several times in one."""

    def init(self, x: Float[Array, "*b N C"], sigmas: Float[Array, " K1"]) -> Any:
        """What the first step remembers: a tree of arrays, whose shapes stay the same from step to step."""

    def step(
        self, velocity: VelocityWithAux, x: Float[Array, "*b N C"], sigma: Array, sigma_next: Array, memory: Any
    ) -> tuple[Float[Array, "*b N C"], Any, Any]:
        """The state at `sigma_next`, what the next step remembers, and the aux of the step's first evaluation."""


class Euler:
    """`euler_step` as a `Solver`: it remembers nothing."""

    def init(self, x, sigmas):
        return ()

    def step(self, velocity, x, sigma, sigma_next, memory):
        v, aux = velocity(x, sigma)
        return euler_step(lambda *_: v, x, sigma, sigma_next), memory, aux


EULER = Euler()
