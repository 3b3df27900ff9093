"""Whether the configuration of a saved run is the one at hand."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.runs.fields import is_within

# Fields that came later, and what runs did before: a configuration that was saved without one has this value.
ADDED = {
    "data.buckets": "none", "data.mask_value": "", "lora.init": "",
    "nft.beta": 1.0, "nft.time_fraction": 0.99, "nft.base_weight": 1e-4, "nft.decay": "ramp",
    "nft.keep_weight": 0.0, "nft.keep_to": "source", "nft.keep_tolerance": 1e-3,
    "nft.change_weight": 0.0, "nft.change_margin": 3e-2, "nft.erosion": 1, "nft.ring_weight": 0.2,
    "objective.advantage_std": "group", "objective.least_scored": 1.0,
    "optimizer.eps": 1e-8, "policy": "neighbour", "rollout.solver": "euler",
    "rollout.share": "none", "rollout.share_grow": 1, "rollout.share_grow_reference": 0, "rollout.share_full_steps": 0,
    "surrogate.share": "none",
    "sde.kind": "flow_grpo", "sde.level": 0.7, "sde.window": 0, "sde.place": "progressive", "sde.interval": 25,
    "sde.stride": 1, "sde.range_start": 0, "sde.range_end": 0, "sde.noise": "independent", "sde.log_prob": "density",
    "train.best": "", "train.patience": 0, "train.samples": "", "train.sample_every": 20,
    "train.writers": "tensorboard", "watch": "",
    "reward_options.change.scale": 12.0, "reward_options.clip_text.path": "",
    "reward_options.clip_text.margin": 0.25, "reward_options.clip_text.text": "instruction",
    "reward_options.clip_direction.path": "", "reward_options.clip_direction.margin": 0.25,
    "reward_options.clip_direction.text": "instruction", "reward_options.clip_direction.source_text": "a photo",
    "reward_options.oracle.num_pass": 1,
}  # fmt: skip


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str] = (), saved_as: str = "checkpoint"
) -> list[str]:
    """Names every field in which two configurations differ.

    Args:
        saved: Nested configuration of the checkpoint.
        current: Nested configuration of this run; compared as JSON, so a tuple equals the list it was saved as.
        ignore: Dotted fields that may differ, with all below them: `train` covers `train.num_steps`.
        saved_as: What holds the first, for the lines.

    Returns:
        Sorted lines such as `explore.alpha_edit: checkpoint 0.3, config 0.5`.
    """
    new = _flatten(current)
    added = {name: value for name in new for field, value in ADDED.items() if f".{name}".endswith(f".{field}")}
    old = _flatten(added) | _flatten(saved)
    return [
        f"{name}: {saved_as} {old.get(name, 'absent')}, config {new.get(name, 'absent')}"
        for name in sorted({**old, **new})
        if old.get(name) != new.get(name) and not is_within(name, ignore)
    ]


def check_same_config(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
    """Refuses to resume a run under another configuration; arguments as for `config_differences`.

    Raises:
        UserError: Some field differs; the message lists all that do.
    """
    if differences := config_differences(saved, current, ignore):
        raise UserError(
            f"The configuration is not the checkpoint's: {'; '.join(differences)}.",
            "Use another --workdir for a new run, or put the values back to resume this one.",
        )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field -> JSON text of its value; text tells `null` from an absent field and `true` from 1."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat
