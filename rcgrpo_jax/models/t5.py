"""The T5 v1.1 encoder, whose token sequence FLUX attends to.

Differs from the common transformer in four ways: RMS norms without mean or bias, logits that are not scaled by
`1 / sqrt(D)`, a bias learned for each head and bucket of relative position in place of position embeddings, and a
feed-forward gated by a tanh GELU. A leaf's path, joined with dots, is its transformers key, with two exceptions: blocks
are stacked on a leading axis (`encoder/block`), and the relative bias, which torch keeps in its block 0, stands
beside them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rcgrpo_jax.models.config import T5Config

# The transformers key of the leaf `encoder/relative_attention_bias/embedding`.
RELATIVE_BIAS_KEY = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "N N"]:
    """The bucket of `key position - query position` for bidirectional attention (Raffel et al., section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half count single positions and the rest
    widen logarithmically up to `max_distance`, beyond which all positions share the last one. The buckets are computed
    in numpy, as constants: an accelerator's approximate logarithm would move the edges.

    Args:
        length: N, the number of tokens.
        num_buckets: The number of buckets of both directions together.
        max_distance: The distance in tokens from which on all positions share a bucket.

    Returns:
        `[N, N]` (query, key) int32 in `0 .. num_buckets - 1`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance, one_way = np.abs(offset), num_buckets // 2
    exact = one_way // 2
    octaves = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / np.float32(
        math.log(max_distance / exact)
    )
    widening = np.minimum(exact + (octaves * (one_way - exact)).astype(np.int32), one_way - 1)
    return (np.where(distance < exact, distance, widening) + one_way * (offset > 0)).astype(np.int32)


class _Module(nn.Module):
    """What every part of the encoder knows."""

    config: T5Config
    dtype: Any
    param_dtype: Any

    @property
    def dtypes(self) -> dict[str, Any]:
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)


class _SelfAttention(_Module):
    """`softmax(q k^T + bias) v`, without a scale and without a mask."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], bias: Float[Array, "1 H N N"]) -> Float[Array, "B N C"]:
        heads, head_dim = self.config.num_heads, self.config.d_kv
        dense = partial(nn.Dense, use_bias=False, **self.dtypes)
        q, k, v = (dense(heads * head_dim, name=name)(x).reshape(*x.shape[:2], heads, head_dim) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0, implementation="xla")
        return dense(self.config.d_model, name="o")(out.reshape(*x.shape[:2], heads * head_dim))


class _GatedFeedForward(_Module):
    """`wo (gelu_tanh(wi_0 x) * wi_1 x)`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        dense = partial(nn.Dense, use_bias=False, **self.dtypes)
        gate = nn.gelu(dense(self.config.d_ff, name="wi_0")(x), approximate=True)
        return dense(self.config.d_model, name="wo")(gate * dense(self.config.d_ff, name="wi_1")(x))


class _Sublayer(_Module):
    """`x + inner(norm(x))`, where `inner` is named as in transformers."""

    inner: type[nn.Module]
    inner_name: str

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], *args: Array) -> Float[Array, "B N C"]:
        h = nn.RMSNorm(self.config.layer_norm_epsilon, **self.dtypes, name="layer_norm")(x)
        return x + self.inner(self.config, **self.dtypes, name=self.inner_name)(h, *args)


class _Block(_Module):
    """Attention, then the feed-forward; written as a step of `nn.scan`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], bias: Float[Array, "1 H N N"]) -> tuple[Float[Array, "B N C"], None]:
        sublayer = partial(_Sublayer, self.config, self.dtype, self.param_dtype)
        x = sublayer(_SelfAttention, "SelfAttention", name="layer_0")(x, bias)
        return sublayer(_GatedFeedForward, "DenseReluDense", name="layer_1")(x), None


class _Stack(_Module):
    """The relative bias, the scanned blocks that share it, and the last norm."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        config = self.config
        buckets = relative_position_buckets(
            x.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        table = nn.Embed(
            config.relative_attention_num_buckets, config.num_heads, **self.dtypes, name="relative_attention_bias"
        )
        bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        blocks = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )
        x, _ = blocks(config, **self.dtypes, name="block")(x, bias)
        return nn.RMSNorm(config.layer_norm_epsilon, **self.dtypes, name="final_layer_norm")(x)


class T5Encoder(nn.Module):
    """Embeds token sequences; padding is a token like any other, as FLUX passes no attention mask.

    Attributes:
        config: Widths, depth and buckets.
        dtype: The dtype of matrix products and results; the residual stream, norms and softmax are fp32 always.
        param_dtype: The dtype of the parameters.
    """

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "... N"]) -> Float[Array, "... N C"]:
        """Encodes tokens.

        Args:
            tokens: `[..., N]` int32 in `0 .. vocab_size - 1`; FLUX pads to N = 512.

        Returns:
            `[..., N, d_model]` in `dtype`.
        """
        config, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.Embed(config.vocab_size, config.d_model, **dtypes, name="shared")(tokens.reshape(-1, tokens.shape[-1]))
        # T5's residual stream grows to thousands, where bf16 would swallow what a block adds.
        x = _Stack(config, **dtypes, name="encoder")(x.astype(jnp.float32))
        return x.reshape(*tokens.shape, config.d_model)
