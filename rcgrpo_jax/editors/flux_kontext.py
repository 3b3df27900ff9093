"""FLUX.1-Kontext as a family: its networks, its folder, and its editor. What FluxKontextPipeline is to diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.editors.base import Masses
from rcgrpo_jax.editors.model import Editor, EditorOptions, Sizes, to_unit
from rcgrpo_jax.flow import latents, matching, schedule
from rcgrpo_jax.models.attention import choose
from rcgrpo_jax.models.clip import CLIPTextEncoder
from rcgrpo_jax.models.mmdit import AttentionOptions, Condition, MMDiT, sown_masses
from rcgrpo_jax.models.quantization import NONE
from rcgrpo_jax.models.t5 import T5Encoder
from rcgrpo_jax.models.vae import VAE
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.weights.load import ModelFolder, on_default_device
from rcgrpo_jax.weights.networks import abstract_params
from rcgrpo_jax.weights.tokenizers import tokenize

_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class FluxKontextNetworks:
    """The networks of FLUX.1-Kontext without parameters: `editors.base.Networks` of it."""

    transformer: MMDiT
    vae: VAE
    shift_options: tuple[tuple[str, float], ...] = ()  # of `schedule.sigmas`, where not FLUX's

    def grid(self, height, width):
        return latents.token_grid(height, width, self.vae.config.downscale)

    def sigmas(self, num_steps, num_image_tokens):
        return schedule.sigmas(num_steps, num_image_tokens, **dict(self.shift_options))

    def sample_sigma(self, key, num_image_tokens, extra_shift):
        return matching.sample_sigmas(key, (), num_image_tokens, extra_shift, **dict(self.shift_options))

    def condition(self, encoded, guidance):
        reference = encoded["reference"]
        scale = jnp.full(reference.shape[:-2], guidance, jnp.float32)  # of the distilled model
        return Condition(encoded["text"], encoded["pooled"], reference, scale)

    def source(self, condition):
        return condition.reference

    def text_weights(self, encoded):
        return encoded["text_weights"]

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        variables = {"params": params, "lora": lora}
        inputs = x, jnp.broadcast_to(sigma, () if own else x.shape[:-2]), condition, grid, region, own
        if region is None:
            return self.transformer.apply(variables, *inputs), None
        v, sown = self.transformer.apply(variables, *inputs, mutable=["intermediates"])
        options = self.transformer.attention
        names = ("acd_inside", "acd_total", *(["acd_map"] if options.acd_map else []))
        return v, Masses(*(sown_masses(sown["intermediates"], name, options.acd_layers) for name in names))

    def encode_image(self, params, pictures):
        """Packed, normalised latents: the mode, no sampling."""
        return latents.pack(self.vae.apply({"params": params}, pictures, method="encode")).astype(jnp.float32)

    def decode(self, params, tokens, grid):
        pictures = self.vae.apply({"params": params}, latents.unpack(tokens, grid), method="decode")
        return pictures.astype(jnp.float32)

    def with_maps(self):
        attention = self.transformer.attention._replace(acd_map=True, acd_reference_keys=False)
        return replace(self, transformer=self.transformer.clone(attention=attention))


@dataclass(frozen=True)
class TextEncoding:
    """What the transformer reads of the instructions."""

    text: Float[Array, "P N_txt D"]
    pooled: Float[Array, "P D_pool"]
    lengths: np.ndarray  # [P] real T5 tokens; the rest is padding, which FLUX attends to


class FluxKontext(ModelFolder):
    """A folder of FLUX.1-Kontext: an `editors.model.Model`."""

    @property
    def sizes(self) -> Sizes:
        transformer, vae = self.config("transformer"), self.config("vae")
        return Sizes(
            token_pixels=latents.PATCH * vae.downscale,
            channels=transformer.in_channels,
            num_blocks=transformer.num_blocks,
            num_heads=transformer.num_attention_heads,
            decoder_channels=vae.block_out_channels[0],
            num_double_blocks=transformer.num_layers,
            shares_tokens=True,
        )

    @property
    def param_shapes(self) -> dict:
        return abstract_params("transformer", self.config("transformer"))

    def trained_fingerprint(self) -> str:
        return self.fingerprint("transformer")

    def open(self, options: EditorOptions, mesh: Mesh | None = None) -> FluxKontextEditor:
        return FluxKontextEditor(self, options, mesh)


class FluxKontextEditor(Editor):
    """The networks of a folder.

    Args:
        folder: The model.
        options: Unless text encoders are kept, the 8.9 GiB of T5 at full size are free once texts are encoded.
        mesh: Weights are spread over it by `parallel.sharding`; None: the default device has them.

    Raises:
        UsageError: If the platform has no such attention.
    """

    def __init__(self, folder: FluxKontext, options: EditorOptions, mesh: Mesh | None = None):
        super().__init__(folder, replace(options, max_text_tokens=options.max_text_tokens or folder.max_text_tokens))
        self.dtype = jnp.dtype(options.dtype)
        platform = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
        attention = AttentionOptions(
            choose(options.attention, platform, options.dtype),
            options.acd_layers,
            acd_reference_keys=options.acd_reference_keys,
        )
        self.transformer = MMDiT(folder.config("transformer"), self.dtype, remat=options.remat, attention=attention)
        self.vae = VAE(folder.config("vae"), dtype=self.dtype)
        self._sharding_of = on_default_device if mesh is None else parameter_sharding(mesh)

    def _load(self, network: str, quantization: str = NONE) -> dict:
        return self.model.load(network, self.dtype, self._sharding_of, quantization)

    @cached_property
    def networks(self) -> FluxKontextNetworks:
        return FluxKontextNetworks(self.transformer, self.vae, tuple(sorted(self.model.schedule_options().items())))

    @cached_property
    def params(self) -> dict:
        return self._load("transformer", self.options.quantization)

    @property
    def decoder_params(self) -> dict:
        return {"decoder": self.image_params["decoder"]}

    @cached_property
    def image_params(self) -> dict:
        return self._load("vae")

    @property
    def encoding_key(self) -> tuple[str | int, ...]:
        return *map(self.model.fingerprint, _ENCODERS), str(self.dtype), self.options.max_text_tokens

    @cached_property
    def _text(self) -> tuple:
        tokenizers = self.model.tokenizers()  # before gigabytes are read
        clip = CLIPTextEncoder(self.model.config("text_encoder"), dtype=self.dtype)
        t5 = T5Encoder(self.model.config("text_encoder_2"), dtype=self.dtype)
        params = {name: self._load(name) for name in ("text_encoder", "text_encoder_2")}
        return tokenizers, params, jax.jit(clip.apply), jax.jit(t5.apply)

    def load_encoders(self) -> None:
        _ = self._text, self.image_params

    def encode_text(self, instructions: Sequence[str]) -> TextEncoding:
        """T5 sequence and pooled CLIP vector of each instruction, in the compute dtype."""
        tokenizers, params, clip, t5 = self._text
        tokens = tokenize(tokenizers, instructions, self.options.max_text_tokens)
        pooled = clip({"params": params["text_encoder"]}, tokens.clip)
        text = t5({"params": params["text_encoder_2"]}, tokens.t5)
        if not self.options.keep_text_encoders:
            del self._text
        return TextEncoding(text.astype(self.dtype), pooled.astype(self.dtype), tokens.t5_lengths)

    def encode_image(self, pixels: UInt8[np.ndarray, "P H W 3"]) -> Float[Array, "P N C"]:
        """Packed, normalised latents (the mode, no sampling) of images, float32."""
        return _encode(self.networks, self.image_params, to_unit(pixels))

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


@partial(jax.jit, static_argnums=0)  # by networks and not by editor, as the programs of `editors.model`
def _encode(networks: FluxKontextNetworks, params: dict, pictures: Float[Array, "P H W 3"]) -> Float[Array, "P N C"]:
    return networks.encode_image(params, pictures)
