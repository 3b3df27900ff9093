"""A frozen base in few bits: kernels of the transformer's blocks as int8 by output channel, or as 4-bit NormalFloat.

A quantised kernel is a leaf of its own kind in the parameter tree; the linear layer that finds one takes it back to
the compute dtype where it multiplies, a block at a time. The base is never trained: gradients pass through it to the
activations and the adapter, as in QLoRA (Dettmers et al. 2023).
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8, UInt8

NONE = "none"
QUANTIZATIONS = (NONE, "int8", "nf4")
BLOCK = 64  # successive inputs of an output channel that share a scale in nf4, as in QLoRA
# 99.4 % of FLUX's parameters; embeddings, the last layer, biases and norms keep their dtype.
_KERNELS = re.compile(r"(single_)?transformer_blocks/.*/kernel")


def _normal_float() -> tuple[float, ...]:
    """The 16 values of NF4 in rising order: quantiles of N(0, 1), eight above zero and seven below, over the largest.

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32 (QLoRA, Section 3; rounded as in its code).
    """
    above, below = ([NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, n + 1)[:-1]] for n in (8, 7))
    return tuple(x / above[0] for x in [*(-x for x in below), 0.0, *reversed(above)])


NF4 = _normal_float()


@struct.dataclass
class QuantizedKernel:
    """A kernel `W [*b, in, out]`: the value of each code times the scale of its group of successive inputs."""

    codes: Int8[Array, "*b in out"] | UInt8[Array, "*b in/2 out"]  # int8; nf4, two codes a byte
    scale: Float[Array, "*b groups out"]  # int8: float32, one group; nf4: bfloat16, in / 64 groups

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        *stack, rows, fan_out = self.codes.shape
        return *stack, rows if self.codes.dtype == jnp.int8 else 2 * rows, fan_out


def is_quantized(path: tuple[str, ...], quantization: str) -> bool:
    """Whether a parameter of the transformer is kept in few bits."""
    return quantization != NONE and _KERNELS.fullmatch("/".join(path)) is not None


def quantize(kernel: Float[Array, "*b in out"], quantization: str) -> QuantizedKernel:
    """The nearest codes under scales that hold the largest magnitude of each group.

    int8: `round(127 W / absmax)`, one group an output channel; off by at most half a step, `absmax / 254`.
    nf4: the nearest of 16 values to `W / absmax`, groups of 64 inputs (the largest divisor of both, where 64 does not
    divide the inputs); in a group, the first half's codes are the low bits of the bytes and the second half's the high.

    Args:
        kernel: `W`, any float dtype.
        quantization: `int8` or `nf4`.
    """
    *stack, fan_in, fan_out = kernel.shape
    size = fan_in if quantization == "int8" else math.gcd(fan_in, BLOCK)
    groups = kernel.astype(jnp.float32).reshape(*stack, fan_in // size, size, fan_out)
    largest = jnp.maximum(jnp.abs(groups).max(-2, keepdims=True), 1e-30)  # zeros stay zeros
    if quantization == "int8":
        scale = largest / 127
        codes = jnp.round(groups / scale).astype(jnp.int8)
    else:
        scale = largest.astype(jnp.bfloat16)
        below = (groups / scale > (low + high) / 2 for low, high in pairwise(NF4))
        first, second = jnp.split(sum(below).astype(jnp.uint8), 2, axis=-2)
        codes = first | second << 4
    return QuantizedKernel(codes.reshape(*stack, -1, fan_out), scale.squeeze(-2))


def dequantize(kernel: QuantizedKernel, dtype: Any) -> Float[Array, "*b in out"]:
    """`W` in the compute dtype, rounded once. Element-wise, so that the compiler can fuse it into the product."""
    *stack, groups, fan_out = kernel.scale.shape
    codes = kernel.codes.reshape(*stack, groups, -1, fan_out)
    if codes.dtype == jnp.int8:
        values = codes.astype(jnp.float32)
    else:
        values = _look_up(jnp.concatenate([codes & 15, codes >> 4], axis=-2))
    return (values * kernel.scale[..., None, :].astype(jnp.float32)).astype(dtype).reshape(kernel.shape)


def _look_up(codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """`NF4[codes]` by halving the table bit by bit: 15 selections, where an indexed read is slow on a TPU."""
    values = NF4
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
