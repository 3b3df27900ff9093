"""The fields of a configuration that are about rewards: weights and their schedules, options, plug-ins, the watched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.borders import is_like, shorten
from rcgrpo_jax.errors import nearest
from rcgrpo_jax.rewards.base import Factory
from rcgrpo_jax.runs.fields import LARGE

FREE = ("rewards", "reward_schedules", "reward_options", "plugins")  # groups whose fields are named by rewards
ACD = "acd"  # the reward that the rollout gives; its weight is `acd.weight`


class Schedule(NamedTuple):
    """A function of the step that is linear between points, and constant before the first and after the last."""

    steps: tuple[int, ...]  # ascending
    values: tuple[float, ...]

    @classmethod
    def read(cls, text: str) -> Schedule:
        """The schedule of `STEP:VALUE,STEP:VALUE,...`.

        Raises:
            ValueError: For another form, steps that do not ascend, and values beyond `LARGE`.
        """
        points = [point.split(":") for point in text.split(",")]
        steps, values = zip(*((int(step), float(value)) for step, value in points), strict=True)
        if steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
            raise ValueError("steps do not ascend from 0 on")
        if not all(abs(value) <= LARGE for value in values):
            raise ValueError("a value is too large or no number")
        return cls(steps, values)

    def __call__(self, step: int) -> float:
        """The value after so many steps."""
        return float(np.interp(step, self.steps, self.values))


def names_in(text: str) -> list[str]:
    """The names in a value of `watch`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def weight_problems(values: Mapping[str, Any]) -> list[str]:
    """The weights that are none, a line each; `values` has all fields, dotted."""
    return [
        f"{field}: {shorten(weight)} found; a number from {-LARGE:g} to {LARGE:g} was wanted"
        for field, weight in values.items()
        if field.startswith("rewards.") and not (is_like(weight, 1.0) and abs(weight) <= LARGE)
    ]


def reward_problems(config: ConfigDict, known: Mapping[str, Factory]) -> list[str]:
    """What is wrong with the names, options and schedules of rewards, a line each.

    Args:
        config: With every field.
        known: Name -> factory, of registered rewards and the configuration's plug-ins.
    """
    problems = [f"rewards.{problem}" for problem in reward_registry.name_problems(config.rewards, known)]
    for name, options in config.reward_options.to_dict().items():
        problems += [f"reward_options.{problem}" for problem in reward_registry.option_problems(name, options, known)]
    learned = [name for name, weight in config.rewards.items() if weight] + [ACD] * bool(config.acd.weight)
    for name, text in config.reward_schedules.items():
        if name not in learned:
            near = nearest(name, learned)
            wanted = f"did you mean {near}?" if near else f"one of {', '.join(learned) or '(none)'} was wanted"
            problems.append(f"reward_schedules.{name}: no reward with a weight; {wanted}")
        try:
            Schedule.read(text)
        except (ValueError, AttributeError):
            problems.append(
                f"reward_schedules.{name}: {shorten(text)} found; STEP:FACTOR,STEP:FACTOR,... with ascending steps "
                "from 0 on was wanted, such as 0:1,500:0.2"
            )
    return problems + _watch_problems(config.watch, learned, known)


def _watch_problems(text: Any, learned: Iterable[str], known: Mapping[str, Factory]) -> list[str]:
    names = names_in(text) if isinstance(text, str) else []  # another type is reported elsewhere
    missing = isinstance(text, str) and text.strip() and len(names) < text.count(",") + 1
    others = dict.fromkeys(name for name in names if name not in learned)
    problems = [f"watch: {shorten(text)} found; a name before and after each comma was wanted"] if missing else []
    problems += [f"watch: {problem}" for problem in reward_registry.name_problems(others, known)]
    problems += [
        f"watch: {name} is learned from; a reward without a weight was wanted" for name in names if name in learned
    ]
    return problems + [f"watch: {name} found twice" for name in dict.fromkeys(names) if names.count(name) > 1]


def unlearned(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of rewards without a weight, dotted, which may differ when a run is resumed."""
    weights = config["rewards"]
    return tuple(
        f"{group}.{name}" for group in ("reward_options", "plugins") for name in config[group] if not weights.get(name)
    )


def reward_fields(known: Mapping[str, Factory]) -> dict[str, Any]:
    """The fields that rewards have in a configuration, dotted -> value where nothing else is said."""
    options = {
        f"reward_options.{name}.{option}": default
        for name, defaults in reward_registry.default_options(known).items()
        for option, default in defaults.items()
    }
    schedules = {f"reward_schedules.{name}": "" for name in (*known, ACD)}
    return {f"rewards.{name}": 0.0 for name in known} | schedules | options


def name_rewards(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Adds the fields of rewards that a configuration does not name, so that they can be set.

    Args:
        config: Changed in place.
        given: What is to be set, dotted field -> value; only those of `plugins` need one. Others than those of rewards
            are left to the caller.

    Raises:
        UserError: A plug-in cannot be read.
    """
    if not all(isinstance(config.get(name), ConfigDict) for name in FREE):
        return
    places = {field: place for field, place in given.items() if field.startswith("plugins.")}
    plugins = {**config.plugins, **{field.removeprefix("plugins."): place for field, place in places.items()}}
    known = places | reward_fields(reward_registry.known_rewards(plugins))
    with config.unlocked(), config.ignore_type():
        for field in known.keys() & set(given):
            *groups, name = field.split(".")
            group = config
            for part in groups:
                if part not in group:
                    group[part] = ConfigDict()
                group = group[part]
            value, default = group.get(name, known[field]), known[field]
            group[name] = float(value) if is_like(value, default) and isinstance(default, float) else value
