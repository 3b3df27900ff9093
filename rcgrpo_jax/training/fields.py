"""Checks of a configuration against its defaults: names, choices and ranges; what all kinds of training share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from rcgrpo_jax.data.masks import check_marking
from rcgrpo_jax.errors import UsageError, nearest
from rcgrpo_jax.models.attention import AUTO, IMPLEMENTATIONS
from rcgrpo_jax.models.mmdit import REMAT_POLICIES
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS

Choices = Mapping[str, Sequence[str]]
Ranges = Mapping[str, tuple[float, float]]  # field -> (lowest, highest), both allowed

MODEL_CHOICES: Choices = {
    "model.dtype": ("bfloat16", "float32"),
    "model.quantization": QUANTIZATIONS,
    "model.attention": (AUTO, *IMPLEMENTATIONS),
    "model.remat": tuple(REMAT_POLICIES),
    "data.polarity": ("white", "black"),
}
SHARED_RANGES: Ranges = {
    "seed": (0, 2**32 - 1), "model.max_text_tokens": (0, 512), "model.guidance": (0, math.inf),
    "lora.rank": (1, math.inf), "lora.alpha": (1e-9, math.inf),
    "optimizer.learning_rate": (0, math.inf), "optimizer.warmup_steps": (0, math.inf),
    "optimizer.decay_steps": (0, math.inf), "optimizer.weight_decay": (0, math.inf), "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999), "optimizer.eps": (1e-30, 1), "optimizer.max_grad_norm": (1e-9, math.inf),
    "optimizer.ema_decay": (0, 0.99999),
    "train.num_steps": (1, math.inf), "train.save_every": (1, math.inf), "train.keep": (1, math.inf),
    "train.image_every": (1, math.inf), "train.profile_steps": (0, math.inf),
}  # fmt: skip


def check_fields(
    config: ConfigDict, default: ConfigDict, choices: Choices, ranges: Ranges, free: Sequence[str] = ()
) -> list[str]:
    """The problems that one field at a time can have, a line each.

    Args:
        config: What the user gave.
        default: Has every field.
        choices: Field -> values allowed.
        ranges: Field -> lowest and highest value allowed.
        free: Groups whose fields the user names.

    Raises:
        UsageError: If fields are missing: nothing else can be checked then.
    """
    known, found = _fields(default, free), _fields(config, free)
    if missing := sorted(known - found):
        raise refusal([f"{field}: missing" for field in missing])
    problems = [_unknown(field, known) for field in sorted(found - known)]
    problems += [
        f"{field}: {get_field(config, field)!r} found; one of {', '.join(allowed)} was wanted"
        for field, allowed in choices.items()
        if get_field(config, field) not in allowed
    ]
    for field, (low, high) in ranges.items():
        value = get_field(config, field)
        if not isinstance(value, (int, float)) or not low <= value <= high:
            wanted = f"{low} {'or more' if high == math.inf else f'to {high}'}"
            problems.append(f"{field}: {value!r} found; {wanted} was wanted")
    return problems


def refusal(problems: Sequence[str]) -> UsageError:
    """The error that names all problems."""
    return UsageError(
        "config: " + "\n        ".join(problems), "Correct these fields in the file or with --config.FIELD=VALUE."
    )


def get_field(config: ConfigDict, field: str) -> Any:
    """The value of a dotted field."""
    value = config
    for name in field.split("."):
        value = value[name]
    return value


def size_problems(config: ConfigDict) -> list[str]:
    """What is wrong with `data.size`."""
    sides = config.data.size
    if len(sides) == 2 and all(isinstance(side, int) and side >= 16 and side % 16 == 0 for side in sides):
        return []
    return [f"data.size: {tuple(sides)}; two multiples of 16 pixels were wanted"]


def mask_problems(config: ConfigDict) -> list[str]:
    """What is wrong with `data.polarity` and `data.mask_value` together."""
    try:
        check_marking(config.data.polarity, config.data.mask_value, ("data.polarity", "data.mask_value"))
    except UsageError as error:
        return [error.problem.removesuffix(".")]
    return []


def cache_problems(config: ConfigDict) -> list[str]:
    """What is wrong with `data.cache`: the folder of a URL would be made on this machine's disk."""
    found = config.data.cache
    return [f"data.cache: {found!r} found; a directory was wanted, such as that of a mounted bucket"] * ("://" in found)


def quantization_problems(config: ConfigDict) -> list[str]:
    """What is wrong with `model.quantization` in training."""
    if config.model.quantization == NONE or config.model.remat != "none":
        return []
    return [
        f"model.remat: none with model.quantization={config.model.quantization}; full or dots was wanted, or the "
        "backward pass keeps the dequantised kernels of all blocks"
    ]


def schedule_problems(config: ConfigDict, updates: int) -> list[str]:
    """What is wrong with `optimizer.decay_steps` for that many updates in all."""
    decay, end = config.optimizer.decay_steps, config.optimizer.warmup_steps + config.optimizer.decay_steps
    if not decay or updates <= end:
        return []
    return [
        f"optimizer.decay_steps: {decay} ends the learning at update {end} of {updates}; at least "
        f"{updates - config.optimizer.warmup_steps}, or 0 for no decay, was wanted"
    ]


def _fields(config: ConfigDict, free: Sequence[str]) -> set[str]:
    return {name for name in flatten_dict(config.to_dict(), sep=".") if name.split(".")[0] not in free}


def _unknown(field: str, known: set[str]) -> str:
    """A ConfigDict takes any new field: a misspelt one in a file would leave the default in force."""
    near = nearest(field, known)
    return f"{field}: no such field" + (f"; did you mean {near}?" if near else "")
