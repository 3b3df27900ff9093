"""What a run cannot do without, in bytes, counted from its configuration before weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.models.lora import target_kernels
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import abstract_params

FLOAT32 = 4


def check_rollout(config: ConfigDict, folder: ModelFolder) -> None:
    """Refuses post-training whose groups or LoRA are larger than the memory of all that takes part.

    Raises:
        UserError: With the field that asks for it.
    """
    options, candidate = config.rollout, candidate_bytes(config, folder, config.rollout.num_steps)
    check_picture(config, folder)
    check_memory(
        f"rollout: {options.prompts} prompts x {options.group_size} candidates of {options.num_steps} steps",
        options.prompts * options.group_size * candidate,
        "Lower rollout.prompts, rollout.group_size, rollout.num_steps or data.size.",
    )
    check_lora(config, folder)


def check_stage(config: ConfigDict, folder: ModelFolder) -> None:
    """Refuses supervised training whose batch, pictures or parameters are larger than that.

    Raises:
        UserError: With the field that asks for it.
    """
    height, width = config.data.size
    check_picture(config, folder)
    check_memory(
        f"batch.size: {config.batch.size} sources and targets of {height} x {width} pixels",
        config.batch.size * 2 * 3 * height * width,
        "Lower batch.size or data.size.",
    )
    check_memory(
        f"flow.picture_steps: {config.flow.picture_steps} of {height} x {width} pixels",
        candidate_bytes(config, folder, config.flow.picture_steps),
        "Lower flow.picture_steps or data.size.",
    )
    if config.stage == "lora":
        check_lora(config, folder)


def check_picture(config: ConfigDict, folder: ModelFolder) -> None:
    height, width = config.data.size
    what = f"data.size: a picture of {height} x {width} pixels"
    check_memory(what, candidate_bytes(config, folder, 1), "Choose a smaller data.size.")


def check_lora(config: ConfigDict, folder: ModelFolder) -> None:
    """Counts `A` and `B` of every target, their gradients and two moments, and the average if one is kept."""
    params = abstract_params("transformer", folder.config("transformer"))
    numbers = adapter_numbers(target_kernels(params, config.lora.targets).values(), config.lora.rank)
    check_memory(
        f"lora.rank: {config.lora.rank}, with gradients and moments,",
        numbers * FLOAT32 * (5 if config.optimizer.ema_decay else 4),
        "Choose a smaller rank, or fewer lora.targets.",
    )


def adapter_numbers(kernels: Iterable[jax.ShapeDtypeStruct | Any], rank: int) -> int:
    """How many numbers `A [..., in, r]` and `B [..., r, out]` have for all kernels `[..., in, out]`."""
    return sum(math.prod(x.shape[:-2]) * (x.shape[-2] + x.shape[-1]) * rank for x in kernels)


def candidate_bytes(config: ConfigDict, folder: ModelFolder, num_steps: int) -> int:
    """A candidate's states `[K + 1, N, C]` and its picture `[H, W, 3]`, float32."""
    height, width = config.data.size
    side = 2 * folder.config("vae").downscale  # of a token, pixels
    tokens = (height // side) * (width // side)
    return FLOAT32 * ((num_steps + 1) * tokens * folder.config("transformer").in_channels + 3 * height * width)
