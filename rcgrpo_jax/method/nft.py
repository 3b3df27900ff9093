"""DiffusionNFT (arXiv 2509.16117) and CoCoEdit's penalty by region (arXiv 2602.14068): no likelihood, no trajectory.

A sample x_0 of the old velocity is noised again, `x = (1 - sigma) x_0 + sigma eps`, and a velocity is fitted to it:
good samples by `v+ = (1 - b) v_old + b v`, bad ones by `v- = (1 + b) v_old - b v`. An advantage says how good one is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcgrpo_jax.method.region import dilate

# Types 0, 1 and 2 of the published code: updates before the first decay, growth an update, largest decay.
DECAYS = {"none": (0, 0.0, 0.0), "ramp": (0, 0.001, 0.5), "delayed": (75, 0.0075, 0.999)}
LEAST_ERROR = 1e-5  # by which an error is divided at least; their code's


def optimality(advantages: Float[Array, "..."], clip: float) -> Float[Array, "..."]:
    """The probability that a sample is a good one, `r = clip(A / (2 c) + 1/2, 0, 1)` (their code).

    Args:
        advantages: A.
        clip: c, the largest |A|; published: 5.

    Returns:
        r in [0, 1]: 1/2 at A = 0.
    """
    return jnp.clip(advantages / (2.0 * clip) + 0.5, 0.0, 1.0)


def implied_data(
    v: Float[Array, "N C"],
    v_old: Float[Array, "N C"],
    x: Float[Array, "N C"],
    sigma: Float[Array, ""],
    beta: float,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """The samples that v+ and v- lead to: `x0+ = x - sigma v+` and `x0- = x - sigma v-`.

    Args:
        v: v_theta(x, sigma), with gradient.
        v_old: v_old(x, sigma), a constant.
        x: x_sigma.
        sigma: The time, in (0, 1].
        beta: b > 0, published 1 or 0.1: how far v+ and v- are from v_old.

    Returns:
        (x0+, x0-), float32.
    """
    v_old = jax.lax.stop_gradient(v_old)
    moved = beta * (v - v_old)
    return x - sigma * (v_old + moved), x - sigma * (v_old - moved)


def normalised_error(predicted: Float[Array, "N C"], data: Float[Array, "N C"]) -> Float[Array, ""]:
    """`L(u) = mean (x0_u - x_0)^2 / stop(mean |x0_u - x_0|)`: errors of all times count alike (their code)."""
    error = predicted - data
    return jnp.square(error).mean() / jax.lax.stop_gradient(jnp.maximum(jnp.abs(error).mean(), LEAST_ERROR))


def matching_loss(
    positive: Float[Array, "N C"],
    negative: Float[Array, "N C"],
    data: Float[Array, "N C"],
    r: Float[Array, ""],
    beta: float,
    clip: float,
) -> Float[Array, ""]:
    """`(c / b) [r L(v+) + (1 - r) L(v-)]` of one sample at one time (their Eq. 5).

    At v = v_old its gradient is A times that of `L(v)`, for every b and c: an advantage-weighted matching step. Away
    from it both terms hold v to v_old, also where A = 0; whoever teaches nothing is to be left out.

    Args:
        positive, negative: x0+ and x0-, of `implied_data`.
        data: x_0, the sample.
        r: Of `optimality` at A and c.
        beta: b.
        clip: c, the largest |A|.
    """
    return clip / beta * (r * normalised_error(positive, data) + (1.0 - r) * normalised_error(negative, data))


def decay(kind: str, updates: Int[Array, ""]) -> Float[Array, ""]:
    """d of `old <- d old + (1 - d) theta`, after so many optimizer updates (their code).

    Args:
        kind: A name of `DECAYS`. none: 0; ramp: `min(0.001 n, 0.5)`; delayed: 0 until 75, then `0.0075 (n - 75)`, at
            most 0.999.
        updates: n.
    """
    flat, growth, most = DECAYS[kind]
    return jnp.clip(growth * (updates - flat), 0.0, most)


def region_weights(
    region: Float[Array, " N"], grid: tuple[int, int], erosion: int, ring: float
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Weights of tokens in the background and in the edit, `W_bg = B + w ring` and `W_ed = E + w ring` (CoCoEdit).

    B and E are background and region, each eroded by a square. The picture's border erodes nothing. The ring is the
    rest: tokens near the mask's outline, which belong to neither for sure.

    Args:
        region: M in [0, 1], 1 where the edit belongs.
        grid: (rows, columns).
        erosion: Radius in tokens. CoCoEdit: 2 cells of the latents, which are 1 token.
        ring: w, weight of the ring; CoCoEdit: 0.2.

    Returns:
        (W_bg, W_ed), in [0, 1]. W_bg is 0 everywhere if the region is the whole picture.
    """
    background, edit = 1.0 - dilate(region, grid, erosion), 1.0 - dilate(1.0 - region, grid, erosion)
    rest = ring * (1.0 - background - edit)
    return background + rest, edit + rest


def weighted_distance(x: Float[Array, "N C"], y: Float[Array, "N C"], weights: Float[Array, " N"]) -> Float[Array, ""]:
    """`dist(x, y; W) = sum W (x - y)^2 / sum W` over tokens and channels (CoCoEdit); 0 where nothing has a weight."""
    return (weights * jnp.square(x - y).mean(-1)).sum() / jnp.maximum(weights.sum(), 1e-6)


def region_penalty(
    positive: Float[Array, "N C"],
    negative: Float[Array, "N C"],
    keep: Float[Array, "N C"],
    source: Float[Array, "N C"],
    weights: tuple[Float[Array, " N"], Float[Array, " N"]],
    r: Float[Array, ""],
    *,
    keep_weight: float,
    tolerance: float,
    change_weight: float = 0.0,
    margin: float = 0.0,
) -> Float[Array, ""]:
    """CoCoEdit's term beside the matching losses: good samples keep the background, bad ones have left the source.

    `r a relu(dist(x0+, keep; W_bg) - tolerance) + (1 - r) b relu(margin - dist(x0-, source; W_ed))`, a and b the
    weights. Since v- moves against v, the second part moves v *towards* the source inside the region (ours: derived).

    Args:
        positive, negative: x0+ and x0-, of `implied_data`.
        keep: What the background is held to: the source's latents (their paper), or the sample x_0 (their code).
        source: The source's latents.
        weights: (W_bg, W_ed), of `region_weights`.
        r: Of `optimality`.
        keep_weight: a; theirs 0.02.
        tolerance: Squared distance that costs nothing; theirs 0.001.
        change_weight: b; theirs 0.02.
        margin: Squared distance from which on the second part is 0; theirs 0.03.
    """
    background, edit = weights
    left = jnp.maximum(weighted_distance(positive, keep, background) - tolerance, 0.0)
    kept = jnp.maximum(margin - weighted_distance(negative, source, edit), 0.0)
    return r * keep_weight * left + (1.0 - r) * change_weight * kept
