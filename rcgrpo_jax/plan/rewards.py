"""The networks of rewards that are computed here: every program has them beside it on every device."""

from __future__ import annotations

from functools import cache
from typing import Any

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.reward_fields import names_in
from rcgrpo_jax.weights.clip import clip_shapes


def reward_networks(options: Options) -> dict[str, dict[str, Any] | UserError]:
    """The networks that rewards with a weight, and the watched ones, read: those of CLIP.

    Args:
        options: The run's, valid.

    Returns:
        Folder, or name on the hub -> shapes of the parameters, float32, or why its `config.json` cannot be read here.
    """
    known = reward_registry.known_rewards(options.plugins)
    names = [*(name for name, weight in options.rewards.items() if weight), *names_in(options.watch)]
    paths = [options.reward_options.get(name, {}).get("path", "") for name in names if _asks_clip(known[name])]
    return {path: _shapes(path) for path in paths}


def _asks_clip(factory: reward_registry.base.Factory) -> bool:
    return isinstance(factory, type) and issubclass(factory, reward_registry.CLIPReward)


@cache  # a search asks for each setting
def _shapes(path: str) -> dict[str, Any] | UserError:
    try:
        return clip_shapes(path)
    except UserError as error:
        return error
