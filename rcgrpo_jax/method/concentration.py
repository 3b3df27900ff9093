"""Attention concentration density (ACD): how much of the text's attention falls into the edit region (Eq. 16-18).

Equation 17 needs only two numbers for each text token: its attention mass inside the region and over all image tokens.
They are computed beside the model's own attention, a few text tokens at a time. No more than their part of the map ever
exists, and the model keeps its fused kernel, which never shows its map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TILE = 32  # text tokens at a time: at 1024 x 1024 in FLUX 24 heads x 32 x 4096 scores, 12 MiB


def _attention(q: Float[Array, "H D"], k_img: Float[Array, "N_img H D"], scale: float) -> Float[Array, "H N_img"]:
    """A_h(v, u) = softmax_u(scale q_v k_u) of one text token v, in float32."""
    scores = jnp.einsum("hd,uhd->hu", q, k_img, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scale * scores, axis=-1)


def masses(
    q_txt: Float[Array, "N_txt H D"],
    k_img: Float[Array, "N_img H D"],
    region: Float[Array, " N_img"],
    scale: float,
) -> tuple[Float[Array, " N_txt"], Float[Array, " N_txt"]]:
    """Each text token's attention inside the region and in all, sum_u A(v, u) M(u) and sum_u A(v, u) (Eq. 16, fused).

    A(v, u) is the mean over heads of the softmax over the image keys alone: the model's joint softmax, renormalised.

    Args:
        q_txt: Text queries as they enter the model's attention (after norm and rotary embedding), [N_txt, H, D].
        k_img: Image keys, likewise, [N_img, H, D].
        region: M, [N_img] in [0, 1].
        scale: Factor of the scores, 1 / sqrt(D) in FLUX.

    Returns:
        inside [N_txt] and total [N_txt], float32 in [0, 1]; total is 1 up to rounding. No gradient runs through them.
    """
    q_txt, k_img, region = jax.lax.stop_gradient((q_txt, k_img, region.astype(jnp.float32)))

    def one_token(q: Float[Array, "H D"]) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
        A = _attention(q, k_img, scale)
        return jnp.sum(A * region[None], axis=-1), jnp.sum(A, axis=-1)

    # The mean over heads comes last: a mesh that splits them adds up two numbers a token, once.
    inside, total = jax.lax.map(one_token, q_txt, batch_size=TILE)
    return jnp.mean(inside, axis=-1), jnp.mean(total, axis=-1)


def attention_map(
    q_txt: Float[Array, "N_txt H D"], k_img: Float[Array, "N_img H D"], scale: float
) -> Float[Array, " N_img"]:
    """The attention that each image token receives, a(u) = sum_v A(v, u) (Eq. 16).

    Args:
        q_txt: Text queries, [N_txt, H, D], as in `masses`.
        k_img: Image keys, [N_img, H, D].
        scale: Factor of the scores.

    Returns:
        a, [N_img] float32, summing to N_txt. No gradient runs through it.
    """
    q_txt, k_img = jax.lax.stop_gradient((q_txt, k_img))
    rows = jax.lax.map(lambda q: jnp.mean(_attention(q, k_img, scale), axis=0), q_txt, batch_size=TILE)
    return jnp.sum(rows, axis=0)


def _ratio_of_means(
    inside: Float[Array, "..."], total: Float[Array, "..."], region: Float[Array, " N_img"], eps: float
) -> Float[Array, "..."]:
    return (inside / (jnp.sum(region) + eps)) / (total / (region.shape[0] + eps))


def density(a: Float[Array, "... N_img"], region: Float[Array, " N_img"], eps: float = 1e-6) -> Float[Array, "..."]:
    """ACD = [sum_u a(u) M(u) / (|M| + eps)] / [sum_u a(u) / (N_img + eps)] (Eq. 17).

    Args:
        a: Attention received by each image token, [..., N_img].
        region: M, [N_img] in [0, 1]; |M| is its sum.
        eps: Keeps an empty region finite: its density is 0.

    Returns:
        [...]: 1 if attention is spread evenly, N_img / |M| if all of it lies inside.
    """
    return _ratio_of_means(jnp.sum(a * jnp.broadcast_to(region, a.shape), axis=-1), jnp.sum(a, axis=-1), region, eps)


def density_from_masses(
    inside: Float[Array, "... N_txt"],
    total: Float[Array, "... N_txt"],
    region: Float[Array, " N_img"],
    text_weights: Float[Array, " N_txt"] | None = None,
    eps: float = 1e-6,
) -> Float[Array, "..."]:
    """The same density (Eq. 17) from the output of `masses`, without the map.

    Args:
        inside: [..., N_txt] mass of each text token inside the region.
        total: [..., N_txt] mass of each text token over all image tokens.
        region: M, [N_img]: the region that `masses` was given; only its sum and length count here.
        text_weights: [N_txt] >= 0, not all zero: 1 for the tokens that count (say, the instruction's real ones) and 0
            for padding. None counts all.
        eps: As in `density`.

    Returns:
        [...], equal to `density(attention_map(...), region)` if every token counts.
    """
    if text_weights is not None:
        weights = jnp.broadcast_to(text_weights, inside.shape)
        inside, total = weights * inside, weights * total
    return _ratio_of_means(jnp.sum(inside, axis=-1), jnp.sum(total, axis=-1), region, eps)


def reward(densities: Float[Array, "... K L_sel"]) -> Float[Array, "..."]:
    """R_acd, the mean of the densities over the solver steps and the selected layers (Eq. 18).

    Args:
        densities: [..., K, L_sel].

    Returns:
        [...]: a scalar for one rollout.
    """
    return jnp.mean(densities, axis=(-2, -1))
