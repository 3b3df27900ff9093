"""The configuration of a run of supervised training, made of `sft.options`, and the check of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ml_collections import ConfigDict

from rcgrpo_jax.data import buckets
from rcgrpo_jax.models.quantization import NONE
from rcgrpo_jax.options import read_options
from rcgrpo_jax.parallel.mesh import AXES, SAMPLE_AXES, mesh_shape
from rcgrpo_jax.runs.fields import (
    COUNT,
    LARGE,
    LONGEST_SIDE,
    MODEL_CHOICES,
    SHARED_RANGES,
    STEPS,
    cache_problems,
    check_fields,
    flatten,
    mask_problems,
    quantization_problems,
    refusal,
    schedule_problems,
    size_problems,
    value_problems,
)
from rcgrpo_jax.runs.writers import writer_problems
from rcgrpo_jax.sft.options import Options

# Fields that may differ between a checkpoint and the run that resumes it: they do not touch what is learned.
MAY_DIFFER = ("save_dtype", "train", "mesh", "model.attention", "model.remat", "data.cache", "batch.micro_batch")


def default_config() -> ConfigDict:
    """Every field of `sft.options.Options`; groups that `rcgrpo train` has too mean the same there."""
    return ConfigDict(asdict(Options()))


FREE = ()  # groups whose fields the user names
_CHOICES = {**MODEL_CHOICES, "stage": ("vae", "flow", "lora"), "save_dtype": ("float32", "float16", "bfloat16")}
_RANGES = {
    **SHARED_RANGES,
    "batch.size": (1, COUNT), "batch.micro_batch": (0, COUNT), "vae.crop": (0, LONGEST_SIDE),
    "vae.kl_weight": (0, LARGE), "flow.region_weight": (0, LARGE), "flow.extra_shift": (-10, 10),
    "flow.picture_steps": (1, STEPS),
}  # fmt: skip


def saved_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a configuration that was saved with a run, a line each.

    Args:
        values: Dotted field -> value, of all fields.
    """
    problems = value_problems(values, flatten(default_config().to_dict()), _CHOICES, _RANGES)
    return problems or size_problems(values["data.size"])


def validate(config: ConfigDict, num_devices: int) -> None:
    """Refuses a configuration that cannot run, before any weight is read.

    Raises:
        UsageError: With every problem found, a line each.
    """
    problems = check_fields(config, default_config(), _CHOICES, _RANGES)
    if config.data.path == "":
        problems.append("data.path: empty; a path was wanted")
    if config.model.path == "" and config.stage != "vae":
        problems.append(f"model.path: empty; stage {config.stage} starts from a model folder")
    if config.lora.init and config.stage != "lora":
        problems.append(f"lora.init: {config.lora.init!r} found; stage {config.stage} trains no LoRA")
    if config.model.quantization != NONE and config.stage != "lora":
        problems.append(
            f"model.quantization: {config.model.quantization!r} found; stage {config.stage} trains the kernels: none"
        )
    if config.data.buckets != buckets.NONE and config.stage != "lora":
        problems.append(
            f"data.buckets: {config.data.buckets!r} found; stage {config.stage} brings all to one size: {buckets.NONE}"
        )
    if problems := problems or _problems_together(read_options(Options, config), num_devices):
        raise refusal(problems)


def _problems_together(options: Options, num_devices: int) -> list[str]:
    batch, data, crop = options.batch, options.data, options.vae.crop
    problems = cache_problems(data) + size_problems(data.size) + mask_problems(data)
    problems += writer_problems(options.train.writers) + quantization_problems(options.model)
    problems += schedule_problems(options.optimizer, options.train.num_steps)
    shape = dict(zip(AXES, mesh_shape(vars(options.mesh), num_devices), strict=True))
    spread = math.prod(shape[axis] for axis in SAMPLE_AXES)
    micro = batch.micro_batch or batch.size
    if batch.size % micro or micro % spread:
        problems.append(
            f"batch.size: {batch.size} in micro-batches of {micro} does not divide over data x fsdp = {spread} devices"
        )
    if crop % 16 or crop > min(data.size):
        problems.append(f"vae.crop: {crop}; a multiple of 16 up to {min(data.size)} was wanted")
    return problems
