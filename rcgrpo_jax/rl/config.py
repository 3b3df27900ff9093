"""The configuration of a run of post-training, made of `rl.options`, and the check of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ml_collections import ConfigDict

from rcgrpo_jax.data.sources import same_examples
from rcgrpo_jax.flow.sde import KINDS
from rcgrpo_jax.flow.solvers import SOLVERS, steps_problem
from rcgrpo_jax.method import nft
from rcgrpo_jax.method.gaussian import LOG_PROBS
from rcgrpo_jax.options import read_options
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, mesh_shape
from rcgrpo_jax.rewards import known_rewards
from rcgrpo_jax.rl.options import Options, RolloutOptions
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.rl.policy.base import SHARING
from rcgrpo_jax.rl.policy.noise import EXPLORERS
from rcgrpo_jax.rl.reward_fields import ACD, FREE, names_in, reward_problems, weight_problems
from rcgrpo_jax.runs.fields import (
    COUNT,
    LARGE,
    MODEL_CHOICES,
    SHARED_RANGES,
    STEPS,
    cache_problems,
    check_fields,
    flatten,
    get_field,
    is_within,
    mask_problems,
    quantization_problems,
    refusal,
    schedule_problems,
    size_problems,
    value_problems,
)
from rcgrpo_jax.runs.writers import writer_problems

# Fields that may differ between a checkpoint and the run that resumes it: they do not touch what is learned, or, as
# `least_scored`, only where a reward has failed. Those of rewards without a weight are such too:
# `reward_fields.unlearned`.
MAY_DIFFER = ("train", "watch", "mesh", "model.attention", "model.remat", "data.cache", "rollout.micro_batch",
              "rollout.decode_micro_batch", "surrogate.micro_batch", "objective.least_scored")  # fmt: skip
# Fields that may differ where what they name has been moved: digests are saved beside them.
PATHS = ("model.path", "data.path")


def default_config() -> ConfigDict:
    """Every field of `rl.options.Options`. `configs/*.py` start from it and change what they need."""
    return ConfigDict(asdict(Options()))


_CHOICES = {
    **MODEL_CHOICES,
    "policy": POLICIES.keys(),  # a view: later entries count
    "explore.kind": tuple(EXPLORERS),
    "rollout.solver": tuple(SOLVERS),
    "rollout.share": ("none", "region"),
    "surrogate.share": ("none", "region"),
    "surrogate.distance": ("region", "tau", "l2", "mean"),
    "surrogate.anchor_mode": ("replay", "integrate"),
    "surrogate.steps": ("all", "early", "random"),
    "surrogate.weighting": ("uniform", "policy"),
    "sde.kind": tuple(KINDS),
    "sde.place": ("progressive", "random"),
    "sde.noise": ("independent", "region"),
    "sde.log_prob": tuple(LOG_PROBS),
    "objective.advantage_std": ("group", "batch"),
    "nft.decay": tuple(nft.DECAYS),
    "nft.keep_to": ("source", "sample"),
    "acd.text": ("all", "instruction"),
}
_RANGES = {
    **SHARED_RANGES,
    "explore.alpha_edit": (0, 1), "explore.alpha_base": (0, 1), "explore.sigma": (0, 1),
    "explore.mask_threshold": (0, 1), "explore.mask_dilation": (0, 128),
    "rollout.prompts": (1, COUNT), "rollout.group_size": (2, COUNT), "rollout.num_steps": (1, STEPS),
    "rollout.micro_batch": (0, COUNT), "rollout.decode_micro_batch": (0, COUNT),
    "rollout.share_grow": (0, 128), "rollout.share_grow_reference": (-1, 128), "rollout.share_full_steps": (0, STEPS),
    "surrogate.tau_edit": (1e-6, LARGE), "surrogate.tau_base": (1e-6, LARGE), "surrogate.anchors": (1, COUNT),
    "surrogate.num_random_steps": (1, STEPS), "surrogate.target_entropy": (0, LARGE),
    "surrogate.micro_batch": (0, COUNT),
    "sde.level": (0, LARGE), "sde.window": (0, STEPS), "sde.interval": (1, COUNT), "sde.stride": (0, STEPS),
    "sde.range_start": (0, STEPS), "sde.range_end": (0, STEPS),
    "nft.beta": (1e-3, 100), "nft.time_fraction": (0, 1), "nft.base_weight": (0, LARGE),
    "nft.keep_weight": (0, LARGE), "nft.keep_tolerance": (0, LARGE), "nft.change_weight": (0, LARGE),
    "nft.change_margin": (0, LARGE), "nft.erosion": (0, 128), "nft.ring_weight": (0, 1),
    "objective.clip": (1e-9, LARGE), "objective.advantage_clip": (1e-9, LARGE),
    "objective.quasi_norm": (0, 10), "objective.least_scored": (0, 1), "objective.kl_weight": (0, LARGE),
    "objective.source_advantage": (0, LARGE), "objective.updates": (1, STEPS),
    "reward_options.preservation.cap": (1e-6, LARGE), "reward_options.colour.scale": (1e-6, LARGE),
    "reward_options.colour.lightness": (0, LARGE), "reward_options.oracle.noise": (0, LARGE),
    "reward_options.oracle.seed": (0, 2**32 - 1), "reward_options.change.scale": (1e-6, LARGE),
    "reward_options.clip_text.margin": (0, 1000), "reward_options.clip_direction.margin": (0, 1000),
    "acd.layers": (1, COUNT), "acd.weight": (0, LARGE),
    "train.sample_every": (1, math.inf), "train.patience": (0, math.inf),
}  # fmt: skip


def saved_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a configuration that was saved with a run, a line each.

    Args:
        values: Dotted field -> value, of all fields. Rewards may be others than those that are registered now.
    """
    default = flatten(default_config().to_dict())
    problems = value_problems(values, default, _CHOICES, _RANGES, FREE) + weight_problems(values)
    return problems or size_problems(values["data.size"])


def validate(config: ConfigDict, num_devices: int) -> None:
    """Refuses a configuration that cannot run, before any weight is read.

    Raises:
        UsageError: With every problem found, a line each.
    """
    problems = check_fields(config, default_config(), _CHOICES, _RANGES, FREE)
    problems += [
        f"{field}: empty; a path was wanted" for field in ("model.path", "data.path") if get_field(config, field) == ""
    ]
    problems += weight_problems(flatten(config.to_dict()))
    problems += reward_problems(config, known_rewards(config.plugins))
    problems = problems or writer_problems(config.train.writers)
    if problems := problems or _spread_problems(read_options(Options, config), num_devices):
        raise refusal(problems)


def _sample_problems(options: Options) -> list[str]:
    """What is wrong with `train.samples`, `train.best` and `train.patience`."""
    train, problems = options.train, []
    if train.samples and same_examples(options.data.path, train.samples):
        problems.append(f"train.samples: {train.samples} found, which data.path names too; held-out ones were wanted")
    scored = [name for name, weight in options.rewards.items() if weight] + names_in(options.watch)
    metrics = [f"samples/{name}" for name in [*scored, *[ACD] * bool(options.acd.weight)]]
    if train.best and not train.samples:
        problems.append(f"train.best: {train.best} without train.samples; examples to score were wanted")
    elif train.best and train.best not in metrics:
        problems.append(f"train.best: {train.best!r} found; one of {', '.join(metrics)} was wanted")
    if train.patience and not train.best:
        problems.append(f"train.patience: {train.patience} without train.best; a metric was wanted there")
    return problems


def unread_fields(options: Options) -> dict[str, Any]:
    """The fields that have been set, and that others than the chosen policy read: dotted, with their defaults."""
    values, default = flatten(asdict(options)), flatten(asdict(Options()))
    others = [field for policy in POLICIES.values() for field in policy.OWN]
    return {
        field: default[field]
        for field, value in values.items()
        if field in default
        and value != default[field]
        and field not in MAY_DIFFER
        and is_within(field, others)
        and not is_within(field, POLICIES[options.policy].OWN)
    }


def _unread_problems(options: Options) -> list[str]:
    values = flatten(asdict(options))
    return [
        f"{field}: {values[field]!r} with policy = {options.policy}, which does not read it; {default!r} was wanted, "
        f"or policy = {' or '.join(name for name, policy in POLICIES.items() if is_within(field, policy.OWN))}"
        for field, default in unread_fields(options).items()
    ]


def _share_problems(options: Options) -> list[str]:
    """What is wrong with `rollout.share`, for a policy that reads it."""
    rollout, explore, default = options.rollout, options.explore, RolloutOptions()
    if rollout.share == "none":
        return [
            f"{field}: {found} with rollout.share = none, which does not read it; {wanted} was wanted"
            for field in SHARING
            if (found := getattr(rollout, field.removeprefix("rollout.")))
            != (wanted := getattr(default, field.removeprefix("rollout.")))
        ]
    problems = []
    if explore.kind != "region" or explore.alpha_base:
        problems.append(
            f"rollout.share: {rollout.share} with explore.kind = {explore.kind} and explore.alpha_base = "
            f"{explore.alpha_base}; region and 0 were wanted, so that candidates start equal outside the region"
        )
    if rollout.share_full_steps >= rollout.num_steps:
        problems.append(
            f"rollout.share_full_steps: {rollout.share_full_steps} of rollout.num_steps = {rollout.num_steps}; fewer "
            "were wanted, or rollout.share = none"
        )
    return problems


def _spread_problems(options: Options, num_devices: int) -> list[str]:
    policy, g = POLICIES[options.policy], options.rollout.group_size
    problems = _unread_problems(options) + policy.problems(options.step)
    if few := steps_problem(options.rollout.solver, options.rollout.num_steps, "rollout.solver"):
        problems.append(f"rollout.num_steps: {few}")
    problems += _share_problems(options)
    if options.objective.quasi_norm and options.objective.advantage_std == "batch":
        problems.append(
            f"objective.advantage_std: batch with objective.quasi_norm = {options.objective.quasi_norm}, which divides "
            "by another norm of the group; one of them was wanted"
        )
    problems += cache_problems(options.data) + size_problems(options.data.size) + mask_problems(options.data)
    problems += quantization_problems(options.model) + _sample_problems(options)
    problems += schedule_problems(options.optimizer, options.train.num_steps * options.objective.updates)
    if not any(options.rewards.values()) and not options.acd.weight:
        problems.append("rewards: none with a weight, and acd.weight is 0; at least one was wanted")
    shape = dict(zip(("data", "fsdp", "tensor"), mesh_shape(vars(options.mesh), num_devices), strict=True))
    spread = math.prod(shape[axis] for axis in SAMPLE_AXES)
    samples = options.rollout.prompts * g
    rolled = options.rollout.micro_batch or samples
    if rolled % options.rollout.prompts:
        problems.append(
            f"rollout.micro_batch: {rolled}; a multiple of rollout.prompts = {options.rollout.prompts} was wanted: as "
            "many candidates of each group"
        )
    where = f"data x fsdp = {shape['data']} x {shape['fsdp']} = {spread} devices"
    for field, count, micro in (
        (f"rollout: P x G = {options.rollout.prompts} x {g}", samples, options.rollout.micro_batch),
        ("rollout: candidates decoded", rolled, min(options.rollout.decode_micro_batch, rolled)),
        ("surrogate: units to differentiate", policy.num_units(options.step), options.surrogate.micro_batch),
    ):
        micro = micro or count
        if count and (count % micro or micro % spread):  # none where the policy has said why
            problems.append(f"{field} = {count} in micro-batches of {micro} does not divide over {where}")
    return list(dict.fromkeys(problems))
