"""The four networks of an editor, and CLIP for rewards: how to build each, and the shapes of its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rcgrpo_jax.models.clip import CLIPTextEncoder
from rcgrpo_jax.models.clip_vision import CLIP
from rcgrpo_jax.models.config import CLIPConfig, CLIPTextConfig, MMDiTConfig, T5Config, VAEConfig
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.models.t5 import T5Encoder
from rcgrpo_jax.models.vae import VAE


def _mmdit_inputs(config: MMDiTConfig) -> tuple:
    token = jnp.zeros((1, config.in_channels))
    condition = Condition(
        jnp.zeros((1, config.joint_attention_dim)), jnp.zeros(config.pooled_projection_dim), token, jnp.zeros(())
    )
    return token, jnp.zeros(()), condition, (1, 1)


@dataclass(frozen=True)
class Network:
    """One network of a diffusers folder."""

    config: type  # a class of `models.config`
    module: Callable[..., nn.Module]  # (config, dtype=...) -> module
    inputs: Callable[[Any], tuple]  # config -> the smallest inputs of `init`
    file: str  # stem of the safetensors file in a diffusers folder
    library: tuple[str, str]  # its entry in model_index.json
    ignored: frozenset[str] = frozenset()  # tensors in released files that are buffers or duplicates


def _clip_inputs(config: CLIPConfig) -> tuple:
    side = config.vision.image_size
    return jnp.zeros((1, config.text.max_position_embeddings), jnp.int32), jnp.zeros((1, side, side, 3))


NETWORKS = {
    "transformer": Network(
        MMDiTConfig,
        MMDiT,
        _mmdit_inputs,
        "diffusion_pytorch_model",
        ("diffusers", "FluxTransformer2DModel"),
    ),
    "vae": Network(
        VAEConfig,
        VAE,
        lambda config: (jnp.zeros((2 * config.downscale, 2 * config.downscale, 3)),),
        "diffusion_pytorch_model",
        ("diffusers", "AutoencoderKL"),
    ),
    "text_encoder": Network(
        CLIPTextConfig,
        CLIPTextEncoder,
        lambda config: (jnp.zeros(config.max_position_embeddings, jnp.int32),),
        "model",
        ("transformers", "CLIPTextModel"),
        frozenset({"text_model.embeddings.position_ids"}),
    ),
    "text_encoder_2": Network(
        T5Config,
        T5Encoder,
        lambda config: (jnp.zeros(8, jnp.int32),),
        "model",
        ("transformers", "T5EncoderModel"),
        frozenset({"encoder.embed_tokens.weight"}),
    ),
}
# Those of an editor's folder, and those that have folders of their own.
ALL = NETWORKS | {
    "clip": Network(
        CLIPConfig,
        CLIP,
        _clip_inputs,
        "model",
        ("transformers", "CLIPModel"),
        frozenset({
            "logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids",
        }),
    ),
}  # fmt: skip


def abstract_params(name: str, config: Any) -> dict:
    """Shapes of a network's parameters, `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    return jax.tree.map(lambda x: x, _init_shapes(name, config))  # a tree of the caller's own


@functools.cache  # loading, checking and exporting all ask, and to trace an `init` takes a while
def _init_shapes(name: str, config: Any) -> dict:
    network = ALL[name]
    module = network.module(config)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *network.inputs(config)))["params"]
