"""What a run cannot do without, in bytes, counted from its configuration before weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.data.buckets import NONE, make_buckets
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.lora import LoRAConfig, target_kernels
from rcgrpo_jax.options import DataOptions

FLOAT32 = 4


def check_picture(size: tuple[int, int], model: Model) -> None:
    """Counts a picture of (height, width) pixels and its latents."""
    height, width = size
    what = f"data.size: a picture of {height} x {width} pixels"
    check_memory(what, candidate_bytes(size, model, 1), "Choose a smaller data.size.")


def check_tokens(data: DataOptions, side: int) -> None:
    """Refuses pictures that are no whole number of tokens, of `side` pixels each.

    Raises:
        UsageError: With the field that asks for them.
    """
    sizes = make_buckets(data.buckets, data.size).sizes
    if all(x % side == 0 for size in sizes for x in size):
        return
    if data.buckets == NONE:
        found, remedy = f"data.size: {data.size}", f"Choose multiples of {side}."
    else:
        found, remedy = f"data.buckets: {data.buckets}, of multiples of 16 pixels", f"Set data.buckets={NONE}."
    raise UsageError(f"config: {found}; this model's tokens are {side} pixels a side.", remedy)


def check_lora(lora: LoRAConfig, copies: int, model: Model) -> None:
    """Counts `A` and `B` of every target, their gradients, two moments, and copies: an average, an old adapter."""
    numbers = adapter_numbers(target_kernels(model.param_shapes, lora.targets).values(), lora.rank)
    check_memory(
        f"lora.rank: {lora.rank}, with gradients and moments,",
        numbers * FLOAT32 * (4 + copies),
        "Choose a smaller rank, or fewer lora.targets.",
    )


def adapter_numbers(kernels: Iterable[jax.ShapeDtypeStruct | Any], rank: int) -> int:
    """How many numbers `A [..., in, r]` and `B [..., r, out]` have for all kernels `[..., in, out]`."""
    return sum(math.prod(x.shape[:-2]) * (x.shape[-2] + x.shape[-1]) * rank for x in kernels)


def candidate_bytes(size: tuple[int, int], model: Model, num_steps: int) -> int:
    """A candidate's states `[K + 1, N, C]` and its picture `[H, W, 3]`, float32."""
    (height, width), sizes = size, model.sizes
    tokens = (height // sizes.token_pixels) * (width // sizes.token_pixels)
    return FLOAT32 * ((num_steps + 1) * tokens * sizes.channels + 3 * height * width)
