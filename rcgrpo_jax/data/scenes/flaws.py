"""Ways in which an edit goes wrong, painted on purpose: a weak editor that is to be post-trained learns from them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8

Picture = UInt8[np.ndarray, "S S 3"]


def ghost(source: Picture, target: Picture, mask: Bool[np.ndarray, "S S"], strength: float) -> Picture:
    """Leaves what the edit should have changed faintly there: `strength source + (1 - strength) target` in the mask."""
    return _blend(target, source.astype(np.float64), strength * mask)


def spill(target: Picture, distance: Float[np.ndarray, "S S"], rgb: Float[np.ndarray, "3"], strength: float) -> Picture:
    """Lets an object's colour bleed over its edge: mixed in with weight `strength exp(-distance / reach)` outside.

    Args:
        target: The clean edit.
        distance: From the object's edge, pixels, negative inside, where nothing changes.
        rgb: The colour, in [0, 255].
        strength: The weight at the edge, in [0, 1].

    Returns:
        The picture with a halo around the object; `reach` is a sixteenth of the side.
    """
    return _blend(target, rgb, strength * np.exp(-distance * 16 / len(target)) * (distance > 0))


def _blend(picture: Picture, other: Float[np.ndarray, "..."], weight: Float[np.ndarray, "S S"]) -> Picture:
    weight = weight[..., None]
    return np.rint(picture * (1 - weight) + other * weight).astype(np.uint8)
