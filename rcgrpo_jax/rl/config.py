"""The configuration of a training run: every field with its default and unit, and the check of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.borders import is_like, shorten
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, mesh_shape
from rcgrpo_jax.rl.policy import POLICIES
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
    mask_problems,
    quantization_problems,
    refusal,
    schedule_problems,
    size_problems,
    value_problems,
)
from rcgrpo_jax.runs.writers import writer_problems

# Fields that may differ between a checkpoint and the run that resumes it: they do not touch what is learned.
MAY_DIFFER = ("train", "mesh", "model.attention", "model.remat", "data.cache", "rollout.micro_batch",
              "rollout.decode_micro_batch", "surrogate.micro_batch")  # fmt: skip
# Fields that may differ where what they name has been moved: digests are saved beside them.
PATHS = ("model.path", "data.path")


def default_config() -> ConfigDict:
    """Every field of a run. `configs/*.py` start from it and change what they need."""

    def group(**fields: Any) -> ConfigDict:
        return ConfigDict(fields)

    return group(
        seed=0,  # of the LoRA, the order of the data, the noise and the anchors
        policy="neighbour",  # how groups explore and are compared: a name of rl.policy.POLICIES
        model=group(
            path="",  # diffusers folder or converted directory
            dtype="bfloat16",  # of the frozen base and of activations; LoRA, states and losses are float32
            quantization="none",  # of the base's kernels: none, int8 (by output channel), nf4 (QLoRA's 4 bits)
            max_text_tokens=0,  # length the T5 sequence is padded to; 0: the model's own, 512 in FLUX.1-Kontext-dev
            guidance=2.5,  # scale given to the distilled model
            attention="auto",  # a name of models.attention.IMPLEMENTATIONS; auto: the fastest of the platform
            remat="full",  # a name of models.mmdit.REMAT_POLICIES, in the update
        ),
        data=group(
            path="",  # folder, .jsonl file, tfds:DATASET[@SPLIT], or scenes:SPLIT[/KINDS][:COUNT[:FLAWS]]
            polarity="white",  # colour of the edit region in the masks: white or black
            mask_value="",  # what masks hold there instead: class numbers or colours, such as 15, or 2,5, or #800000
            size=(512, 512),  # (height, width) in pixels, multiples of 16; resized to it, whatever the aspect ratio
            cache="",  # folder of encoder results; empty: WORKDIR/cache
        ),
        lora=group(
            rank=64,  # r
            alpha=128.0,  # the update is alpha / r times A B
            targets="attention",  # attention (the paper's), attention+mlp, all-linear, or a regular expression
            init="",  # LoRA file to start from, in any form that `edit` reads; empty: none. Read before step 1 alone
        ),
        explore=group(
            kind="region",  # region: RDP, Eq. 10-11; global: Neighbor GRPO, Eq. 6; mixed: half and half (ours)
            alpha_edit=0.5,  # perturbation inside the mask, in [0, 1] (ours; the paper's value is not public)
            alpha_base=0.01,  # perturbation outside, in [0, 1] (ours)
            sigma=0.5,  # perturbation everywhere for kind=global and mixed, in [0, 1]
            mask_threshold=0.0,  # share of a token's pixels that puts it into the region; 0: any pixel (ours)
            mask_dilation=0,  # tokens by which the region grows for the perturbation; surrogate and ACD keep the mask
        ),
        rollout=group(
            prompts=4,  # P, groups in a global batch
            group_size=12,  # G, candidates of a group
            num_steps=8,  # K, solver steps in training
            micro_batch=0,  # candidates rolled out and scored at a time, as many of each group; 0: all P x G
            decode_micro_batch=0,  # of these, images decoded at a time; 0: all
        ),
        surrogate=group(
            distance="l2",  # l2 (Eq. 7), region (B.3, form ours), tau (ours), mean
            tau_edit=0.9,  # bandwidth inside the mask, of region and tau
            tau_base=1.1,  # bandwidth outside
            anchors=4,  # B, anchors of a group, from its perturbed candidates: G for kind=global, else G - 1
            anchor_mode="replay",  # replay: one step from the stored state; integrate: the whole path, Eq. 13
            steps="early",  # solver steps that carry the loss: early (the noisier half), all, random
            num_random_steps=4,  # how many for steps=random
            weighting="uniform",  # expectation over candidates: uniform (Eq. 5), or policy (under pi_old)
            target_entropy=1.0,  # nats, for weighting=policy: the temperature is calibrated to it
            micro_batch=0,  # anchors (replay: anchor-steps) differentiated at a time over the mesh; 0: all
        ),
        objective=group(
            clip=0.02,  # c, half-width of the ratio's clip (ours; peers use 1e-4); the ratio of the first update is 1
            advantage_clip=5.0,  # largest |A|
            quasi_norm=0.0,  # p of Neighbor GRPO's advantage (0.8 there); 0: z-score, Eq. 4
            kl_weight=0.0,  # beta, of the KL to the policy of the rollout; the first update's has no gradient
            source_advantage=0.0,  # A of candidate G + 1, which keeps the source outside the mask (ours); 0: none
            updates=1,  # optimizer updates on one rollout
        ),
        rewards=group(preservation=1.0, colour=1.0),  # registered reward -> weight after its z-score; 0: not used
        reward_options=group(  # registered reward -> options of its factory, where not its defaults
            preservation=group(
                cap=50.0,  # dB of PSNR outside the mask that count as perfect
            ),
            colour=group(
                scale=40.0,  # CIELAB units at which a pixel's score falls to 1 / e
                lightness=0.5,  # weight of lightness differences
            ),
            oracle=group(
                noise=0.0,  # standard deviation of the judge's error, in units of the reward
                seed=0,  # of that error
            ),
        ),
        acd=group(
            weight=1.0,  # of R_acd after its z-score; 0 turns it off, in the rollout too
            layers=10,  # L_sel, the last blocks that count
            reference_keys=False,  # count the reference image's keys too
            text="all",  # text tokens that count: all, or instruction (without padding)
        ),
        optimizer=group(
            learning_rate=1e-4,  # AdamW, after the warm-up
            warmup_steps=0,  # updates of linear warm-up from 0
            decay_steps=0,  # updates of cosine decay to 0 after the warm-up; 0: none
            weight_decay=1e-4,  # decoupled
            b1=0.9,  # decay of the first moment
            b2=0.999,  # decay of the second moment
            eps=1e-8,  # in Adam's denominator; gradients of distance=mean at full size, by scaling, are 3e-8 to 1e-7
            max_grad_norm=1.0,  # global-norm clip
            ema_decay=0.0,  # of an average of the LoRA, exported if kept, warmed up; 0: none
        ),
        train=group(
            num_steps=100,  # training steps: one rollout and `objective.updates` updates each
            save_every=10,  # steps between checkpoints
            keep=2,  # checkpoints kept
            image_every=10,  # steps between image grids
            writers="tensorboard",  # of metrics, beside metrics.jsonl, with commas: tensorboard, wandb; empty: none
            profile_steps=0,  # steps that jax.profiler traces into WORKDIR/profile, from the second of a start on
        ),
        mesh=group(
            data=-1,  # devices that spread samples and replicate weights; -1: what is left
            fsdp=1,  # devices that spread samples and weights
            tensor=1,  # devices that split heads and MLP
        ),
    )


FREE = ("rewards", "reward_options")  # groups whose fields depend on the rewards that are registered
_CHOICES = {
    **MODEL_CHOICES,
    "policy": POLICIES.keys(),  # a view: later entries count
    "explore.kind": ("region", "global", "mixed"),
    "surrogate.distance": ("region", "tau", "l2", "mean"),
    "surrogate.anchor_mode": ("replay", "integrate"),
    "surrogate.steps": ("all", "early", "random"),
    "surrogate.weighting": ("uniform", "policy"),
    "acd.text": ("all", "instruction"),
}
_RANGES = {
    **SHARED_RANGES,
    "explore.alpha_edit": (0, 1), "explore.alpha_base": (0, 1), "explore.sigma": (0, 1),
    "explore.mask_threshold": (0, 1), "explore.mask_dilation": (0, 128),
    "rollout.prompts": (1, COUNT), "rollout.group_size": (2, COUNT), "rollout.num_steps": (1, STEPS),
    "rollout.micro_batch": (0, COUNT), "rollout.decode_micro_batch": (0, COUNT),
    "surrogate.tau_edit": (1e-6, LARGE), "surrogate.tau_base": (1e-6, LARGE), "surrogate.anchors": (1, COUNT),
    "surrogate.num_random_steps": (1, STEPS), "surrogate.target_entropy": (0, LARGE),
    "surrogate.micro_batch": (0, COUNT),
    "objective.clip": (1e-9, LARGE), "objective.advantage_clip": (1e-9, LARGE),
    "objective.quasi_norm": (0, 10), "objective.kl_weight": (0, LARGE),
    "objective.source_advantage": (0, LARGE), "objective.updates": (1, STEPS),
    "reward_options.preservation.cap": (1e-6, LARGE), "reward_options.colour.scale": (1e-6, LARGE),
    "reward_options.colour.lightness": (0, LARGE), "reward_options.oracle.noise": (0, LARGE),
    "reward_options.oracle.seed": (0, 2**32 - 1),
    "acd.layers": (1, COUNT), "acd.weight": (0, LARGE),
}  # fmt: skip


def saved_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a configuration that was saved with a run, a line each.

    Args:
        values: Dotted field -> value, of all fields. Rewards may be others than those that are registered now.
    """
    default = flatten(default_config().to_dict())
    problems = value_problems(values, default, _CHOICES, _RANGES, FREE) + _weight_problems(values)
    return problems or size_problems(values["data.size"])


def _weight_problems(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{field}: {shorten(weight)} found; a number from {-LARGE:g} to {LARGE:g} was wanted"
        for field, weight in values.items()
        if field.startswith("rewards.") and not (is_like(weight, 1.0) and abs(weight) <= LARGE)
    ]


def reward_fields() -> dict[str, Any]:
    """The fields that registered rewards have in a configuration, dotted -> value where nothing else is said."""
    options = {
        f"reward_options.{name}.{option}": default
        for name, known in reward_registry.registered().items()
        for option, default in known.items()
    }
    return {f"rewards.{name}": 0.0 for name in reward_registry.registered()} | options


def name_rewards(config: ConfigDict, fields: Iterable[str]) -> None:
    """Adds the fields of registered rewards that a configuration does not name, so that they can be set.

    Args:
        config: Changed in place.
        fields: What is to be set, dotted; others than those of rewards are left to the caller.
    """
    known = reward_fields() if all(isinstance(config.get(name), ConfigDict) for name in FREE) else {}
    with config.unlocked(), config.ignore_type():
        for field in known.keys() & set(fields):
            *groups, name = field.split(".")
            group = config
            for part in groups:
                if part not in group:
                    group[part] = ConfigDict()
                group = group[part]
            value, default = group.get(name, known[field]), known[field]
            group[name] = float(value) if is_like(value, default) and isinstance(default, float) else value


def validate(config: ConfigDict, num_devices: int) -> None:
    """Refuses a configuration that cannot run, before any weight is read.

    Raises:
        UsageError: With every problem found, a line each.
    """
    problems = check_fields(config, default_config(), _CHOICES, _RANGES, FREE)
    problems += [
        f"{field}: empty; a path was wanted" for field in ("model.path", "data.path") if get_field(config, field) == ""
    ]
    problems += [f"rewards.{problem}" for problem in reward_registry.name_problems(config.rewards)]
    problems += _weight_problems(flatten(config.to_dict()))
    for name, options in config.reward_options.to_dict().items():
        problems += [f"reward_options.{problem}" for problem in reward_registry.option_problems(name, options)]
    problems = problems or writer_problems(config.train.writers)
    if problems := problems or _spread_problems(config, num_devices):
        raise refusal(problems)


def _spread_problems(config: ConfigDict, num_devices: int) -> list[str]:
    policy, g = POLICIES[config.policy], config.rollout.group_size
    problems = policy.problems(config)
    if config.objective.kl_weight and config.objective.updates == 1:
        problems.append(
            f"objective.kl_weight: {config.objective.kl_weight} with objective.updates = 1; the first update is at the "
            "policy of the rollout, so that two or more were wanted"
        )
    problems += cache_problems(config) + size_problems(config.data.size) + mask_problems(config)
    problems += quantization_problems(config)
    problems += schedule_problems(config, config.train.num_steps * config.objective.updates)
    if not any(config.rewards.values()) and not config.acd.weight:
        problems.append("rewards: none with a weight, and acd.weight is 0; at least one was wanted")
    shape = dict(zip(("data", "fsdp", "tensor"), mesh_shape(config.mesh, num_devices), strict=True))
    spread = math.prod(shape[axis] for axis in SAMPLE_AXES)
    samples = config.rollout.prompts * g
    rolled = config.rollout.micro_batch or samples
    if rolled % config.rollout.prompts:
        problems.append(
            f"rollout.micro_batch: {rolled}; a multiple of rollout.prompts = {config.rollout.prompts} was wanted: as "
            "many candidates of each group"
        )
    where = f"data x fsdp = {shape['data']} x {shape['fsdp']} = {spread} devices"
    for field, count, micro in (
        (f"rollout: P x G = {config.rollout.prompts} x {g}", samples, config.rollout.micro_batch),
        ("rollout: candidates decoded", rolled, min(config.rollout.decode_micro_batch, rolled)),
        ("surrogate: units to differentiate", policy.num_units(config), config.surrogate.micro_batch),
    ):
        micro = micro or count
        if count % micro or micro % spread:
            problems.append(f"{field} = {count} in micro-batches of {micro} does not divide over {where}")
    return list(dict.fromkeys(problems))
