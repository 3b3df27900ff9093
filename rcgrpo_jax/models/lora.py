"""Low-rank adaptation: a linear layer that reads an optional `lora` collection, and the trees that fill it.

The base parameters stay in the `params` collection exactly as without an adapter. An adapter is a second collection
with two leaves, `A [..., in, r]` and `B [..., r, out]`, beside each adapted kernel; a layer adapts itself where it
finds them. The leading axis is the layer, for blocks stacked by `nn.scan`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.quantization import QuantizedKernel, dequantize

_ATTENTION = r"attn/(to_q|to_k|to_v|to_out_0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)/(net_0/proj|net_2)|proj_mlp"
TARGETS = {
    "attention": rf".*_blocks/{_ATTENTION}",  # the paper's set
    "attention+mlp": rf".*_blocks/({_ATTENTION}|{_MLP})",
    "all-linear": rf".*_blocks/({_ATTENTION}|{_MLP}|proj_out)",
}


class Linear(nn.Module):
    """`x W + b`, plus `(x A) B` where the `lora` collection holds `A` and `B` for this layer (Hu et al. 2021).

    `B` comes multiplied by alpha / r (`scale_adapter`), so that the network knows nothing of ranks and scales. `W` may
    come quantised (`models.quantization`).
    """

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, *parts: Float[Array, "*b part"]) -> Float[Array, "*b out"]:
        """`x` may come in parts, side by side: each meets its rows of `W`, and nothing is joined in memory."""
        ends = np.cumsum([x.shape[-1] for x in parts])
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, QuantizedKernel):
            kernel = dequantize(kernel, self.dtype)
        else:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (ends[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)

        def times(weights: Float[Array, "in k"]) -> Float[Array, "*b k"]:
            rows = jnp.split(weights.astype(self.dtype), ends[:-1])
            return sum(x.astype(self.dtype) @ w for x, w in zip(parts, rows, strict=True))

        y = times(kernel)
        y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("lora", "A"):
            y = y + times(self.get_variable("lora", "A")) @ self.get_variable("lora", "B").astype(self.dtype)
        return y


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, scale and target set of an adapter."""

    rank: int = 64  # r, columns of A
    alpha: float = 128.0  # the update is alpha / r times A B
    targets: str = "attention"  # a name of `TARGETS`, or a regular expression over kernel paths such as ".*/attn/to_q"
    init: str = ""  # a LoRA file that training starts from; empty: A random, B = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def target_kernels(params: Mapping, targets: str) -> dict[tuple[str, ...], Any]:
    """The kernels `path -> leaf` that a target set adapts, in the order of the tree.

    Raises:
        UsageError: If nothing matches, or the regular expression does not compile.
    """
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"lora.targets: {targets!r} is not a regular expression ({error}).",
            f"Use one of {sorted(TARGETS)}, or an expression over paths such as '.*/attn/to_q'.",
        ) from None
    found = {
        path[:-1]: leaf
        for path, leaf in flatten_dict(params).items()
        if path[-1] == "kernel" and pattern.fullmatch("/".join(path[:-1]))
    }
    if not found:
        raise UsageError(
            f"lora.targets: {targets!r} matches no linear layer of the transformer.",
            f"Use one of {sorted(TARGETS)}, or an expression over paths such as '.*/attn/to_q'.",
        )
    return found


def init_adapter(key: Array, params: Mapping, config: LoRAConfig) -> dict:
    """A fresh adapter for base `params`: `A ~ U(-1/sqrt(in), 1/sqrt(in))` as PEFT draws it, `B = 0`.

    With `B = 0` the adapted network equals the base bit for bit.

    Args:
        key: Random key.
        params: Parameters of the transformer (arrays or shapes), blocks stacked on a leading axis.
        config: Rank and targets.

    Returns:
        The tree of the `lora` collection, fp32.
    """
    adapter = {}
    for i, (path, kernel) in enumerate(target_kernels(params, config.targets).items()):
        *stack, fan_in, fan_out = kernel.shape
        bound = fan_in**-0.5
        adapter[(*path, "A")] = jax.random.uniform(
            jax.random.fold_in(key, i), (*stack, fan_in, config.rank), jnp.float32, -bound, bound
        )
        adapter[(*path, "B")] = jnp.zeros((*stack, config.rank, fan_out), jnp.float32)
    return unflatten_dict(adapter)


def start_from(fresh: Mapping, given: Mapping, config: LoRAConfig) -> dict:
    """A fresh adapter made to compute what another does: (alpha / r) A B is the other's update.

    The other's factors come first; what it leaves free, a smaller rank, a layer or a kernel, keeps its fresh A and
    B = 0, so that it can learn.

    Args:
        fresh: From `init_adapter`.
        given: Adapter of the same transformer with its scale folded in, of any ranks.
        config: Of the fresh one.

    Raises:
        UsageError: If the other adapts kernels outside `config.targets`, or has a higher rank.
    """
    flat, others = flatten_dict(fresh), flatten_dict(given)
    if outside := sorted({"/".join(path[:-1]) for path in others if path not in flat}):
        raise UsageError(
            f"lora.init: {config.init} adapts {len(outside)} kernels outside lora.targets = {config.targets!r}: "
            f"{', '.join(outside[:4])}{', ...' if len(outside) > 4 else ''}.",
            "Choose targets that hold them all, such as all-linear.",
        )
    rank = max((x.shape[-1] for path, x in others.items() if path[-1] == "A"), default=0)
    if rank > config.rank:
        raise UsageError(
            f"lora.init: {config.init} has rank {rank}; lora.rank is {config.rank}.",
            f"Set lora.rank to {rank} or more.",
        )
    started = {path: np.array(x) for path, x in flat.items()}
    for path in {path[:-1] for path in others}:
        a, b = others[(*path, "A")], others[(*path, "B")]
        used = np.any(a != 0, axis=-2, keepdims=True) | np.any(b != 0, axis=-1)[..., None, :]
        first = started[(*path, "A")][..., : a.shape[-1]]
        started[(*path, "A")][..., : a.shape[-1]] = np.where(used, a, first)
        started[(*path, "B")][..., : a.shape[-1], :] = b / np.float32(config.scale)
    return unflatten_dict(started)


def scale_adapter(adapter: Mapping, scale: float) -> dict:
    """The adapter with every `B` multiplied by `scale` = alpha / r, as `Linear` expects it."""
    return unflatten_dict({p: x * scale if p[-1] == "B" else x for p, x in flatten_dict(adapter).items()})
