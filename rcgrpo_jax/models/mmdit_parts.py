"""Parts of the MMDiT: embeddings of scalars, norms, modulation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import Linear


def sinusoid(x: Float[Array, "*b"], dim: int = 256) -> Float[Array, "*b dim"]:
    """`[cos(x f), sin(x f)]` with `f = 10000^(-i / (dim / 2))`, fp32 (FLUX)."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    arguments = x.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * x.ndim + (-1,))
    return jnp.concatenate([jnp.cos(arguments), jnp.sin(arguments)], axis=-1)


def thousandfold(x: Float[Array, "*b"], dtype: Any) -> Float[Array, "*b"]:
    """`1000 x` in fp32, `x` and the product rounded to `dtype` as the references round them.

    A plain cast is not enough: XLA drops one that is cast back, and an angle of hundreds of radians would come out off.
    """
    info = jnp.finfo(dtype)

    def rounded(value):
        return jax.lax.reduce_precision(value, info.nexp, info.nmant)

    return rounded(1000 * rounded(x.astype(jnp.float32)))


def layer_norm(x: Float[Array, "*b D"], epsilon: float = 1e-6) -> Float[Array, "*b D"]:
    """Layer normalisation without affine parameters, in fp32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)


def modulate(x: Float[Array, "*b N D"], shift: Float[Array, "*b D"], scale: Float[Array, "*b D"]) -> Array:
    return layer_norm(x) * (1 + scale[..., None, :]) + shift[..., None, :]


class Part(nn.Module):
    """What all submodules share: sizes, dtypes, and short ways to make parts with the same."""

    config: MMDiTConfig
    dtype: Any
    param_dtype: Any

    def part(self, module: type[Part], name: str, *args: Any) -> Part:
        return module(self.config, self.dtype, self.param_dtype, *args, name=name)

    def linear(self, features: int, name: str) -> Linear:
        return Linear(features, self.dtype, self.param_dtype, name=name)


class RMSNorm(Part):
    """RMS normalisation of each head's query or key, in fp32 and cast back."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b N H D"]) -> Float[Array, "*b N H D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
        return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Modulation(Part):
    """`chunks` vectors of width D from the time-text vector; their order is diffusers'."""

    chunks: int

    @nn.compact
    def __call__(self, vec: Float[Array, "*b D"]) -> list[Float[Array, "*b D"]]:
        return jnp.split(self.linear(self.chunks * self.config.width, "linear")(nn.silu(vec)), self.chunks, axis=-1)


class Embedder(Part):
    """Two linear layers with a SiLU between."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b F"]) -> Float[Array, "*b D"]:
        return self.linear(self.config.width, "linear_2")(nn.silu(self.linear(self.config.width, "linear_1")(x)))
