"""The FLUX autoencoder: pixels to normalised latents and back.

The network is diffusers' `AutoencoderKL` without quantisation convolutions. A leaf's path, joined with dots, is its
diffusers key: submodules are therefore named after it (`down_blocks_0/resnets_1/conv1`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rcgrpo_jax.models.config import VAEConfig


class _Layers(NamedTuple):
    """Constructors of the three kinds of layer, bound to the dtypes and to the number of groups."""

    conv: Callable[..., nn.Module]  # 3 x 3 with a border of one zero, unless told otherwise
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @classmethod
    def of(cls, config: VAEConfig, dtype: Any, param_dtype: Any) -> _Layers:
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)
        return cls(
            conv=partial(nn.Conv, kernel_size=(3, 3), padding=1, **dtypes),
            dense=partial(nn.Dense, **dtypes),
            # Statistics are fp32 whatever `dtype` is, over rows, columns and the channels of a group. E[x^2] - E[x]^2
            # would cancel where a group's mean is far from zero.
            norm=partial(
                nn.GroupNorm,
                num_groups=config.norm_num_groups,
                epsilon=1e-6,
                reduction_axes=(-3, -2, -1),
                use_fast_variance=False,
                **dtypes,
            ),
        )


class _ResnetBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1 x 1 convolution on `x` where the width changes."""

    layers: _Layers
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H W D"]:
        h = self.layers.conv(self.channels, name="conv1")(nn.silu(self.layers.norm(name="norm1")(x)))
        h = self.layers.conv(self.channels, name="conv2")(nn.silu(self.layers.norm(name="norm2")(h)))
        if x.shape[-1] != self.channels:
            x = self.layers.conv(self.channels, kernel_size=(1, 1), padding=0, name="conv_shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """Residual single-head attention over all cells; its logits are `(H W)^2` fp32 numbers an image."""

    layers: _Layers

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H W C"]:
        channels = x.shape[-1]
        h = self.layers.norm(name="group_norm")(x).reshape(-1, x.shape[-3] * x.shape[-2], 1, channels)
        q, k, v = (self.layers.dense(channels, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return x + self.layers.dense(channels, name="to_out_0")(h).reshape(x.shape)


class _MidBlock(nn.Module):
    """A residual block, attention (if the configuration has it) and a residual block at the coarsest grid."""

    layers: _Layers
    attention: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H W C"]:
        x = _ResnetBlock(self.layers, x.shape[-1], name="resnets_0")(x)
        if self.attention:
            x = _Attention(self.layers, name="attentions_0")(x)
        return _ResnetBlock(self.layers, x.shape[-1], name="resnets_1")(x)


class _Downsample(nn.Module):
    """Halves the grid by a strided convolution, padded below and on the right only."""

    layers: _Layers

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H//2 W//2 C"]:
        return self.layers.conv(x.shape[-1], strides=2, padding=((0, 1), (0, 1)), name="conv")(x)


class _Upsample(nn.Module):
    """Doubles the grid by repeating every cell, then a convolution."""

    layers: _Layers

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... 2*H 2*W C"]:
        return self.layers.conv(x.shape[-1], name="conv")(x.repeat(2, axis=-3).repeat(2, axis=-2))


class _Stage(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (`resample` is its name, or None for neither)."""

    layers: _Layers
    channels: int
    depth: int
    resample: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H2 W2 D"]:
        for i in range(self.depth):
            x = _ResnetBlock(self.layers, self.channels, name=f"resnets_{i}")(x)
        if self.resample == "downsamplers_0":
            x = _Downsample(self.layers, name=self.resample)(x)
        elif self.resample == "upsamplers_0":
            x = _Upsample(self.layers, name=self.resample)(x)
        return x


class _Encoder(nn.Module):
    """Pixels to the mean and log-variance of the latents' posterior, on the channel axis in that order."""

    config: VAEConfig
    layers: _Layers

    @nn.compact
    def __call__(self, pixels: Float[Array, "... H W 3"]) -> Float[Array, "... h w D"]:
        config, widths = self.config, self.config.block_out_channels
        x = self.layers.conv(widths[0], name="conv_in")(pixels)
        for i, width in enumerate(widths):
            resample = "downsamplers_0" if i + 1 < len(widths) else None
            x = _Stage(self.layers, width, config.layers_per_block, resample, name=f"down_blocks_{i}")(x)
        x = _MidBlock(self.layers, config.mid_block_add_attention, name="mid_block")(x)
        x = nn.silu(self.layers.norm(name="conv_norm_out")(x))
        return self.layers.conv(2 * config.latent_channels, name="conv_out")(x)


class _Decoder(nn.Module):
    """Latents to pixels: the encoder's stages in reverse, each one residual block deeper."""

    config: VAEConfig
    layers: _Layers

    @nn.compact
    def __call__(self, latents: Float[Array, "... h w C"]) -> Float[Array, "... H W 3"]:
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = self.layers.conv(widths[0], name="conv_in")(latents)
        x = _MidBlock(self.layers, config.mid_block_add_attention, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = "upsamplers_0" if i + 1 < len(widths) else None
            x = _Stage(self.layers, width, config.layers_per_block + 1, resample, name=f"up_blocks_{i}")(x)
        x = nn.silu(self.layers.norm(name="conv_norm_out")(x))
        return self.layers.conv(config.out_channels, name="conv_out")(x)


class VAE(nn.Module):
    """The autoencoder, used as `vae.apply(params, x, method="encode")` or `"decode"`.

    Attributes:
        config: Widths and depths, and the shift and scale of the latents.
        dtype: The dtype of activations and results; norms and softmax are computed in fp32 always.
        param_dtype: The dtype of the parameters.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        layers = _Layers.of(self.config, self.dtype, self.param_dtype)
        self.encoder = _Encoder(self.config, layers)
        self.decoder = _Decoder(self.config, layers)

    def __call__(self, pixels: Float[Array, "... H W 3"]) -> Float[Array, "... H W 3"]:
        """Reconstructs pixels; `init` goes through here, so that it creates the parameters of both halves."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: Float[Array, "... H W 3"]) -> Float[Array, "... h w C"]:
        """The mode of the posterior, normalised: `z = (mean - shift_factor) * scaling_factor`.

        Args:
            pixels: `[..., H, W, 3]` in [-1, 1]; H and W are multiples of `config.downscale`.

        Returns:
            `[..., H / downscale, W / downscale, latent_channels]` in `dtype`, about unit variance on photographs.
        """
        return self.normalise(self.moments(pixels)[0])

    def normalise(self, raw: Float[Array, "... h w C"]) -> Float[Array, "... h w C"]:
        """`(raw - shift_factor) * scaling_factor`."""
        return (raw - self.config.shift_factor) * self.config.scaling_factor

    def moments(self, pixels: Float[Array, "... H W 3"]) -> tuple[Float[Array, "... h w C"], Float[Array, "... h w C"]]:
        """Mean and log-variance of the posterior, not normalised; what pre-training samples from."""
        mean, log_variance = jnp.split(self.encoder(pixels), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "... h w C"]) -> Float[Array, "... H W 3"]:
        """Pixels of normalised latents, `decoder(z / scaling_factor + shift_factor)`.

        Args:
            latents: `[..., h, w, latent_channels]`, normalised as `encode` leaves them.

        Returns:
            `[..., h * downscale, w * downscale, 3]` in `dtype`, nominally in [-1, 1] but not clipped.
        """
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)
