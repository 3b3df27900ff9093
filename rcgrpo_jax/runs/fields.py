"""Checks of a configuration against its defaults: names, types, choices, ranges; what all kinds of training share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from rcgrpo_jax.borders import is_like, shorten
from rcgrpo_jax.data.buckets import KINDS
from rcgrpo_jax.data.masks import check_marking
from rcgrpo_jax.errors import UsageError, nearest
from rcgrpo_jax.models.attention import AUTO, IMPLEMENTATIONS
from rcgrpo_jax.models.mmdit import REMAT_POLICIES
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.options import DataOptions, ModelOptions, OptimizerOptions

Choices = Mapping[str, Collection[str]]
Ranges = Mapping[str, tuple[float, float]]  # field -> (lowest, highest), both allowed

MODEL_CHOICES: Choices = {
    "model.dtype": ("bfloat16", "float32"),
    "model.quantization": QUANTIZATIONS,
    "model.attention": (AUTO, *IMPLEMENTATIONS),
    "model.remat": tuple(REMAT_POLICIES),
    "data.polarity": ("white", "black"),
    "data.buckets": KINDS,
}
UPDATES = 2**31 - 1  # int32, in which updates are counted
# Bounds for fields without a natural one: above every sensible value, and below what overflows or never ends.
LARGE = 1e9  # of numbers, in float32
COUNT = 2**20  # of candidates, examples or blocks
STEPS = 10_000  # of a solver, or of an optimizer on one rollout
LONGEST_SIDE = 2**16  # of a picture, pixels
SHARED_RANGES: Ranges = {
    "seed": (0, 2**32 - 1), "model.max_text_tokens": (0, 512), "model.guidance": (0, LARGE),
    "lora.rank": (1, 2**16), "lora.alpha": (1e-9, LARGE),
    "optimizer.learning_rate": (0, 1), "optimizer.warmup_steps": (0, UPDATES),
    "optimizer.decay_steps": (0, UPDATES), "optimizer.weight_decay": (0, LARGE), "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999), "optimizer.eps": (1e-30, 1), "optimizer.max_grad_norm": (1e-9, LARGE),
    "optimizer.ema_decay": (0, 0.99999),
    "train.num_steps": (1, math.inf), "train.save_every": (1, math.inf), "train.keep": (1, math.inf),
    "train.image_every": (1, math.inf), "train.profile_steps": (0, math.inf),
    "mesh.data": (-1, math.inf), "mesh.fsdp": (-1, math.inf), "mesh.tensor": (-1, math.inf),
}  # fmt: skip
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}


def check_fields(
    config: ConfigDict, default: ConfigDict, choices: Choices, ranges: Ranges, free: Sequence[str] = ()
) -> list[str]:
    """The problems that one field at a time can have, a line each.

    Args:
        config: What the user gave.
        default: Has every field, with a value of its type.
        choices: Field -> values allowed.
        ranges: Field -> lowest and highest value allowed.
        free: Groups whose fields the user names; these are held to `ranges` alone.

    Raises:
        UsageError: If fields or groups are missing: nothing else can be checked then.
    """
    if lost := [name for name in free if not isinstance(config.get(name), ConfigDict)]:
        raise refusal([f"{name}: {config.get(name)!r} found; a group of fields was wanted" for name in lost])
    known, found = _fields(default, free), _fields(config, free)
    if missing := sorted(known - found):
        raise refusal([f"{field}: missing" for field in missing])
    problems = [_unknown(field, known) for field in sorted(found - known)]
    return problems + value_problems(flatten(config.to_dict()), flatten(default.to_dict()), choices, ranges, free)


def value_problems(
    values: Mapping[str, Any], default: Mapping[str, Any], choices: Choices, ranges: Ranges, free: Sequence[str] = ()
) -> list[str]:
    """The fields whose values are not of their type, choices or range, a line each.

    Args:
        values: Dotted field -> value, of all fields outside of `free`.
        default: Dotted field -> default, of all fields.
        choices: As in `check_fields`.
        ranges: As there.
        free: As there.
    """
    fixed = [field for field in default if field.split(".")[0] not in free]
    problems = [
        f"{field}: {shorten(values[field])} found; {_WORDS[type(default[field])]} was wanted"
        for field in fixed
        if field not in choices and field not in ranges and not is_like(values[field], default[field])
    ]
    problems += [
        f"{field}: {shorten(values[field])} found; one of {', '.join(allowed)} was wanted"
        for field, allowed in choices.items()
        if values[field] not in tuple(allowed)
    ]
    for field, (low, high) in ranges.items():
        if field not in values:  # of a free group
            continue
        value, like = values[field], is_like(values[field], default[field])
        if (like and not low <= value <= high) or (not like and field in fixed):
            problems.append(f"{field}: {shorten(value)} found; {_span(low, high, default[field])} was wanted")
    return problems


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted field -> value."""
    return flatten_dict(config, sep=".")


def is_within(field: str, fields: Collection[str]) -> bool:
    """Whether a dotted field is one of these, or of one of these groups."""
    return any(f"{field}.".startswith(f"{one}.") for one in fields)


def _span(low: float, high: float, default: float) -> str:
    whole = isinstance(default, int)
    words = f"{low} or more" if high == math.inf else f"{low} to {high if whole else format(high, 'g')}"
    return f"a whole number, {words}," if whole else words


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


def size_problems(sides: Sequence[Any]) -> list[str]:
    """What is wrong with `data.size`."""
    if len(sides) == 2 and all(is_like(side, 0) and 16 <= side <= LONGEST_SIDE and side % 16 == 0 for side in sides):
        return []
    return [f"data.size: {tuple(sides)}; two multiples of 16 pixels were wanted, {LONGEST_SIDE} at most"]


def mask_problems(data: DataOptions) -> list[str]:
    """What is wrong with `data.polarity` and `data.mask_value` together."""
    try:
        check_marking(data.polarity, data.mask_value, ("data.polarity", "data.mask_value"))
    except UsageError as error:
        return [error.problem.removesuffix(".")]
    return []


def cache_problems(data: DataOptions) -> list[str]:
    """What is wrong with `data.cache`: the folder of a URL would be made on this machine's disk."""
    found = data.cache
    return [f"data.cache: {found!r} found; a directory was wanted, such as that of a mounted bucket"] * ("://" in found)


def quantization_problems(model: ModelOptions) -> list[str]:
    """What is wrong with `model.quantization` in training."""
    if model.quantization == NONE or model.remat != "none":
        return []
    return [
        f"model.remat: none with model.quantization={model.quantization}; full or dots was wanted, or the "
        "backward pass keeps the dequantised kernels of all blocks"
    ]


def schedule_problems(optimizer: OptimizerOptions, updates: int) -> list[str]:
    """What is wrong with `optimizer.decay_steps` for that many updates in all."""
    decay, end = optimizer.decay_steps, optimizer.warmup_steps + optimizer.decay_steps
    if not decay or updates <= end:
        return []
    return [
        f"optimizer.decay_steps: {decay} ends the learning at update {end} of {updates}; at least "
        f"{updates - optimizer.warmup_steps}, or 0 for no decay, was wanted"
    ]


def _fields(config: ConfigDict, free: Sequence[str]) -> set[str]:
    return {name for name in flatten(config.to_dict()) if name.split(".")[0] not in free}


def _unknown(field: str, known: set[str]) -> str:
    """A ConfigDict takes any new field: a misspelt one in a file would leave the default in force."""
    near = nearest(field, known)
    return f"{field}: no such field" + (f"; did you mean {near}?" if near else "")
