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

from rcgrpo_jax.editors.base import Family, Masses, sample
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.flow import latents, schedule
from rcgrpo_jax.models.clip import CLIPTextEncoder
from rcgrpo_jax.models.mmdit import Condition, MMDiT, sown_masses
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
class Networks:
    """The networks of FLUX.1-Kontext without parameters: an `editors.base.Family`."""

    transformer: MMDiT
    vae: VAE
    shift_options: tuple[tuple[str, float], ...] = ()  # of `schedule.sigmas`, where not FLUX's

    def grid(self, height, width):
        return latents.token_grid(height, width, self.vae.config.downscale)

    def sigmas(self, num_steps, num_image_tokens):
        return schedule.sigmas(num_steps, num_image_tokens, **dict(self.shift_options))

    def condition(self, encoded, guidance):
        reference = encoded["reference"]
        scale = jnp.full(reference.shape[:-2], guidance, jnp.float32)  # of the distilled model
        return Condition(encoded["text"], encoded["pooled"], reference, scale)

    def source(self, condition):
        return condition.reference

    def text_weights(self, encoded):
        return encoded["text_weights"]

    def velocity(self, params, lora, x, sigma, condition, grid, region=None):
        variables, sigma = {"params": params, "lora": lora}, jnp.broadcast_to(sigma, x.shape[:-2])
        if region is None:
            return self.transformer.apply(variables, x, sigma, condition, grid), None
        v, sown = self.transformer.apply(variables, x, sigma, condition, grid, region, mutable=["intermediates"])
        options = self.transformer.attention
        names = ("acd_inside", "acd_total", *(["acd_map"] if options.acd_map else []))
        return v, Masses(*(sown_masses(sown["intermediates"], name, options.acd_layers) for name in names))

    def decode(self, params, tokens, grid):
        pictures = self.vae.apply({"params": params}, latents.unpack(tokens, grid), method="decode")
        return pictures.astype(jnp.float32)

    def encode_image(self, params: dict, pictures: Float[Array, "*b H W 3"]) -> Float[Array, "*b N C"]:
        """Packed, normalised latents (the mode, no sampling) of pictures in [-1, 1], float32."""
        return latents.pack(self.vae.apply({"params": params}, pictures, method="encode")).astype(jnp.float32)


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
    def family(self) -> Networks:
        """The networks without their parameters."""
        return Networks(self.transformer, self.vae, tuple(sorted(self.folder.schedule_options().items())))

    @property
    def decoder_params(self) -> dict:
        """The part of the VAE that makes pictures."""
        return {"decoder": self.vae_params["decoder"]}

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
        return self.family.grid(height, width)

    def encode_image(self, pixels: UInt8[np.ndarray, "P H W 3"]) -> Float[Array, "P N C"]:
        """Packed, normalised latents (the mode, no sampling) of images, float32."""
        return _encode(self.family, self.vae_params, to_unit(pixels))

    def encode(self, pixels: UInt8[np.ndarray, "P H W 3"], instructions: Sequence[str]) -> dict[str, Array]:
        """What the transformer reads of sources and instructions, by name.

        Returns:
            `reference` `[P, N, C]`, packed latents; `text` `[P, N_txt, D]`; `pooled` `[P, D_pool]`; `text_weights`
            `[P, N_txt]`, 1 for the instruction's own tokens, 0 for padding.
        """
        encoding = self.encode_text(instructions)
        weights = np.arange(encoding.text.shape[1]) < encoding.lengths[:, None]
        return {
            "reference": self.encode_image(pixels),
            "text": encoding.text,
            "pooled": encoding.pooled,
            "text_weights": weights.astype(np.float32),
        }

    def decode(self, tokens: Float[Array, "P N C"], grid: tuple[int, int]) -> UInt8[np.ndarray, "P H W 3"]:
        """Pixels of packed latents."""
        return to_pixels(_decode(self.family, self.vae_params, tokens, grid))

    def sigmas(self, num_steps: int, num_image_tokens: int) -> Float[np.ndarray, " K+1"]:
        """The folder's schedule."""
        return self.family.sigmas(num_steps, num_image_tokens)

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
        condition = self.family.condition(self.encode(images, instructions), guidance)
        sigmas = self.sigmas(num_steps, grid[0] * grid[1])
        params = self.transformer_params
        tokens = _sample(self.family, params, lora or {}, jnp.asarray(noise), condition, sigmas, grid)
        return self.decode(tokens, grid)


# Compiled by family and not by editor, so that a program does not keep an editor's parameters alive.


@partial(jax.jit, static_argnums=0)
def _encode(networks: Networks, params: dict, pictures: Float[Array, "P H W 3"]) -> Float[Array, "P N C"]:
    return networks.encode_image(params, pictures)


@partial(jax.jit, static_argnums=(0, 6))
def _sample(
    family: Family, params: dict, lora: dict, noise: Array, condition: Any, sigmas: Array, grid: tuple[int, int]
) -> Float[Array, "P N C"]:
    return sample(family, params, lora, noise, condition, sigmas, grid)[-1]


@partial(jax.jit, static_argnums=(0, 3))
def _decode(family: Family, params: dict, tokens: Float[Array, "*b N C"], grid: tuple[int, int]) -> Array:
    return family.decode(params, tokens, grid)
