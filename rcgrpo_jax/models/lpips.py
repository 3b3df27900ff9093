"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), with AlexNet, VGG16 or SqueezeNet 1.1.

Each of the three is a sequence of convolutions, the features after some of which are compared. A fire module of
SqueezeNet is two of them: its 1 x 1 "squeeze", and its 1 x 1 and 3 x 3 "expand" side by side as one of 3 x 3, the
kernels of the former padded with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 1, 1, 3)  # ImageNet's mean for pixels in [-1, 1]
_SCALE = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 1, 1, 3)


class Step(NamedTuple):
    """One convolution with its bias and ReLU."""

    kernel: tuple[int, int, int, int]  # h w in out
    stride: int = 1
    padding: int = 0  # of zeros, on every side
    pool: int = 0  # side of the windows of a maximum over every second pixel that comes first; 0: none
    compared: bool = True  # whether its features count


class Network(NamedTuple):
    """A trunk, and how its features are compared.

    Attributes:
        steps: Its convolutions.
        smallest_side: Pixels; of smaller pictures the last features are empty.
        ceil: Whether a last window that hangs over the border is pooled too.
        epsilon: Added to the squared length of a feature vector before it is made a unit vector.
    """

    steps: tuple[Step, ...]
    smallest_side: int
    ceil: bool = False
    epsilon: float = 0.0


def _fire(inputs: int, squeezed: int, expanded: int, pool: int = 0, compared: bool = True) -> tuple[Step, Step]:
    """A fire module: `squeezed` channels, and then `expanded` of 1 x 1 and as many of 3 x 3."""
    return (
        Step((1, 1, inputs, squeezed), pool=pool, compared=False),
        Step((3, 3, squeezed, 2 * expanded), padding=1, compared=compared),
    )


def _vgg(inputs: int, outputs: int, pool: int = 0, compared: bool = False) -> Step:
    return Step((3, 3, inputs, outputs), padding=1, pool=pool, compared=compared)


NETWORKS = {
    "alex": Network(
        (
            Step((11, 11, 3, 64), stride=4, padding=2),
            Step((5, 5, 64, 192), padding=2, pool=3),
            Step((3, 3, 192, 384), padding=1, pool=3),
            Step((3, 3, 384, 256), padding=1),
            Step((3, 3, 256, 256), padding=1),
        ),
        smallest_side=31,
    ),
    "vgg": Network(
        (
            _vgg(3, 64), _vgg(64, 64, compared=True),
            _vgg(64, 128, pool=2), _vgg(128, 128, compared=True),
            _vgg(128, 256, pool=2), _vgg(256, 256), _vgg(256, 256, compared=True),
            _vgg(256, 512, pool=2), _vgg(512, 512), _vgg(512, 512, compared=True),
            _vgg(512, 512, pool=2), _vgg(512, 512), _vgg(512, 512, compared=True),
        ),
        smallest_side=16,
    ),
    "squeeze": Network(
        (
            Step((3, 3, 3, 64), stride=2),
            *_fire(64, 16, 64, pool=3, compared=False), *_fire(128, 16, 64),
            *_fire(128, 32, 128, pool=3, compared=False), *_fire(256, 32, 128),
            *_fire(256, 48, 192, pool=3), *_fire(384, 48, 192), *_fire(384, 64, 256), *_fire(512, 64, 256),
        ),
        smallest_side=17,
        ceil=True,
        epsilon=1e-8,  # as torchmetrics has it, by which CompBench measures
    ),
}  # fmt: skip


class Layer(NamedTuple):
    """One convolution, and how much each of its channels counts; None where its features do not."""

    kernel: Float[Array, "h w in out"]
    bias: Float[Array, "1 1 1 out"]
    head: Float[Array, "1 1 1 out"] | None  # >= 0


def lpips(
    weights: tuple[Layer, ...], a: Float[Array, "P H W 3"], b: Float[Array, "P H W 3"], net: str = "alex"
) -> Float[Array, " P"]:  # fmt: skip
    """Computes `sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2` over the compared features l, each of unit length.

    Args:
        weights: Of that network, as `weights.lpips` reads them.
        a: Pictures in [0, 1]; sides of `smallest_side` of the network or more; smaller ones give NaN.
        b: The others.
        net: A key of `NETWORKS`.

    Returns:
        Distances >= 0, float32; 0 for equal pictures.
    """
    network, distance = NETWORKS[net], jnp.zeros(len(a))
    heads = [layer.head for layer, step in zip(weights, network.steps, strict=True) if step.compared]
    for head, x, y in zip(heads, _features(network, weights, a), _features(network, weights, b), strict=True):
        difference = _unit(x, network.epsilon) - _unit(y, network.epsilon)
        distance += jnp.mean(jnp.sum(head * difference**2, axis=-1), axis=(-2, -1))
    return distance


def _features(
    network: Network, weights: tuple[Layer, ...], pictures: Float[Array, "P H W 3"]
) -> list[Float[Array, "P h w c"]]:
    x, features = (2 * pictures - 1 - _SHIFT) / _SCALE, []
    for layer, step in zip(weights, network.steps, strict=True):
        if step.pool:
            x = _pool(x, step.pool, network.ceil)
        x = jax.lax.conv_general_dilated(
            x, layer.kernel, (step.stride, step.stride), [(step.padding, step.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",  # else a TPU would multiply in bfloat16
        )  # fmt: skip
        x = nn.relu(x + layer.bias)
        if step.compared:
            features.append(x)
    return features


def _pool(x: Float[Array, "P h w c"], window: int, ceil: bool) -> Float[Array, "P i j c"]:
    """The maximum of windows over every second pixel; what `ceil` adds lies right and below, and is minus infinity."""
    over = [(0, (length - window) % 2 if ceil else 0) for length in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (2, 2), over)


def _unit(x: Float[Array, "P h w c"], epsilon: float) -> Float[Array, "P h w c"]:
    return x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + epsilon) + 1e-10)
