"""Rewards that a configuration names by their place in a user's code, `MODULE:FUNCTION`."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rcgrpo_jax.errors import UsageError, UserError, nearest, reason
from rcgrpo_jax.rewards.base import Factory, Reward, RewardInputs, factories
from rcgrpo_jax.rewards.scoring import check_all, start_all

logger = logging.getLogger(__name__)
_TAKEN = ("acd", "total")  # names of metrics that are no reward's
_TRIED = (2, 3)  # prompts and candidates of a trial: unequal, so that exchanged axes are seen


def known_rewards(plugins: Mapping[str, str]) -> dict[str, Factory]:
    """The registered rewards, and those of a configuration's `plugins`: name -> factory.

    A plug-in is a function of `RewardInputs` and of its options, `score(inputs, limit=0.9)`, or a class as `register`
    takes it. Its module is imported from the working directory or from what is installed.

    Args:
        plugins: Name -> `MODULE:FUNCTION`.

    Raises:
        UsageError: A name is taken or is none, or nothing is at the place.
        UserError: The module cannot be imported.
    """
    return factories() | {name: _load(name, place) for name, place in plugins.items()}


def _load(name: str, place: Any) -> Factory:
    if not name.isidentifier() or name in factories() or name in _TAKEN:
        raise UsageError(
            f"plugins.{name}: a name of its own, of letters, digits and _, was wanted.", "Give the plug-in another."
        )
    module, colon, attribute = place.partition(":") if isinstance(place, str) else ("", "", "")
    if not colon or not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"plugins.{name}: {place!r} found; MODULE:FUNCTION was wanted.", "Correct the field.")
    with _working_directory():
        try:
            loaded = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a script without a guard may end by `sys.exit`
            is_absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            problem = f"no module {error.name}" if is_absent else f"{type(error).__name__}: {reason(error)}"
            raise UserError(
                f"plugins.{name}: {module} cannot be imported from {os.getcwd()} or what is installed ({problem}).",
                "Run where the module lies or install it, or mend it; --debug shows where it failed.",
            ) from error
    if not callable(found := getattr(loaded, attribute, None)):
        near = nearest(attribute, [name for name in dir(loaded) if callable(getattr(loaded, name))])
        raise UsageError(
            f"plugins.{name}: {module} has no function or class {attribute}.",
            f"Did you mean {module}:{near}?" if near else "Correct the field.",
        )
    try:
        inspect.signature(found)
    except ValueError:
        raise UsageError(
            f"plugins.{name}: {place} does not say what it takes; a function or class written in Python was wanted.",
            "Wrap it in a function of RewardInputs.",
        ) from None
    return found if inspect.isclass(found) else _factory_of(found)


def _factory_of(function: Any) -> Factory:
    """What takes a function's options and gives the function of inputs alone, with the attributes of the first."""

    def factory(**options: Any) -> Any:
        return update_wrapper(partial(function, **options), function)

    factory.__signature__ = inspect.Signature([*inspect.signature(function).parameters.values()][1:])
    return factory


@contextmanager
def _working_directory() -> Iterator[None]:
    """Lets the block import modules of the working directory, which a console script does not search."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def try_reward(name: str, reward: Reward, size: tuple[int, int]) -> None:
    """Checks a reward and lets it score random pictures, so that what is wrong is found before the training.

    A reward that raises `Unscored` passes, with a warning: what it asks may answer later.

    Args:
        name: The reward's.
        reward: The reward.
        size: (height, width) of the pictures.

    Raises:
        UserError: It fails, or its scores are not finite numbers in an array of the right shape.
    """
    check_all({name: reward})  # a judge without a server would wait for one
    prompts, group = _TRIED
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return jnp.asarray(rng.random(shape, np.float32))

    mask = np.zeros((prompts, *size), np.float32)
    mask[:, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    inputs = RewardInputs(
        draw(prompts, *size, 3),
        draw(prompts, group, *size, 3),
        jnp.asarray(mask),
        ("Paint the box red.", "Make it blue."),
        draw(prompts, *size, 3) if reward.needs_target else None,
        ("A red box.", "A blue box.") if reward.needs_caption else None,
    )
    try:
        scores, failures = start_all({name: reward}, inputs).result()
    except UserError as error:
        raise UserError(f"on random pictures: {error.problem}", error.remedy) from error
    if failures:
        logger.warning("reward %r has no scores of random pictures: %s", name, failures[name])
    elif lost := int(np.sum(~np.isfinite(scores[name]))):
        raise UserError(
            f"on random pictures: reward {name!r}: {lost} of {prompts * group} scores are not finite.",
            "Return finite scores; raise rewards.Unscored where pictures cannot be scored.",
        )
