"""The FLUX.1-Kontext transformer (MMDiT) in Flax linen.

Submodules carry the names of diffusers' `FluxTransformer2DModel`, so a leaf's path is its key in a released file
(`weights.keymap`). Both kinds of blocks are stacked by `nn.scan`. Every input may have leading axes `*b`: the rollout
maps over candidates with `jax.vmap`, tests pass a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rcgrpo_jax.method import concentration
from rcgrpo_jax.method.sharing import Own
from rcgrpo_jax.models import rope, sharing
from rcgrpo_jax.models.attention import attend
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import Linear
from rcgrpo_jax.models.mmdit_parts import (
    Embedder,
    Modulation,
    Part,
    RMSNorm,
    modulate,
    sinusoid,
    thousandfold,
)

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


def keep_whole(*streams: Float[Array, "*b N D"]) -> tuple[Float[Array, "*b N D"], ...]:
    """Holds tokens and channels of the residual streams unsplit on each device of the mesh in force, if there is one.

    Without this the compiler follows the weights' sharding into the activations and gives up the spread of the mapped
    sample axis: every device would then compute every sample. With it, weights are gathered layer by layer instead.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return streams
    free = PartitionSpec.UNCONSTRAINED
    return tuple(
        jax.lax.with_sharding_constraint(x, PartitionSpec(*[free] * (x.ndim - 2), None, None)) for x in streams
    )


class Surroundings(NamedTuple):
    """What all blocks of a pass have in common."""

    vec: Float[Array, "*b D"]  # of time, guidance and pooled text
    angles: Float[Array, "N D_head/2"]  # of the rotary embedding
    region: Float[Array, "*b N_img"] | None  # M, if attention masses are to be sown
    layout: sharing.Layout | None = None  # of candidates that share tokens


class AttentionOptions(NamedTuple):
    """How blocks attend, and what they report."""

    implementation: str = "xla"  # a name of `attention.IMPLEMENTATIONS`
    acd_layers: int = 10  # L_sel, how many of the last blocks report their attention masses
    acd_map: bool = False  # report the per-token map a(u) too
    acd_reference_keys: bool = False  # count the reference image's keys, under the same mask


class TimeTextEmbed(Part):
    """`vec = time + guidance + pooled text`; time and guidance are cast to the compute dtype *before* the x1000."""

    @nn.compact
    def __call__(self, sigma: Float[Array, "*b"], condition: Condition) -> Float[Array, "*b D"]:
        vec = self.part(Embedder, "timestep_embedder")(sinusoid(thousandfold(sigma, self.dtype)))
        if self.config.guidance_embeds:
            guidance = sinusoid(thousandfold(condition.guidance, self.dtype))
            vec = vec + self.part(Embedder, "guidance_embedder")(guidance)
        return vec + self.part(Embedder, "text_embedder")(condition.pooled)


class Attention(Part):
    """Joint attention over [text, target, reference].

    Double blocks give text and image apart, each with projections of its own (`joint`); single blocks give one stream.
    As many come back.

    Where a `region` is given and this block is one of the last `acd_layers`, the attention masses of Eq. 16 are sown
    as `acd_inside` and `acd_total` (`[N_txt]` each), and `acd_map` (`[N_img]`) on request. The output itself comes
    from `attend`, which never exposes its weights.
    """

    options: AttentionOptions
    joint: bool

    def heads(self, x: Array, name: str, norm: str | None = None) -> Float[Array, "*b N H D"]:
        x = self.linear(self.config.width, name)(x)
        x = x.reshape(*x.shape[:-1], self.config.num_attention_heads, self.config.attention_head_dim)
        return x if norm is None else self.part(RMSNorm, norm)(x)

    @nn.compact
    def __call__(self, *streams: Array, around: Surroundings, layer: Array) -> tuple[Array, ...]:
        x = streams[-1]
        q, k, v = self.heads(x, "to_q", "norm_q"), self.heads(x, "to_k", "norm_k"), self.heads(x, "to_v")
        if self.joint:
            text = streams[0]
            added = (
                self.heads(text, "add_q_proj", "norm_added_q"),
                self.heads(text, "add_k_proj", "norm_added_k"),
                self.heads(text, "add_v_proj"),
            )
            q, k, v = (jnp.concatenate(pair, axis=-3) for pair in zip(added, (q, k, v), strict=True))
        q, k = rope.rotate(q, around.angles), rope.rotate(k, around.angles)
        if around.layout is not None:
            k, v = sharing.unpack(k, around.layout), sharing.unpack(v, around.layout)
        if around.region is not None:
            self.sow_concentration(q, k, around.region, layer)
        if around.layout is None:
            out = attend(q, k, v, self.options.implementation)
        else:
            out = sharing.attend_packed(q, k, v, around.layout, self.options.implementation)
        out = out.reshape(*out.shape[:-2], self.config.width)
        if not self.joint:
            return (out,)
        num_text = streams[0].shape[-2]
        text, image = out[..., :num_text, :], out[..., num_text:, :]
        return self.linear(self.config.width, "to_add_out")(text), self.linear(self.config.width, "to_out_0")(image)

    def sow_concentration(self, q: Array, k: Array, region: Array, layer: Array) -> None:
        """Sows Eq. 16's masses of the selected blocks, zeros in the others (one scanned program serves all blocks)."""
        first = self.config.num_blocks - self.options.acd_layers
        if first >= (self.config.num_layers if self.joint else self.config.num_blocks):
            return  # no block of this stack is selected
        key_region = jnp.concatenate([region, region], axis=-1) if self.options.acd_reference_keys else region
        num_text = k.shape[-3] - 2 * region.shape[-1]
        scale = self.config.attention_head_dim**-0.5

        @partial(jnp.vectorize, signature="(t,h,d),(i,h,d),(i)->(t),(t)")
        def masses(q: Array, k: Array, m: Array) -> tuple[Array, Array]:
            return concentration.masses(q, k, m, scale)

        @partial(jnp.vectorize, signature="(t,h,d),(i,h,d)->(i)")
        def attention_map(q: Array, k: Array) -> Array:
            return concentration.attention_map(q, k, scale)

        def report() -> dict[str, Array]:
            q_txt, k_img = q[..., :num_text, :, :], k[..., num_text : num_text + key_region.shape[-1], :, :]
            batch = k_img.shape[:-3]  # a group shares its text
            q_txt = jnp.broadcast_to(q_txt, (*batch, *q_txt.shape[-3:]))
            inside, total = masses(q_txt, k_img, jnp.broadcast_to(key_region, (*batch, key_region.shape[-1])))
            extra = {"acd_map": attention_map(q_txt, k_img)} if self.options.acd_map else {}
            return {"acd_inside": inside, "acd_total": total, **extra}

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(report))
        for name, value in jax.lax.cond(layer >= first, report, lambda: zeros).items():
            self.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


class GELU(Part):
    """The widening half of a feed-forward, `gelu(x W)` with the tanh form."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b N D"]) -> Float[Array, "*b N 4D"]:
        return nn.gelu(self.linear(4 * self.config.width, "proj")(x), approximate=True)


class FeedForward(Part):
    @nn.compact
    def __call__(self, x: Float[Array, "*b N D"]) -> Float[Array, "*b N D"]:
        return self.linear(self.config.width, "net_2")(self.part(GELU, "net_0")(x))


class DoubleBlock(Part):
    """Text and image streams with weights of their own and one joint attention; a step of `nn.scan`."""

    options: AttentionOptions

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], layer: Array, around: Surroundings):
        text, image = keep_whole(*streams)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.part(Modulation, "norm1", 6)(around.vec)
        shift_t, scale_t, gate_t, shift_mlp_t, scale_mlp_t, gate_mlp_t = self.part(Modulation, "norm1_context", 6)(
            around.vec
        )
        attended_text, attended_image = self.part(Attention, "attn", self.options, True)(
            modulate(text, shift_t, scale_t), modulate(image, shift, scale), around=around, layer=layer
        )
        image = image + gate[..., None, :] * attended_image
        text = text + gate_t[..., None, :] * attended_text
        image_mlp = self.part(FeedForward, "ff")(modulate(image, shift_mlp, scale_mlp))
        text_mlp = self.part(FeedForward, "ff_context")(modulate(text, shift_mlp_t, scale_mlp_t))
        return keep_whole(text + gate_mlp_t[..., None, :] * text_mlp, image + gate_mlp[..., None, :] * image_mlp), None


class SingleBlock(Part):
    """One stream [text, target, reference], attention and MLP side by side; a step of `nn.scan`."""

    options: AttentionOptions

    @nn.compact
    def __call__(self, x: Array, layer: Array, around: Surroundings):
        (x,) = keep_whole(x)
        shift, scale, gate = self.part(Modulation, "norm", 3)(around.vec)
        modulated = modulate(x, shift, scale)
        (attended,) = self.part(Attention, "attn", self.options, False)(modulated, around=around, layer=layer)
        mlp = nn.gelu(self.linear(4 * self.config.width, "proj_mlp")(modulated), approximate=True)
        (x,) = keep_whole(x + gate[..., None, :] * self.linear(self.config.width, "proj_out")(attended, mlp))
        return x, None


class MMDiT(nn.Module):
    """FLUX.1-Kontext's velocity `v_theta(x, sigma, c)`.

    Attributes:
        config: Sizes.
        dtype: Compute dtype; norms of q and k, softmax and rotary embedding are fp32 in any case.
        param_dtype: Dtype of freshly initialised parameters.
        remat: A name of `REMAT_POLICIES`, applied to each block.
        attention: How blocks attend and what they report.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionOptions = AttentionOptions()

    def _stack(self, block: type[Part], length: int, name: str) -> nn.Module:
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=length,
        )
        return scanned(self.config, self.dtype, self.param_dtype, self.attention, name=name)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b N_img C"],
        sigma: Float[Array, "*b"],
        condition: Condition,
        grid: tuple[int, int],
        region: Float[Array, "*b N_img"] | None = None,
        own: Own | None = None,
    ) -> Float[Array, "*b N_img C"]:
        """The velocity `noise - data` at the target tokens.

        Args:
            x: Packed noisy latents of the target image.
            sigma: Time in [0, 1]; 1 is noise.
            condition: Text, pooled vector, reference latents and guidance.
            grid: Static (rows, columns) of tokens, of target and reference alike.
            region: Edit mask on the token grid, in [0, 1]. If given, the last `acd_layers` blocks sow ACD masses.
            own: If given, `x` is a group `[G, N_img, C]` that shares all other tokens, one time and one condition; the
                others have no leading axes, and masses are sown as `[G, N_txt]`.

        Returns:
            float32 velocity.
        """
        width, num_img, num_text = self.config.width, x.shape[-2], condition.text.shape[-2]
        if condition.reference.shape[-2] != num_img or grid[0] * grid[1] != num_img:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} tokens needs as many target and reference tokens; "
                f"found {num_img} and {condition.reference.shape[-2]}"
            )
        shared = (self.config, self.dtype, self.param_dtype)
        vec = TimeTextEmbed(*shared, name="time_text_embed")(sigma, condition)
        angles = rope.angles(rope.kontext_ids(num_text, grid), self.config.axes_dims_rope, self.config.rope_theta)
        tokens, layout = _image_tokens(x, condition.reference.astype(x.dtype)), None
        if own is not None:
            layout = _group_layout(own, len(x), num_text)
            packed = slice(num_text, None)  # text is the first candidate's
            tokens = tokens[layout.candidate[packed], layout.position[packed] - num_text]
            angles = angles[layout.position]
        image = Linear(width, self.dtype, self.param_dtype, name="x_embedder")(tokens)
        text = Linear(width, self.dtype, self.param_dtype, name="context_embedder")(condition.text)

        doubles, singles = self.config.num_layers, self.config.num_single_layers
        around = Surroundings(vec, angles, region, layout)
        if doubles:
            blocks = self._stack(DoubleBlock, doubles, "transformer_blocks")
            (text, image), _ = blocks((text, image), jnp.arange(doubles), around)
        stream = jnp.concatenate([text, image], axis=-2)
        if singles:
            blocks = self._stack(SingleBlock, singles, "single_transformer_blocks")
            stream, _ = blocks(stream, doubles + jnp.arange(singles), around)
        target = slice(num_text, num_text + num_img)
        if layout is None:
            stream = stream[..., target, :]
        scale, shift = Modulation(*shared, 2, name="norm_out")(vec)
        out = modulate(stream, shift, scale)
        out = Linear(self.config.in_channels, self.dtype, self.param_dtype, name="proj_out")(out)
        if layout is not None:
            out = sharing.unpack(out, layout)[:, target]
        return out.astype(jnp.float32)


def _image_tokens(x: Float[Array, "*b N C"], reference: Float[Array, "*c N C"]) -> Float[Array, "*b 2N C"]:
    """Target and reference; a group has one reference."""
    return jnp.concatenate([x, jnp.broadcast_to(reference, x.shape)], axis=-2)


def _group_layout(own: Own, group: int, num_text: int) -> sharing.Layout:
    """That of [text, target, reference]."""
    text = jnp.zeros(num_text, bool)
    return sharing.layout(jnp.concatenate([text, own.target, own.reference]), group, own.size)


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
