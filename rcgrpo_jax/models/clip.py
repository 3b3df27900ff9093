"""The CLIP text transformer, whose pooled vector modulates FLUX, and the layers that CLIP's vision tower shares.

A leaf's path, joined with dots, is its transformers key (with the prefix `text_model`, as released checkpoints have
it); layers are stacked on a leading axis (`text_model/encoder/layers`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rcgrpo_jax.models.config import CLIPTextConfig, CLIPVisionConfig

# Released configurations say `eos_token_id = 2`, which is not the id of their end-of-text token (49407, the largest).
LEGACY_EOS = 2


def eos_position(tokens: Int[Array, "... N"], eos_token_id: int) -> Int[Array, "..."]:
    """Where each sequence ends, by the two conventions of transformers' `CLIPTextModel`.

    Args:
        tokens: `[..., N]` int32.
        eos_token_id: The end-of-text token; 2 means "the largest id of the sequence".

    Returns:
        `[...]` int32 in `0 .. N - 1`: the first occurrence, or 0 where there is none.
    """
    if eos_token_id == LEGACY_EOS:
        return jnp.argmax(tokens, axis=-1)
    return jnp.argmax(tokens == eos_token_id, axis=-1)


def _quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(1.702 x)`, the GELU that CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


class Part(nn.Module):
    """What every part of a tower knows."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: Any
    param_dtype: Any

    @property
    def dtypes(self) -> dict[str, Any]:
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)


class _SelfAttention(Part):
    """Multi-head attention, causal in the text tower."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        dense = partial(nn.Dense, self.config.hidden_size, **self.dtypes)
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (dense(name=name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.config.causal, implementation="xla")
        return dense(name="out_proj")(out.reshape(x.shape))


class _MLP(Part):
    """`fc2 quick_gelu(fc1 x)`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        dense = partial(nn.Dense, **self.dtypes)
        h = _quick_gelu(dense(self.config.intermediate_size, name="fc1")(x))
        return dense(self.config.hidden_size, name="fc2")(h)


class _Layer(Part):
    """Pre-norm attention and MLP, each with its residual; written as a step of `nn.scan`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], _: None) -> tuple[Float[Array, "B N C"], None]:
        norm = partial(nn.LayerNorm, self.config.layer_norm_eps, use_fast_variance=False, **self.dtypes)
        x = x + _SelfAttention(self.config, **self.dtypes, name="self_attn")(norm(name="layer_norm1")(x))
        return x + _MLP(self.config, **self.dtypes, name="mlp")(norm(name="layer_norm2")(x)), None


class _Embeddings(Part):
    """The sum of token and position embeddings."""

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        config, embed = self.config, partial(nn.Embed, **self.dtypes)
        if tokens.shape[-1] > config.max_position_embeddings:  # a lookup past the table would be NaN
            raise ValueError(f"{tokens.shape[-1]} tokens; CLIP has {config.max_position_embeddings} positions.")
        token = embed(config.vocab_size, config.hidden_size, name="token_embedding")(tokens)
        position = embed(config.max_position_embeddings, config.hidden_size, name="position_embedding")
        return token + position(jnp.arange(tokens.shape[-1]))[None]


class Encoder(Part):
    """The scanned layers."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        length = self.config.num_hidden_layers
        layers = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
        return layers(self.config, self.dtype, self.param_dtype, name="layers")(x, None)[0]


class TextModel(Part):
    """Embeddings, encoder, and the last norm at the end-of-text token (the norm acts on each token alone)."""

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B C"]:
        config = self.config
        x = _Embeddings(config, **self.dtypes, name="embeddings")(tokens)
        x = Encoder(config, **self.dtypes, name="encoder")(x)
        x = jnp.take_along_axis(x, eos_position(tokens, config.eos_token_id)[:, None, None], axis=1)[:, 0]
        return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, **self.dtypes, name="final_layer_norm")(x)


class CLIPTextEncoder(nn.Module):
    """The pooled vector of token sequences: the last state of the end-of-text token, which has seen all before it.

    Attributes:
        config: Widths and depth, and which token ends a text.
        dtype: The dtype of activations and results; norms and softmax are computed in fp32 always.
        param_dtype: The dtype of the parameters.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "... N"]) -> Float[Array, "... C"]:
        """Pools tokens.

        Args:
            tokens: `[..., N]` int32, N at most `max_position_embeddings`; FLUX pads to N = 77.

        Returns:
            `[..., hidden_size]` in `dtype`.

        Raises:
            ValueError: If there are more tokens than positions.
        """
        model = TextModel(self.config, self.dtype, self.param_dtype, name="text_model")
        pooled = model(tokens.reshape(-1, tokens.shape[-1]))
        return pooled.reshape(*tokens.shape[:-1], self.config.hidden_size)
