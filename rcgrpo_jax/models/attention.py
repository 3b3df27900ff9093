"""Attention by name of its implementation."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float


def _xla(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {"xla": _xla}


def attend(
    q: Float[Array, "*b N H D"], k: Float[Array, "*b M H D"], v: Float[Array, "*b M H D"], implementation: str = "xla"
) -> Float[Array, "*b N H D"]:
    """Unmasked attention `softmax(q k^T / sqrt(D)) v` per head, softmax in fp32.

    Args:
        q, k, v: Queries, keys and values with any number of leading axes.
        implementation: A name of `IMPLEMENTATIONS`.

    Returns:
        The attended values, in the dtype of `q`.

    Raises:
        ValueError: If the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {sorted(IMPLEMENTATIONS)}")
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    return IMPLEMENTATIONS[implementation](*flat).reshape(q.shape)
