"""What the paper compares with, as variants of one run at one budget of model evaluations (docs/baselines.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rcgrpo_jax.experiments.ablation import Variant, configure
from rcgrpo_jax.experiments.cost import evaluations_of_step
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rl.config import unread_fields
from rcgrpo_jax.rl.options import Options

_TASK = {"acd.weight": 0.0, "objective.source_advantage": 0.0}  # the rewards of the task alone
_INDEPENDENT = {"explore.kind": "global", "explore.sigma": 1.0}  # initial noises
_FLOW = {**_TASK, "policy": "gaussian", "objective.clip": 1e-4, "objective.advantage_std": "batch"}
_MIX = {
    "explore.kind": "global", "explore.sigma": 0.0, "policy": "gaussian", "objective.clip": 1e-4, "sde.level": 0.7,
    "sde.window": 2,
}  # fmt: skip
_NFT = {**_TASK, **_INDEPENDENT, "policy": "nft", "objective.advantage_std": "batch", "rollout.solver": "dpmpp_2m"}

# Method -> what it changes. Level, clip, quasi-norm and weights are the published ones; groups, steps and rewards are
# those of the common configuration. Windows of two steps are for its four.
METHODS: dict[str, dict[str, Any]] = {
    "RC-GRPO": {},
    "RC-GRPO, no ACD, no source": _TASK,
    "Neighbor GRPO": {
        **_TASK, "explore.kind": "global", "explore.sigma": 0.3, "objective.quasi_norm": 0.8,
        "rollout.solver": "dpmpp_2m",
    },
    "Flow-GRPO": {**_FLOW, **_INDEPENDENT, "sde.level": 0.9},
    "Flow-GRPO-Fast": {**_FLOW, **_INDEPENDENT, "sde.level": 0.9, "sde.window": 2, "sde.place": "random"},
    "Flow-CPS": {**_FLOW, **_INDEPENDENT, "sde.kind": "cps", "sde.level": 0.8, "objective.clip": 1e-5},
    "MixGRPO": {**_TASK, **_MIX},
    "MixGRPO, noise by region": {**_TASK, **_MIX, "sde.noise": "region"},
    "MixGRPO, noise by region, ACD": {**_MIX, "sde.noise": "region"},
    "DiffusionNFT": _NFT,
    "CoCoEdit": {**_NFT, "nft.keep_weight": 0.02},
}  # fmt: skip


def baselines(config: ConfigDict) -> tuple[Variant, ...]:
    """The methods at the model evaluations of a configuration, which is the first of them.

    Fields that a method's policy does not read go back to their defaults.

    Args:
        config: Common to all.

    Raises:
        UsageError: As `ablation.configure`.
    """
    return tuple(at_equal_evaluations(config, (_variant(config, *method) for method in METHODS.items())))


def _variant(config: ConfigDict, name: str, changes: Mapping[str, Any]) -> Variant:
    changed = read_options(Options, configure(config, Variant(name, changes), 0))
    return Variant(name, {**unread_fields(changed), **changes})


def with_learning_rates(variants: Iterable[Variant], rates: Sequence[float]) -> tuple[Variant, ...]:
    """Every variant at every learning rate."""
    return tuple(
        Variant(f"{name}, lr {rate:g}", {**changes, "optimizer.learning_rate": rate})
        for name, changes in variants
        for rate in rates
    )


def at_equal_evaluations(config: ConfigDict, variants: Iterable[Variant]) -> Iterator[Variant]:
    """The variants with as many training steps as the model evaluations of the configuration itself pay for.

    A learning rate that decays to 0 does so at the last of them.

    Args:
        config: Common to all; its `train.num_steps` are the budget.
        variants: What each of them changes.
    """
    common = read_options(Options, config)
    budget = common.train.num_steps * evaluations_of_step(common)
    for name, changes in variants:
        options = read_options(Options, configure(config, Variant(name, changes), 0))
        steps = max(1, round(budget / evaluations_of_step(options)))
        added = {"train.num_steps": steps}
        if common.optimizer.decay_steps:
            added["optimizer.decay_steps"] = steps * options.objective.updates - common.optimizer.warmup_steps
        yield Variant(name, {**changes, **added})
