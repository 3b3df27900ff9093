"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), with AlexNet."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

# AlexNet's five convolutions: (stride, padding, whether a 3 x 3 maximum over every second pixel comes first).
_LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
KERNELS = ((11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 256), (3, 3, 256, 256))  # h w in out
SMALLEST_SIDE = 31  # pixels; of smaller pictures the last layers see nothing
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 1, 1, 3)  # ImageNet's mean for pixels in [-1, 1]
_SCALE = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 1, 1, 3)


class Layer(NamedTuple):
    """One convolution, and how much each of its channels counts."""

    kernel: Float[Array, "h w in out"]
    bias: Float[Array, "1 1 1 out"]
    head: Float[Array, "1 1 1 out"]  # >= 0


def lpips(
    weights: tuple[Layer, ...], a: Float[Array, "P H W 3"], b: Float[Array, "P H W 3"]
) -> Float[Array, " P"]:  # fmt: skip
    """Computes `sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2` over the features of five layers, each of unit length.

    Args:
        weights: As `weights.lpips.load_lpips` gives them.
        a: Pictures in [0, 1]; sides of `SMALLEST_SIDE` or more; smaller ones give NaN.
        b: The others.

    Returns:
        Distances >= 0, float32; 0 for equal pictures.
    """
    distance = jnp.zeros(len(a))
    for layer, x, y in zip(weights, _features(weights, a), _features(weights, b), strict=True):
        distance += jnp.mean(jnp.sum(layer.head * (_unit(x) - _unit(y)) ** 2, axis=-1), axis=(-2, -1))
    return distance


def _features(weights: tuple[Layer, ...], pictures: Float[Array, "P H W 3"]) -> list[Float[Array, "P h w c"]]:
    x, features = (2 * pictures - 1 - _SHIFT) / _SCALE, []
    for layer, (stride, padding, pooled) in zip(weights, _LAYERS, strict=True):
        x = nn.max_pool(x, (3, 3), (2, 2)) if pooled else x
        x = jax.lax.conv_general_dilated(
            x, layer.kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",  # else a TPU would multiply in bfloat16
        )  # fmt: skip
        x = nn.relu(x + layer.bias)
        features.append(x)
    return features


def _unit(x: Float[Array, "P h w c"]) -> Float[Array, "P h w c"]:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
