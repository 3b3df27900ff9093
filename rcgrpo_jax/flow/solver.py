"""One step of the deterministic ODE solver."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], Array]
"""`(x [..., N, C], sigma scalar) -> v [..., N, C]`: the condition `c` of the paper is already bound."""


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
