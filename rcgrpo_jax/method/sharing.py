"""Which tokens a group's candidates have of their own when they share the rest (ours).

Under RDP candidates start equal outside the edit region, and stay nearly so. Candidate 0 is computed in full, the
others at a set of tokens around the region. Their other tokens, background, text and source image, are candidate 0's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from rcgrpo_jax.method.region import dilate

SIXTEENTHS = 1, 2, 3, 4, 6  # of all image tokens: sizes R that programs are compiled for; more would save little


class Own(NamedTuple):
    """The tokens that every candidate of a group has of its own; all others are those of the group's first."""

    target: Bool[Array, " N"]
    reference: Bool[Array, " N"]  # of the source image
    size: int  # R, room for so many of both


def own_tokens(
    region: Float[Array, " N"], grid: tuple[int, int], grow: int, grow_reference: int
) -> tuple[Bool[Array, " N"], Bool[Array, " N"]]:
    """The tokens of target and source image that are computed for each candidate.

    Args:
        region: What the noise is perturbed in, in [0, 1]; tokens above 0 count.
        grid: (rows, columns).
        grow: Tokens by which the region grows on the target.
        grow_reference: The same on the source image; -1: none of its tokens.
    """
    target = dilate(region, grid, grow) > 0
    reference = dilate(region, grid, max(grow_reference, 0)) > 0
    return target, reference & (grow_reference >= 0)


def parts_of_group(num_prompts: int, num_devices: int) -> int:
    """Into how many parts a group is split, at least, so that P groups spread over the devices."""
    return num_devices // math.gcd(num_prompts, num_devices)


def choose_size(count: int, num_tokens: int) -> int:
    """R for so many tokens of N; 0 where none of `SIXTEENTHS` holds them, and candidates are computed in full.

    Args:
        count: Of the largest set of a batch, target's and reference's together.
        num_tokens: N, of one picture.
    """
    sizes = (math.ceil(2 * num_tokens * part / 16) for part in SIXTEENTHS)
    return next((size for size in sizes if size >= count), 0)
