"""The FLUX.1-Kontext transformer (MMDiT) in Flax linen.

Submodules carry the names of diffusers' `FluxTransformer2DModel`, so a leaf's path is its key in a released file
(`weights.keymap`). Both kinds of blocks are stacked by `nn.scan`. Every input may have leading axes `*b`: the rollout
maps over candidates with `jax.vmap`, tests pass a batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rcgrpo_jax.method import concentration
from rcgrpo_jax.models import rope
from rcgrpo_jax.models.attention import attend
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import Linear

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the residual stream between blocks, recompute the rest
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the outputs of the linear layers
}


class Condition(NamedTuple):
    """The condition `c` of the paper, as the transformer reads it."""

    text: Float[Array, "*b N_txt D_txt"]  # T5 sequence, padding included and attended to
    pooled: Float[Array, "*b D_pool"]  # pooled CLIP vector
    reference: Float[Array, "*b N_ref C"]  # packed latents of the source image, on the target's grid
    guidance: Float[Array, "*b"]  # guidance scale; unused where the model has no guidance embedding


def sinusoid(x: Float[Array, "*b"], dim: int = 256) -> Float[Array, "*b dim"]:
    """`[cos(x f), sin(x f)]` with `f = 10000^(-i / (dim / 2))`, fp32 (FLUX)."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    arguments = x.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * x.ndim + (-1,))
    return jnp.concatenate([jnp.cos(arguments), jnp.sin(arguments)], axis=-1)


def layer_norm(x: Float[Array, "*b D"], epsilon: float = 1e-6) -> Float[Array, "*b D"]:
    """Layer normalisation without affine parameters, in fp32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)


def modulate(x: Float[Array, "*b N D"], shift: Float[Array, "*b D"], scale: Float[Array, "*b D"]) -> Array:
    return layer_norm(x) * (1 + scale[..., None, :]) + shift[..., None, :]


class _Block(nn.Module):
    """What all submodules share: sizes and dtypes."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def linear(self, features: int, name: str) -> Linear:
        return Linear(features, self.dtype, self.param_dtype, name=name)


class RMSNorm(_Block):
    """RMS normalisation of each head's query or key, in fp32 and cast back."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
        return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Modulation(_Block):
    """`chunks` vectors of width D from the time-text vector; their order is diffusers'."""

    chunks: int = 6

    @nn.compact
    def __call__(self, vec):
        return jnp.split(self.linear(self.chunks * self.config.width, "linear")(nn.silu(vec)), self.chunks, axis=-1)


class Embedder(_Block):
    """Two linear layers with a SiLU between."""

    @nn.compact
    def __call__(self, x):
        return self.linear(self.config.width, "linear_2")(nn.silu(self.linear(self.config.width, "linear_1")(x)))


class TimeTextEmbed(_Block):
    """`vec = time + guidance + pooled text`; time and guidance are cast to the compute dtype *before* the x1000."""

    @nn.compact
    def __call__(self, sigma, condition: Condition):
        def embed(name, x):
            module = Embedder(self.config, self.dtype, self.param_dtype, name=name)
            return module(x)

        vec = embed("timestep_embedder", sinusoid(sigma.astype(self.dtype) * 1000))
        if self.config.guidance_embeds:
            vec = vec + embed("guidance_embedder", sinusoid(condition.guidance.astype(self.dtype) * 1000))
        return vec + embed("text_embedder", condition.pooled)


class Attention(_Block):
    """Joint attention over [text, target, reference]; in double blocks text has projections of its own.

    Where a `region` is given and this block is one of the last `acd_layers`, the attention masses of Eq. 16 are sown
    as `acd_inside` and `acd_total` (`[N_txt]` each), and `acd_map` (`[N_img]`) on request. The output itself comes
    from `attend`, which never exposes its weights.
    """

    implementation: str = "xla"
    joint: bool = True
    acd_layers: int = 0
    acd_map: bool = False
    acd_reference_keys: bool = False

    def heads(self, x, name, norm=None):
        x = self.linear(self.config.width, name)(x)
        x = x.reshape(*x.shape[:-1], self.config.num_attention_heads, self.config.attention_head_dim)
        return x if norm is None else RMSNorm(self.config, self.dtype, self.param_dtype, name=norm)(x)

    @nn.compact
    def __call__(self, text, image, angles, region, layer):
        if self.joint:
            q, k, v = (
                jnp.concatenate([self.heads(text, added, norm_added), self.heads(image, own, norm)], axis=-3)
                for added, norm_added, own, norm in (
                    ("add_q_proj", "norm_added_q", "to_q", "norm_q"),
                    ("add_k_proj", "norm_added_k", "to_k", "norm_k"),
                    ("add_v_proj", None, "to_v", None),
                )
            )
        else:
            x = jnp.concatenate([text, image], axis=-2)
            q, k, v = self.heads(x, "to_q", "norm_q"), self.heads(x, "to_k", "norm_k"), self.heads(x, "to_v")
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        self.sow_concentration(q, k, text.shape[-2], region, layer)
        out = attend(q, k, v, self.implementation)
        out = out.reshape(*out.shape[:-2], self.config.width)
        text, image = out[..., : text.shape[-2], :], out[..., text.shape[-2] :, :]
        if self.joint:
            text = self.linear(self.config.width, "to_add_out")(text)
            image = self.linear(self.config.width, "to_out_0")(image)
        return text, image

    def sow_concentration(self, q, k, num_text, region, layer):
        """Sows Eq. 16's masses of the selected blocks, zeros in the others (one scanned program serves all blocks)."""
        first = self.config.num_blocks - self.acd_layers
        last_of_stack = self.config.num_layers if self.joint else self.config.num_blocks
        if region is None or first >= last_of_stack:
            return
        keys = region.shape[-1] * (2 if self.acd_reference_keys else 1)
        mask = jnp.concatenate([region, region], axis=-1) if self.acd_reference_keys else region
        q_txt, k_img = q[..., :num_text, :, :], k[..., num_text : num_text + keys, :, :]
        scale = self.config.attention_head_dim**-0.5

        def sow(names, function, signature, *arrays):
            compute = jnp.vectorize(function, signature=signature)
            shapes = jax.eval_shape(compute, *arrays)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            values = jax.lax.cond(layer >= first, compute, lambda *_: zeros, *arrays)
            for name, value in zip(names, values if isinstance(values, tuple) else (values,), strict=True):
                self.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

        sow(
            ("acd_inside", "acd_total"),
            lambda q, k, m: concentration.masses(q, k, m, scale),
            "(t,h,d),(i,h,d),(i)->(t),(t)",
            q_txt, k_img, mask,
        )  # fmt: skip
        if self.acd_map:
            sow(
                ("acd_map",),
                lambda q, k: concentration.attention_map(q, k, scale),
                "(t,h,d),(i,h,d)->(i)",
                q_txt, k_img,
            )  # fmt: skip


class FeedForward(_Block):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(_Projection(self.config, self.dtype, self.param_dtype, name="net_0")(x), approximate=True)
        return self.linear(self.config.width, "net_2")(x)


class _Projection(_Block):
    @nn.compact
    def __call__(self, x):
        return self.linear(4 * self.config.width, "proj")(x)


class DoubleBlock(_Block):
    """Text and image streams with weights of their own and one joint attention."""

    attention: dict[str, Any] | None = None

    @nn.compact
    def __call__(self, streams, layer, vec, angles, region):
        text, image = streams
        shared = (self.config, self.dtype, self.param_dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = Modulation(*shared, 6, name="norm1")(vec)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = Modulation(*shared, 6, name="norm1_context")(
            vec
        )
        attended_text, attended_image = Attention(*shared, **(self.attention or {}), joint=True, name="attn")(
            modulate(text, c_shift, c_scale), modulate(image, shift, scale), angles, region, layer
        )
        image = image + gate[..., None, :] * attended_image
        text = text + c_gate[..., None, :] * attended_text
        image_mlp = FeedForward(*shared, name="ff")(modulate(image, shift_mlp, scale_mlp))
        text_mlp = FeedForward(*shared, name="ff_context")(modulate(text, c_shift_mlp, c_scale_mlp))
        return (text + c_gate_mlp[..., None, :] * text_mlp, image + gate_mlp[..., None, :] * image_mlp), None


class SingleBlock(_Block):
    """One stream [text, image]; attention and MLP run side by side."""

    attention: dict[str, Any] | None = None

    @nn.compact
    def __call__(self, streams, layer, vec, angles, region):
        text, image = streams
        shared = (self.config, self.dtype, self.param_dtype)
        shift, scale, gate = Modulation(*shared, 3, name="norm")(vec)
        normed_text, normed_image = modulate(text, shift, scale), modulate(image, shift, scale)
        attended = Attention(*shared, **(self.attention or {}), joint=False, name="attn")(
            normed_text, normed_image, angles, region, layer
        )
        normed = jnp.concatenate([normed_text, normed_image], axis=-2)
        mlp = nn.gelu(self.linear(4 * self.config.width, "proj_mlp")(normed), approximate=True)
        out = jnp.concatenate([jnp.concatenate(attended, axis=-2), mlp], axis=-1)
        out = gate[..., None, :] * self.linear(self.config.width, "proj_out")(out)
        return (text + out[..., : text.shape[-2], :], image + out[..., text.shape[-2] :, :]), None


class MMDiT(nn.Module):
    """FLUX.1-Kontext's velocity `v_theta(x, sigma, c)`.

    Attributes:
        config: Sizes.
        dtype: Compute dtype; norms of q and k, softmax and rotary embedding are fp32 in any case.
        param_dtype: Dtype of freshly initialised parameters.
        attention_implementation: A name of `attention.IMPLEMENTATIONS`.
        remat: A name of `REMAT_POLICIES`, applied to each block.
        acd_layers: L_sel, how many of the last blocks report attention concentration when a region is given.
        acd_map: Also sow the per-token map `a(u)`, for diagnostics.
        acd_reference_keys: Count the reference image's keys too, under the same mask.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention_implementation: str = "xla"
    remat: str = "none"
    acd_layers: int = 10
    acd_map: bool = False
    acd_reference_keys: bool = False

    def _stack(self, block: type[_Block], length: int, name: str) -> nn.Module:
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=length,
        )
        attention = {
            "implementation": self.attention_implementation,
            "acd_layers": self.acd_layers,
            "acd_map": self.acd_map,
            "acd_reference_keys": self.acd_reference_keys,
        }
        return scanned(self.config, self.dtype, self.param_dtype, attention, name=name)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b N_img C"],
        sigma: Float[Array, "*b"],
        condition: Condition,
        grid: tuple[int, int],
        region: Float[Array, "*b N_img"] | None = None,
    ) -> Float[Array, "*b N_img C"]:
        """The velocity `noise - data` at the target tokens.

        Args:
            x: Packed noisy latents of the target image.
            sigma: Time in [0, 1]; 1 is noise.
            condition: Text, pooled vector, reference latents and guidance.
            grid: Static (rows, columns) of tokens, of target and reference alike.
            region: Edit mask on the token grid, in [0, 1]. If given, the last `acd_layers` blocks sow ACD masses.

        Returns:
            float32 velocity.
        """
        shared = (self.config, self.dtype, self.param_dtype)
        width, num_img = self.config.width, x.shape[-2]
        if condition.reference.shape[-2] != num_img or grid[0] * grid[1] != num_img:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} tokens needs as many target and reference tokens; "
                f"found {num_img} and {condition.reference.shape[-2]}"
            )
        vec = TimeTextEmbed(*shared, name="time_text_embed")(sigma, condition)
        image = Linear(width, self.dtype, self.param_dtype, name="x_embedder")(
            jnp.concatenate([x, condition.reference.astype(x.dtype)], axis=-2)
        )
        text = Linear(width, self.dtype, self.param_dtype, name="context_embedder")(condition.text)
        ids = rope.kontext_ids(text.shape[-2], grid)
        angles = rope.angles(ids, self.config.axes_dims_rope, self.config.rope_theta)

        doubles, singles = self.config.num_layers, self.config.num_single_layers
        streams = (text, image)
        for block, name, layers in (
            (DoubleBlock, "transformer_blocks", jnp.arange(doubles)),
            (SingleBlock, "single_transformer_blocks", doubles + jnp.arange(singles)),
        ):
            if layers.size:
                streams, _ = self._stack(block, layers.size, name)(streams, layers, vec, angles, region)
        scale, shift = Modulation(*shared, 2, name="norm_out")(vec)
        out = modulate(streams[1][..., :num_img, :], shift, scale)
        return Linear(self.config.in_channels, self.dtype, self.param_dtype, name="proj_out")(out).astype(jnp.float32)


def sown_masses(intermediates: dict, name: str, acd_layers: int) -> Array:
    """What the last `acd_layers` blocks sowed under `name`, stacked over blocks: `[L_sel, *b, ...]`.

    Args:
        intermediates: The `intermediates` collection of an `apply` with a region.
        name: `acd_inside`, `acd_total` or `acd_map`.
        acd_layers: L_sel.
    """
    stacks = [
        intermediates[stack]["attn"][name]
        for stack in ("transformer_blocks", "single_transformer_blocks")
        if stack in intermediates
    ]
    return jnp.concatenate(stacks)[-acd_layers:]
