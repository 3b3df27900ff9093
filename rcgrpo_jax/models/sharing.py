"""One pass over candidates that share the tokens outside a set (ours).

Candidate 0 is computed in full. Of the others only the tokens of the set are, and in every block all their other tokens
have the keys and values of candidate 0. Tokens are packed into one sequence, the first candidate's and then the set of
each other candidate, so that all but attention is done to them as to any sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rcgrpo_jax.models.attention import attend


class Layout(NamedTuple):
    """Where the tokens of a group are in the packed sequence, S = L + (G - 1) R."""

    candidate: Int[Array, " S"]  # whose token it is
    position: Int[Array, " S"]  # which of its L tokens
    row: Int[Array, "G L"]  # the packed token that stands for each token of each candidate

    @property
    def others(self) -> tuple[int, int]:
        """(G - 1, R)."""
        group, length = self.row.shape
        return group - 1, (len(self.position) - length) // (group - 1)


def layout(own: Bool[Array, " L"], group: int, size: int) -> Layout:
    """The packed sequence of a group.

    Args:
        own: The tokens that every candidate has of its own; at most R of them.
        group: G, two or more.
        size: R, for how many there is room. Room that is left holds copies of token 0, which nothing reads.
    """
    length = len(own)
    every, (chosen,) = jnp.arange(length), jnp.nonzero(own, size=size, fill_value=0)
    others = jnp.arange(group - 1)
    row = length + others[:, None] * size + (jnp.cumsum(own) - 1)[None]
    return Layout(
        candidate=jnp.concatenate([jnp.zeros_like(every), jnp.repeat(others + 1, size)]),
        position=jnp.concatenate([every, jnp.tile(chosen, group - 1)]),
        row=jnp.concatenate([every[None], jnp.where(own[None], row, every[None])]),
    )


def unpack(packed: Float[Array, "S ..."], of: Layout) -> Float[Array, "G L ..."]:
    """All tokens of all candidates."""
    return packed[of.row]


def attend_packed(
    q: Float[Array, "S H D"],
    k: Float[Array, "G L H D"],
    v: Float[Array, "G L H D"],
    of: Layout,
    implementation: str,
) -> Float[Array, "S H D"]:
    """Every candidate's own tokens look at all of that candidate's.

    Args:
        q: Packed.
        k, v: Of all tokens.
        of: The sequence.
        implementation: A name of `attention.IMPLEMENTATIONS`.
    """
    length = of.row.shape[1]
    first = attend(q[:length], k[0], v[0], implementation)
    others = attend(q[length:].reshape(*of.others, *q.shape[1:]), k[1:], v[1:], implementation)
    return jnp.concatenate([first, others.reshape(-1, *q.shape[1:])])
