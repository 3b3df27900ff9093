"""Attention by name of its implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rcgrpo_jax.errors import UsageError

BLOCKS = (1024, 512, 256, 128)  # tokens of a tile of the TPU kernel, the largest that divides is taken
# Of its backward pass in one kernel: bytes of a tile of keys, which v4's 16 MiB of vector memory hold with all else
# (2560 tokens of FLUX in bfloat16), and how many tiles there may be.
KEYS_TILE, KEYS_TILES = 640 * 2**10, 4


def _xla(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _flash(q: Array, k: Array, v: Array) -> Array:
    """Flash attention (Dao 2023) in tiles of one head, whose logits stay in a CPU's cache, forward and backward."""

    def local(*heads: Array) -> Array:
        return jnp.moveaxis(_flash_heads(*(jnp.moveaxis(x, 2, 0) for x in heads)), 0, 2)

    return _over_heads(local, q, k, v)


@jax.custom_vjp
def _flash_heads(
    q: Float[Array, "H b N D"], k: Float[Array, "H b M D"], v: Float[Array, "H b M D"]
) -> Float[Array, "H b N D"]:
    return _flash_forward(q, k, v)[0]


def _flash_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    """The attended values; and what the gradients need: the inputs, these values, `log sum exp` of the scores."""

    def head(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = inputs
        s = _scores(q, k)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        o = jnp.einsum("bnm,bmd->bnd", p.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return o.astype(v.dtype), top + jnp.log(total)

    o, log_total = jax.lax.map(head, (q, k, v))
    return o, (q, k, v, o, log_total)


def _flash_backward(kept: tuple[Array, ...], do: Array) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values from `do`, that of the attended values; the scores are computed again."""

    def head(inputs: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, o, log_total, do = inputs
        p = jnp.exp(_scores(q, k) - log_total)
        dv = jnp.einsum("bnm,bnd->bmd", p.astype(v.dtype), do)
        dp = jnp.einsum("bnd,bmd->bnm", do, v, preferred_element_type=jnp.float32)
        mean = jnp.einsum("bnd,bnd->bn", o, do, preferred_element_type=jnp.float32)[..., None]  # of dp, under p
        ds = (p * (dp - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        return jnp.einsum("bnm,bmd->bnd", ds, k), jnp.einsum("bnm,bnd->bmd", ds, q), dv

    return jax.lax.map(head, (*kept, do))


def _scores(q: Float[Array, "b N D"], k: Float[Array, "b M D"]) -> Float[Array, "b N M"]:
    return jnp.einsum("bnd,bmd->bnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)


_flash_heads.defvjp(_flash_forward, _flash_backward)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    """cuDNN's fused attention; it needs a GPU, and bfloat16 or float16.

    Under `vmap` JAX's own rule folds the mapped axis into the batch, if queries, keys and values all carry it and
    gradients are taken outside, as in the rollout and the update. Up to jax 0.11 any other `vmap` raises.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """JAX's Pallas kernel for TPU (splash attention), forward and backward.

    The compiler cannot look into it, and is told how it is split.
    """
    return _over_heads(partial(_splash_local, interpret=interpret), q, k, v)


def _over_heads(local: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array) -> Array:
    """`local` on each device's heads, which lie over `tensor`; samples lie wherever the mapped axis around it does."""
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v)
    spec = P(None, None, "tensor", None)
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(q, k, v)


def _splash_local(
    q: Float[Array, "b N H D"], k: Float[Array, "b M H D"], v: Float[Array, "b M H D"], interpret: bool = False
) -> Float[Array, "b N H D"]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = q * q.shape[-1] ** -0.5
    q, k, v = (_pad(x).swapaxes(1, 2) for x in (q, k, v))  # [b, H, N', D]
    size_q, size_kv = (_tile(x.shape[2]) for x in (q, k))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=size_q, block_kv=size_kv, block_kv_compute=size_kv, **_backward_tiles(q, k)
        ),
        interpret=interpret,
    )
    segments = None
    if (tokens, keys) != (q.shape[2], k.shape[2]):  # padding sees padding alone
        segments = splash.SegmentIds(
            *((jnp.arange(x.shape[2]) >= n).astype(jnp.int32) for x, n in ((q, tokens), (k, keys)))
        )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :tokens].astype(v.dtype)


def _tile(tokens: int, largest: int = BLOCKS[0]) -> int:
    return next(block for block in BLOCKS if block <= largest and tokens % block == 0)


def _backward_tiles(q: Float[Array, "b H N D"], k: Float[Array, "b H M D"]) -> dict[str, int | bool]:
    """Tiles of the TPU kernel's backward pass: one kernel of five products, or two of seven.

    The one keeps a gradient of all queries for each tile of keys until they are summed. Its tiles of keys are large,
    therefore, and where few of them do not hold all keys there are two kernels.
    """
    queries, keys = q.shape[2], k.shape[2]
    row = k.dtype.itemsize * max(k.shape[3], BLOCKS[-1])  # bytes; narrow heads are padded
    largest = max(KEYS_TILE // row, BLOCKS[-1])
    size = max(size for size in range(BLOCKS[-1], largest + 1, BLOCKS[-1]) if keys % size == 0)
    if keys // size <= KEYS_TILES:
        return {
            "use_fused_bwd_kernel": True, "block_q_dkv": _tile(queries, 512), "block_kv_dkv": size,
            "block_kv_dkv_compute": _tile(size, 512),
        }  # fmt: skip
    size_q, size_kv = _tile(queries), _tile(keys)
    return {
        "block_q_dkv": size_q, "block_kv_dkv": size_kv, "block_kv_dkv_compute": size_kv, "block_q_dq": size_q,
        "block_kv_dq": size_kv,
    }  # fmt: skip


def _pad(x: Float[Array, "b N H D"]) -> Float[Array, "b M H D"]:
    """Zeros up to a whole number of the smallest tile."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCKS[-1]), (0, 0), (0, 0)))


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "xla": _xla, "flash": _flash, "cudnn": _cudnn, "splash": _splash,
}  # fmt: skip


AUTO = "auto"


def choose(name: str, platform: str, dtype: Any) -> str:
    """The implementation that a name stands for: `auto` is the fastest one of a platform.

    Args:
        name: A name of `IMPLEMENTATIONS`, or `auto`.
        platform: Of the devices, which need not be those of this machine: tpu, gpu or cpu.
        dtype: Of queries, keys and values.

    Raises:
        UsageError: If the platform has no such implementation, or not for this dtype.
    """
    half = jnp.dtype(dtype).itemsize == 2
    served = {  # the fastest first
        "splash": platform == "tpu", "cudnn": platform == "gpu" and half, "flash": platform == "cpu", "xla": True,
    }  # fmt: skip
    if name == AUTO:
        return next(one for one, runs in served.items() if runs)
    if not served[name]:
        wanted = {"splash": "a TPU", "cudnn": "a GPU and bfloat16 or float16", "flash": "a CPU"}[name]
        raise UsageError(
            f"config: model.attention: {name!r} needs {wanted}; found {platform} and {jnp.dtype(dtype).name}.",
            "Set model.attention=auto: the fastest that runs there.",
        )
    return name


def attend(
    q: Float[Array, "*b N H D"], k: Float[Array, "*b M H D"], v: Float[Array, "*b M H D"], implementation: str = "xla"
) -> Float[Array, "*b N H D"]:
    """Unmasked attention `softmax(q k^T / sqrt(D)) v` per head, softmax in fp32.

    Args:
        q, k, v: Queries, keys and values with any number of leading axes.
        implementation: A name of `IMPLEMENTATIONS`.

    Returns:
        The attended values, in the dtype of `q`.

    Raises:
        ValueError: If the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {sorted(IMPLEMENTATIONS)}")
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    return IMPLEMENTATIONS[implementation](*flat).reshape(q.shape)
