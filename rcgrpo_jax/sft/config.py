"""The configuration of supervised training: every field with its default and unit, and the check of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rcgrpo_jax.models.quantization import NONE
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, mesh_shape
from rcgrpo_jax.rl import config as rl
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

# Fields that may differ between a checkpoint and the run that resumes it: they do not touch what is learned.
MAY_DIFFER = ("save_dtype", "train", "mesh", "model.attention", "model.remat", "data.cache", "batch.micro_batch")


def default_config() -> ConfigDict:
    """Every field of a run; groups that `rcgrpo train` has too mean the same there."""

    def group(**fields: Any) -> ConfigDict:
        return ConfigDict(fields)

    shared = rl.default_config()
    return group(
        stage="lora",  # vae: the autoencoder; flow: transformer and text encoders; lora: an adapter alone
        save_dtype="float32",  # of the files that a run ends with: float32, float16 or bfloat16
        seed=0,  # of new parameters, the order of the data, times and noise
        model=shared.model,  # path may be empty for vae: a new small editor is drawn from the seed
        data=shared.data,
        batch=group(
            size=16,  # examples a step
            micro_batch=0,  # examples differentiated at a time over the whole mesh; 0: all
        ),
        vae=group(
            crop=0,  # side of the random crop that is trained on, pixels; 0: the whole image
            kl_weight=1e-6,  # of the KL to N(0, I), a mean over latent numbers
        ),
        flow=group(
            region_weight=1.0,  # of the mean error inside the mask, added to the mean over the image
            extra_shift=0.0,  # added to the schedule's shift mu for the times of training: above 0, noisier ones
            picture_steps=8,  # solver steps of the pictures
        ),
        lora=shared.lora,
        optimizer=shared.optimizer,
        train=shared.train,
        mesh=shared.mesh,
    )


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
    if not problems:
        problems += cache_problems(config) + size_problems(config.data.size) + mask_problems(config)
        problems += writer_problems(config.train.writers)
        problems += quantization_problems(config)
        problems += schedule_problems(config, config.train.num_steps)
        spread = math.prod(
            size
            for axis, size in zip(("data", "fsdp", "tensor"), mesh_shape(config.mesh, num_devices), strict=True)
            if axis in SAMPLE_AXES
        )
        micro = config.batch.micro_batch or config.batch.size
        if config.batch.size % micro or micro % spread:
            problems.append(
                f"batch.size: {config.batch.size} in micro-batches of {micro} does not divide over "
                f"data x fsdp = {spread} devices"
            )
        if config.vae.crop % 16 or config.vae.crop > min(config.data.size):
            problems.append(f"vae.crop: {config.vae.crop}; a multiple of 16 up to {min(config.data.size)} was wanted")
    if problems:
        raise refusal(problems)
