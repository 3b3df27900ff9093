"""Shapes of the four networks, read from the `config.json` files of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from rcgrpo_jax.errors import UserError


def _require(component: str, config: Mapping[str, Any], **supported: Any) -> None:
    """Refuses a `config.json` that asks for a variant this package does not implement."""
    for field, value in supported.items():
        found = config.get(field, value)
        if found != value:
            raise UserError(
                f"{component}/config.json: {field} is {found!r}; only {value!r} is implemented.",
                "Use a folder of FLUX.1-Kontext-dev or of a model with the same blocks.",
            )


class _Config:
    """Reads the fields that a `config.json` shares with the dataclass; absent ones keep FLUX's value."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        found = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


@dataclass(frozen=True)
class MMDiTConfig(_Config):
    """The FLUX transformer; defaults are FLUX.1-Kontext-dev's (11,901,408,320 parameters)."""

    in_channels: int = 64  # channels of a packed latent token: 16 latent channels x 2 x 2 pixels
    num_layers: int = 19  # double blocks: text and image have weights of their own, attention is joint
    num_single_layers: int = 38  # single blocks: one stream of [text, image]
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 4096  # width of the T5 sequence
    pooled_projection_dim: int = 768  # width of the pooled CLIP vector
    guidance_embeds: bool = True  # guidance-distilled: the guidance scale is an input
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # rotary channels for (frame, row, column)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise UserError(
                f"transformer/config.json: axes_dims_rope {self.axes_dims_rope} must be even numbers that add up to "
                f"attention_head_dim {self.attention_head_dim}.",
                "Correct axes_dims_rope or attention_head_dim.",
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_blocks(self) -> int:
        """Joint-attention blocks in all: 57 for FLUX."""
        return self.num_layers + self.num_single_layers

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        channels = config.get("in_channels", 64)
        _require("transformer", {"out_channels": channels, **{k: v for k, v in config.items() if v is not None}},
                 patch_size=1, out_channels=channels)  # fmt: skip
        return super().from_json({"guidance_embeds": False, **config})  # diffusers' own default


@dataclass(frozen=True)
class VAEConfig(_Config):
    """The FLUX autoencoder (diffusers `AutoencoderKL` without quantisation convolutions)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downscale(self) -> int:
        """Pixels a side of one latent cell: 8 for FLUX."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        _require("vae", config, use_quant_conv=False, use_post_quant_conv=False, act_fn="silu")
        return super().from_json(config)


@dataclass(frozen=True)
class T5Config(_Config):
    """The T5 v1.1 encoder (XXL in FLUX)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        _require("text_encoder_2", config, feed_forward_proj="gated-gelu")
        return super().from_json(config)


@dataclass(frozen=True)
class CLIPTextConfig(_Config):
    """The CLIP text transformer (ViT-L/14 in FLUX), used for its pooled vector."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # released files say 2 for the token 49407; see `models.clip`

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        _require("text_encoder", config, hidden_act="quick_gelu")
        return super().from_json(config)
