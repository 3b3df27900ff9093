"""Shapes of the four networks of an editor, and of CLIP with both towers, read from their `config.json` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Gt, Le, Len

from rcgrpo_jax.borders import STRICT, conform, shorten
from rcgrpo_jax.errors import UserError

Size = Annotated[int, Gt(0), Le(2**31 - 1)]  # an axis of an array
Depth = Annotated[int, Ge(0), Le(1000)]  # blocks of one kind: far more than any network's, few enough to be listed
Positive = Annotated[float, Gt(0)]

CORRECT = "Correct the file, or copy it again from the model's release."


class Config:
    """Reads the fields that a JSON file shares with the dataclass; absent ones keep FLUX's value.

    Attributes:
        file: The file, seen from the model's folder.
        remedy: What to do about a variant that is not implemented.
    """

    __pydantic_config__ = STRICT
    file: ClassVar[str]
    remedy: ClassVar[str] = "Use a folder of FLUX.1-Kontext-dev or of a model with the same blocks."

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """The config of a JSON object.

        Raises:
            UserError: For fields of another type or out of range, and for variants that are not implemented.
        """
        return conform({f.name: config[f.name] for f in fields(cls) if f.name in config}, cls, cls.file, CORRECT)

    @classmethod
    def require(cls, config: Mapping[str, Any], **supported: Any) -> None:
        """Refuses an object that asks for a variant this package does not implement; null is a switch that is off."""
        for field, value in supported.items():
            found = config.get(field, value)
            if (type(found), found) != (type(value), value) and (value or found is not None):
                raise UserError(f"{cls.file}: {field} is {shorten(found)}; only {value!r} is implemented.", cls.remedy)

    def refuse(self, field: str, wanted: str) -> None:
        """Raises the error of a field that does not go with others."""
        raise UserError(f"{self.file}: {field} is {shorten(getattr(self, field))}; {wanted} was wanted.", CORRECT)


@dataclass(frozen=True)
class MMDiTConfig(Config):
    """The FLUX transformer; defaults are FLUX.1-Kontext-dev's (11,901,408,320 parameters)."""

    file: ClassVar[str] = "transformer/config.json"

    in_channels: Size = 64  # channels of a packed latent token: 16 latent channels x 2 x 2 pixels
    num_layers: Depth = 19  # double blocks: text and image have weights of their own, attention is joint
    num_single_layers: Depth = 38  # single blocks: one stream of [text, image]
    num_attention_heads: Size = 24
    attention_head_dim: Size = 128
    joint_attention_dim: Size = 4096  # width of the T5 sequence
    pooled_projection_dim: Size = 768  # width of the pooled CLIP vector
    guidance_embeds: bool = True  # guidance-distilled: the guidance scale is an input
    axes_dims_rope: Annotated[tuple[Size, ...], Len(3, 3)] = (16, 56, 56)  # rotary channels for (frame, row, column)
    rope_theta: Positive = 10000.0

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            self.refuse("axes_dims_rope", f"even numbers that add up to attention_head_dim {self.attention_head_dim}")
        if not self.num_blocks:
            self.refuse("num_layers", "at least one block here or in num_single_layers")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_blocks(self) -> int:
        """Joint-attention blocks in all: 57 for FLUX."""
        return self.num_layers + self.num_single_layers

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        cls.require(config, _class_name="FluxTransformer2DModel")
        found = super().from_json({"guidance_embeds": False, **config})  # diffusers' own default
        out_channels = config.get("out_channels") or found.in_channels  # null in released files
        cls.require({**config, "out_channels": out_channels}, patch_size=1, out_channels=found.in_channels)
        return found


@dataclass(frozen=True)
class VAEConfig(Config):
    """The FLUX autoencoder (diffusers `AutoencoderKL` without quantisation convolutions)."""

    file: ClassVar[str] = "vae/config.json"

    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 16
    block_out_channels: Annotated[tuple[Size, ...], Len(1, 8)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Gt(0), Le(16)] = 2
    norm_num_groups: Size = 32
    mid_block_add_attention: bool = True
    scaling_factor: Positive = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            self.refuse("block_out_channels", f"multiples of norm_num_groups {self.norm_num_groups}")

    @property
    def downscale(self) -> int:
        """Pixels a side of one latent cell: 8 for FLUX."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        cls.require(config, _class_name="AutoencoderKL")
        found = super().from_json(config)
        levels = len(found.block_out_channels)
        cls.require(
            config, in_channels=3, out_channels=3, act_fn="silu", use_quant_conv=False, use_post_quant_conv=False,
            latents_mean=None, latents_std=None,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class T5Config(Config):
    """The T5 v1.1 encoder (XXL in FLUX)."""

    file: ClassVar[str] = "text_encoder_2/config.json"

    vocab_size: Size = 32128
    d_model: Size = 4096
    d_kv: Size = 64
    d_ff: Size = 10240
    num_layers: Annotated[Depth, Gt(0)] = 24
    num_heads: Size = 64
    relative_attention_num_buckets: Annotated[int, Ge(4), Le(2**31 - 1)] = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: Positive = 1e-6

    def __post_init__(self) -> None:
        if self.relative_attention_num_buckets % 2:
            self.refuse("relative_attention_num_buckets", "an even number, half for each direction,")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            self.refuse("relative_attention_max_distance", "more than a quarter of relative_attention_num_buckets")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        found = super().from_json(config)
        cls.require(config, feed_forward_proj="gated-gelu")
        return found


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """The CLIP text transformer (ViT-L/14 in FLUX), used for its pooled vector."""

    file: ClassVar[str] = "text_encoder/config.json"
    causal: ClassVar[bool] = True  # a token attends to those before it

    vocab_size: Size = 49408
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Annotated[Depth, Gt(0)] = 12
    num_attention_heads: Size = 12
    max_position_embeddings: Annotated[int, Ge(77), Le(2**31 - 1)] = 77  # FLUX pads its texts to 77
    layer_norm_eps: Positive = 1e-5
    eos_token_id: Annotated[int, Ge(0), Le(2**31 - 1)] = 2  # in released files, for 49407; see `models.clip`

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self.refuse("hidden_size", f"a multiple of num_attention_heads {self.num_attention_heads}")
        if self.eos_token_id >= self.vocab_size:
            self.refuse("eos_token_id", f"a token below vocab_size {self.vocab_size}")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        found = super().from_json(config)
        cls.require(config, hidden_act="quick_gelu")
        return found


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """The CLIP vision transformer; defaults are transformers' own, ViT-B/32."""

    file: ClassVar[str] = "config.json: vision_config"
    causal: ClassVar[bool] = False

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Annotated[Depth, Gt(0)] = 12
    num_attention_heads: Size = 12
    image_size: Size = 224  # pixels a side
    patch_size: Size = 32
    layer_norm_eps: Positive = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self.refuse("hidden_size", f"a multiple of num_attention_heads {self.num_attention_heads}")
        if self.patch_size > self.image_size:
            self.refuse("patch_size", f"image_size {self.image_size} at most")

    @property
    def num_positions(self) -> int:
        """Patches and the class token: 257 for ViT-L/14."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        cls.require(config, num_channels=3, hidden_act="quick_gelu")
        return super().from_json(config)


@dataclass(frozen=True)
class _CLIPTowerConfig(CLIPTextConfig):
    """The text tower where a file has both; a field that the file leaves out has transformers' default."""

    file: ClassVar[str] = "config.json: text_config"

    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_attention_heads: Size = 8
    eos_token_id: Annotated[int, Ge(0), Le(2**31 - 1)] = 49407


@dataclass(frozen=True)
class CLIPConfig(Config):
    """Both towers of CLIP and the width of the space that they share."""

    file: ClassVar[str] = "config.json"
    remedy: ClassVar[str] = "Use the folder of a CLIP model, such as openai/clip-vit-large-patch14."

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: Size = 512

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        cls.require({"model_type": None, **config}, model_type="clip")
        text, vision = (
            {**_group(config, tower), **_group(config, f"{tower}_dict")}  # the first releases say some things twice
            for tower in ("text_config", "vision_config")
        )
        width = conform(config.get("projection_dim", cls.projection_dim), Size, "config.json: projection_dim", CORRECT)
        return cls(_CLIPTowerConfig.from_json(text), CLIPVisionConfig.from_json(vision), width)


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return conform(config.get(name) or {}, dict[str, Any], f"config.json: {name}", CORRECT)
