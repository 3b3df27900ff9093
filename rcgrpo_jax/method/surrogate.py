"""The surrogate policy: a softmax over the candidates by their distance to the anchor (Eq. 7, 13-15).

All distances are sum_n W_n |x_n - y_n|^2 with a weight W_n for each token; they differ in how much a token of the edit
region counts against one of the background. That is what matters: at the first update after a rollout the advantages,
which sum to zero, cancel the softmax's normaliser, and the objective's gradient is that of <sum_i A_i W x_i, xbar> / G.
(Not so with the source among them: its advantage comes on top, and the normaliser pushes away from the others.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Distance = Callable[[Float[Array, "... N C"], Float[Array, "... N C"]], Float[Array, "..."]]


def _token_distances(x: Float[Array, "... N C"], y: Float[Array, "... N C"]) -> Float[Array, "... N"]:
    """|x_n - y_n|^2 of each token, in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)


def _weighted_distance(
    x: Float[Array, "... N C"], y: Float[Array, "... N C"], weights: Float[Array, " N"]
) -> Float[Array, "..."]:
    """sum_n W_n |x_n - y_n|^2."""
    squares = _token_distances(x, y)
    # Not a dot product: by default accelerators round its operands below float32, too coarse for a clip of 1e-4.
    return jnp.sum(squares * jnp.broadcast_to(weights, squares.shape), axis=-1)


def squared_distance(x: Float[Array, "... N C"], y: Float[Array, "... N C"]) -> Float[Array, "..."]:
    """The plain sum of squares, d^2 = |x - y|^2 (Eq. 7).

    Args:
        x: [..., N, C] states.
        y: The same, or a shape of the same rank that broadcasts.

    Returns:
        [...] float32, >= 0.
    """
    return jnp.sum(_token_distances(x, y), axis=-1)


def mean_distance(x: Float[Array, "... N C"], y: Float[Array, "... N C"]) -> Float[Array, "..."]:
    """The mean square of an element, d^2 = |x - y|^2 / (N C): `squared_distance` at a size-free temperature.

    Args:
        x: [..., N, C] states.
        y: The same, or a shape of the same rank that broadcasts.

    Returns:
        [...] float32, >= 0.
    """
    return squared_distance(x, y) / (x.shape[-2] * x.shape[-1])


def region_distance(
    x: Float[Array, "... N C"],
    y: Float[Array, "... N C"],
    region: Float[Array, " N"],
    tau_edit: float,
    tau_base: float,
) -> Float[Array, "..."]:
    """The region-normalised distance, d^2 = mean_{M} |x - y|^2 / tau_edit^2 + mean_{1-M} |x - y|^2 / tau_base^2.

    Means run over the tokens and channels of each region, so a small region weighs as much as a large background. This
    form of the paper's Eq. B.3 is ours: its appendix is not public. An empty region contributes nothing.

    Args:
        x: [..., N, C] states.
        y: The same, or a shape of the same rank that broadcasts.
        region: M, [N] in [0, 1].
        tau_edit: Bandwidth of the edit region, > 0.
        tau_base: Bandwidth of the background, > 0.

    Returns:
        [...] float32, >= 0 and finite, with a finite gradient, for any region.
    """

    def share(part: Float[Array, " N"]) -> Float[Array, " N"]:
        size = jnp.sum(part)
        return part / jnp.where(size > 0, size, 1.0)

    weights = share(region) / tau_edit**2 + share(1.0 - region) / tau_base**2
    return _weighted_distance(x, y, weights / x.shape[-1])


def tau_distance(
    x: Float[Array, "... N C"],
    y: Float[Array, "... N C"],
    region: Float[Array, " N"],
    tau_edit: float,
    tau_base: float,
) -> Float[Array, "..."]:
    """The sum of squares under the bandwidths, d^2 = sum (M / tau_edit^2 + (1 - M) / tau_base^2) |x - y|^2 (ours).

    Unlike `region_distance` it ignores the regions' sizes: a token's weight depends on its own region value alone.

    Args:
        x: [..., N, C] states.
        y: The same, or a shape of the same rank that broadcasts.
        region: M, [N] in [0, 1].
        tau_edit: Bandwidth of the edit region, > 0.
        tau_base: Bandwidth of the background, > 0.

    Returns:
        [...] float32, >= 0.
    """
    return _weighted_distance(x, y, region / tau_edit**2 + (1.0 - region) / tau_base**2)


def distance_function(name: str, region: Float[Array, " N"], tau_edit: float, tau_base: float) -> Distance:
    """The distance called `name` as a function of two states.

    Args:
        name: 'l2', 'mean', 'region' or 'tau'.
        region: M, [N] in [0, 1]; 'l2' and 'mean' do not look at it, nor at the bandwidths.
        tau_edit: Bandwidth of the edit region, > 0.
        tau_base: Bandwidth of the background, > 0.

    Returns:
        (x [..., N, C], y [..., N, C]) -> [...] float32.

    Raises:
        ValueError: There is no such distance.
    """
    match name:
        case "l2":
            return squared_distance
        case "mean":
            return mean_distance
        case "region":
            return partial(region_distance, region=region, tau_edit=tau_edit, tau_base=tau_base)
        case "tau":
            return partial(tau_distance, region=region, tau_edit=tau_edit, tau_base=tau_base)
    raise ValueError(f"distance {name!r} is not one of 'l2', 'mean', 'region', 'tau'")


def log_policy(
    distances: Float[Array, "... G"], temperature: float | Float[Array, "..."] = 1.0
) -> Float[Array, "... G"]:
    """The log-probability of each candidate, log pi(i) = log softmax_i(-d_i^2 / 2 / temperature) (Eq. 7, 14).

    Args:
        distances: d^2, [..., G], >= 0.
        temperature: One number, or one for each group [...]; > 0. The paper's is 1.

    Returns:
        [..., G] log-probabilities, <= 0; their exponentials sum to one over G.
    """
    temperature = jnp.broadcast_to(temperature, distances.shape[:-1])[..., None]
    return jax.nn.log_softmax(-0.5 * distances / temperature, axis=-1)


def anchor_log_policy(
    anchor: Float[Array, "... N C"],
    candidates: Float[Array, "... G N C"],
    distance: Distance,
    temperature: float | Float[Array, "..."] = 1.0,
) -> Float[Array, "... G"]:
    """log pi_theta(i | s, k): the policy seen from an anchor, the only path that carries gradient (Eq. 13, 14).

    Args:
        anchor: xbar_s^(k), [..., N, C], the anchor's state under theta (or theta_old for the denominator of Eq. 15).
        candidates: x_s^(i), [..., G, N, C], the stored states of the rollout; detached here.
        distance: d^2, for example from `distance_function`.
        temperature: As in `log_policy`.

    Returns:
        [..., G] log-probabilities.
    """
    return log_policy(distance(jax.lax.stop_gradient(candidates), anchor[..., None, :, :]), temperature)


@jax.custom_jvp
def log_ratio_to_itself(log_pi: Float[Array, "... G"]) -> Float[Array, "... G"]:
    """log rho at theta = theta_old (Eq. 15): exactly zero, with the gradient of log pi.

    A compiler may compute the two sides of log pi - stop_gradient(log pi) apart: they then differ by their rounding.

    Args:
        log_pi: From `log_policy`.

    Returns:
        Zeros of the same shape.
    """
    return jnp.zeros_like(log_pi)


@log_ratio_to_itself.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jnp.zeros_like(primals[0]), tangents[0]


def calibrated_temperature(
    distances: Float[Array, "... G"], target_entropy: float | Float[Array, "..."]
) -> Float[Array, "..."]:
    """The temperature at which the policy has a wanted entropy (ours).

    The entropy of a softmax grows with its temperature, so bisection in log temperature finds it. The bracket is
    relative to the spread of the distances: their scale does not matter.

    Args:
        distances: d^2, [..., G].
        target_entropy: Wanted entropy in nats, between 0 and log G. Outside the reach of these distances (all equal, or
            ties at the minimum) the result is the nearest end of the bracket.

    Returns:
        [...] float32, > 0, constant for differentiation.
    """
    distances = jax.lax.stop_gradient(distances)
    spread = jnp.max(distances, axis=-1) - jnp.min(distances, axis=-1)
    unit = jnp.where(spread > 0, spread, 1.0)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        log_pi = log_policy(distances, unit * jnp.exp(middle))
        sharper = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1) < target_entropy
        return jnp.where(sharper, middle, low), jnp.where(sharper, high, middle)

    # e^-14 parts distances that differ by a millionth of the spread, e^14 makes all alike; 32 halvings reach float32.
    low, high = jax.lax.fori_loop(0, 32, halve, (jnp.full_like(unit, -14.0), jnp.full_like(unit, 14.0)))
    return unit * jnp.exp((low + high) / 2)


def source_candidate(
    before: Float[Array, "... N C"],
    anchor: Float[Array, "... N C"],
    shrink: Float[Array, "..."],
    source: Float[Array, "N C"],
    region: Float[Array, " N"],
) -> Float[Array, "... N C"]:
    """A candidate that keeps the source, y = M xbar + (1 - M) (x_src + sigma' / sigma (x - x_src)) (ours).

    It joins the policy and Eq. 5 as candidate G + 1, with its own advantage and a ratio clipped like all others. Each
    term of the plain mean still counts 1 / G: the source takes nothing from the others.
    Outside the region it is where the straight line from the anchor's last state x to the source is after the step;
    inside it is the anchor itself, so that no distance sees the region.

    Args:
        before: x, [..., N, C], the anchor's state before the step, at sigma.
        anchor: xbar, [..., N, C], its state after the step, at sigma'.
        shrink: sigma' / sigma, [...] in [0, 1).
        source: x_src, [N, C], the source's latents.
        region: M, [N] in [0, 1].

    Returns:
        [..., N, C], a constant to gradients.
    """
    source = jnp.broadcast_to(source, before.shape)
    straight = source + shrink[..., None, None] * (before - source)
    inside = jnp.broadcast_to(region[:, None], before.shape)
    return jax.lax.stop_gradient(inside * anchor + (1.0 - inside) * straight)
