"""What a solver of the flow's ODE gives to a rollout, and the loop over steps that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], Array]
"""`(x [..., N, C], sigma scalar) -> v [..., N, C]`: the condition `c` of the paper is already bound."""

VelocityWithAux = Callable[[Array, Array], tuple[Array, Any]]
"""The same, with arrays beside it that are kept of each step, such as attention masses."""


@runtime_checkable
class Solver(Protocol):
    """A method for `dx / dsigma = v(x, sigma)`. It takes all steps of a rollout, and says what they cost."""

    least_steps: int
    """With fewer steps it is Euler's method."""

    def evaluations(self, num_steps: int) -> list[int]:
        """How often each of K steps evaluates v."""

    def integrate(
        self, velocity: VelocityWithAux, x: Float[Array, "*b N C"], sigmas: Float[np.ndarray, " K1"]
    ) -> tuple[Float[Array, "K1 *b N C"], Any]:
        """All states of a rollout, and the aux of the first evaluation of each step, `[K, ...]`."""


def move(
    x: Float[Array, "*b N C"], v: Float[Array, "*b N C"], sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> Float[Array, "*b N C"]:
    """`x + (sigma_next - sigma) v`, in the dtype of `x`."""
    return x + (sigma_next - sigma).astype(x.dtype) * v.astype(x.dtype)


def scan_steps(
    step: Callable[..., tuple[Array, Any, Any]],
    x: Float[Array, "*b N C"],
    memory: Any,
    sigmas: Float[Array | np.ndarray, " K1"],
    *numbers: Float[np.ndarray, " K"],
) -> tuple[Float[Array, "K1 *b N C"], Any]:
    """Takes one step after another.

    Args:
        step: `(x, memory, sigma, sigma_next, *numbers) -> (x, memory, aux)`.
        x: The state at `sigmas[0]`.
        memory: What the first step knows of those before it: a tree of arrays, of the same shapes from step to step.
        sigmas: The K + 1 times.
        *numbers: Others that a step takes.

    Returns:
        The K + 1 states, and the aux of the K steps.
    """

    def body(carry: tuple[Array, Any], of_step: tuple[Array, ...]) -> tuple[tuple[Array, Any], tuple]:
        x, memory, aux = step(*carry, *of_step)
        return (x, memory), (x, aux)

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    sigmas, *numbers = (jnp.asarray(array, dtype) for array in (sigmas, *numbers))
    _, (states, aux) = jax.lax.scan(body, (x, memory), (sigmas[:-1], sigmas[1:], *numbers))
    return jnp.concatenate([x[None], states]), aux
