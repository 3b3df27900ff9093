"""The editor as one thing: tokenize, encode, integrate, decode. What FluxKontextPipeline is to diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.flow import latents, rollout, schedule
from rcgrpo_jax.models.clip import CLIPTextEncoder
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.models.quantization import NONE
from rcgrpo_jax.models.t5 import T5Encoder
from rcgrpo_jax.models.vae import VAE
from rcgrpo_jax.weights.load import ModelFolder, ShardingOf, on_default_device
from rcgrpo_jax.weights.tokenizers import tokenize


def to_unit(pixels: UInt8[np.ndarray, "*b H W 3"]) -> Float[Array, "*b H W 3"]:
    """Pixels 0..255 to the VAE's range [-1, 1]."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0


def to_pixels(images: Float[Array, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """The VAE's range [-1, 1] to pixels 0..255, clamped and rounded as diffusers does.

    Raises:
        UserError: There is a NaN or an infinity, which no picture shows.
    """
    finite = np.asarray(jnp.isfinite(images).all(axis=(-3, -2, -1)))
    if not finite.all():
        raise UserError(
            f"{(~finite).sum()} of {finite.size} edited images are not finite; pictures were wanted.",
            "The weights, the LoRA or its scale, or the guidance are likely too large: try without the LoRA, with "
            "guidance 2.5, or with dtype float32.",
        )
    return np.asarray(jnp.round((jnp.clip(images.astype(jnp.float32), -1, 1) / 2 + 0.5) * 255)).astype(np.uint8)


@dataclass(frozen=True)
class TextEncoding:
    """What the transformer reads of the instructions."""

    text: Float[Array, "P N_txt D"]
    pooled: Float[Array, "P D_pool"]
    lengths: np.ndarray  # [P] real T5 tokens; the rest is padding, which FLUX attends to


class Editor:
    """A model folder, its networks loaded on first use.

    Args:
        folder: A diffusers folder or a converted directory.
        dtype: Compute and parameter dtype of all networks.
        max_text_tokens: Length that the T5 sequence is padded to; 0: the model's own, 512 in FLUX.1-Kontext-dev.
        sharding_of: Where parameters are placed.
        keep_text_encoders: Keep them after use. T5 alone is 8.9 GiB at full size.
        quantization: Of the transformer, a name of `models.quantization.QUANTIZATIONS`.
        **transformer_options: Fields of `MMDiT`: `remat`, `attention`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        dtype: Any = jnp.float32,
        max_text_tokens: int = 0,
        sharding_of: ShardingOf = on_default_device,
        keep_text_encoders: bool = True,
        quantization: str = NONE,
        **transformer_options: Any,
    ):
        self.folder = folder
        self.dtype = dtype
        self.max_text_tokens = max_text_tokens or folder.max_text_tokens
        self.keep_text_encoders = keep_text_encoders
        self.transformer = MMDiT(folder.config("transformer"), dtype=dtype, **transformer_options)
        self.vae = VAE(folder.config("vae"), dtype=dtype)
        self.quantization = quantization
        self._load = lambda name, quantization=NONE: folder.load(name, dtype, sharding_of, quantization)

    @cached_property
    def transformer_params(self) -> dict:
        return self._load("transformer", self.quantization)

    @cached_property
    def vae_params(self) -> dict:
        return self._load("vae")

    @cached_property
    def _text(self) -> tuple:
        tokenizers = self.folder.tokenizers()  # before gigabytes are read
        clip = CLIPTextEncoder(self.folder.config("text_encoder"), dtype=self.dtype)
        t5 = T5Encoder(self.folder.config("text_encoder_2"), dtype=self.dtype)
        params = {name: self._load(name) for name in ("text_encoder", "text_encoder_2")}
        return tokenizers, params, jax.jit(clip.apply), jax.jit(t5.apply)

    def load_encoders(self) -> None:
        """Loads what `encode_text` and `encode_image` use; all processes read a converted folder at once or none."""
        _ = self._text, self.vae_params

    def encode_text(self, instructions: Sequence[str]) -> TextEncoding:
        """T5 sequence and pooled CLIP vector of each instruction, in the compute dtype."""
        tokenizers, params, clip, t5 = self._text
        tokens = tokenize(tokenizers, instructions, self.max_text_tokens)
        pooled = clip({"params": params["text_encoder"]}, tokens.clip)
        text = t5({"params": params["text_encoder_2"]}, tokens.t5)
        if not self.keep_text_encoders:
            del self._text
        return TextEncoding(text.astype(self.dtype), pooled.astype(self.dtype), tokens.t5_lengths)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height x width` pixels."""
        return latents.token_grid(height, width, self.vae.config.downscale)

    def encode_image(self, pixels: UInt8[np.ndarray, "P H W 3"]) -> Float[Array, "P N C"]:
        """Packed, normalised latents (the mode, no sampling) of images, float32."""
        return _encode(self.vae, self.vae_params, to_unit(pixels))

    def decode(self, tokens: Float[Array, "P N C"], grid: tuple[int, int]) -> UInt8[np.ndarray, "P H W 3"]:
        """Pixels of packed latents."""
        return to_pixels(decode(self.vae, self.vae_params, tokens, grid))

    def sigmas(self, num_steps: int, num_image_tokens: int) -> Float[np.ndarray, " K+1"]:
        """The folder's schedule."""
        return schedule.sigmas(num_steps, num_image_tokens, **self.folder.schedule_options())

    def edit(
        self,
        images: UInt8[np.ndarray, "P H W 3"],
        instructions: Sequence[str],
        noise: Float[Array, "P N C"],
        num_steps: int = 28,
        guidance: float = 2.5,
        lora: dict | None = None,
    ) -> UInt8[np.ndarray, "P H W 3"]:
        """Edits images by deterministic integration from the given noise, as FluxKontextPipeline does.

        Args:
            images: Sources; sides are multiples of a token's (16 pixels). The edit has the same size.
            instructions: One for each image.
            noise: Packed initial noise, float32.
            num_steps: K.
            guidance: Guidance scale of the distilled model.
            lora: Adapter with its scale folded in (`models.lora.scale_adapter`).

        Returns:
            The edited images.
        """
        grid = self.grid(*images.shape[1:3])
        encoding = self.encode_text(instructions)
        reference = self.encode_image(images)
        condition = Condition(encoding.text, encoding.pooled, reference, jnp.full(len(images), guidance, jnp.float32))
        sigmas = self.sigmas(num_steps, grid[0] * grid[1])
        variables = {"params": self.transformer_params, "lora": lora or {}}
        return self.decode(_integrate(self.transformer, variables, jnp.asarray(noise), condition, sigmas, grid), grid)


# Compiled by module and not by editor, so that a program does not keep an editor's parameters alive.


@partial(jax.jit, static_argnums=0)
def _encode(vae: VAE, params: dict, images: Float[Array, "P H W 3"]) -> Float[Array, "P N C"]:
    return latents.pack(vae.apply({"params": params}, images, method="encode")).astype(jnp.float32)


@partial(jax.jit, static_argnums=(0, 5))
def _integrate(
    transformer: MMDiT, variables: dict, noise: Array, condition: Condition, sigmas: Array, grid: tuple[int, int]
) -> Float[Array, "P N C"]:
    def velocity(x: Array, sigma: Array) -> Array:
        return transformer.apply(variables, x, jnp.broadcast_to(sigma, x.shape[:1]), condition, grid)

    return rollout.integrate(velocity, noise, sigmas)[-1]


@partial(jax.jit, static_argnums=(0, 3))
def decode(vae: VAE, params: dict, tokens: Float[Array, "*b N C"], grid: tuple[int, int]) -> Float[Array, "*b H W 3"]:
    """Images in [-1, 1] of packed latents, float32."""
    return vae.apply({"params": params}, latents.unpack(tokens, grid), method="decode").astype(jnp.float32)
