"""What a reward is, how one is found by name, and how several score one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.borders import is_like
from rcgrpo_jax.errors import UsageError, UserError, nearest


class RewardInputs(NamedTuple):
    """A batch of `P` prompts with `G` candidate edits each; pictures are sRGB in [0, 1], float32."""

    source: Float[Array, "P H W 3"]
    edited: Float[Array, "P G H W 3"]
    mask: Float[Array, "P H W"]  # in [0, 1], 1 where the edit belongs
    instructions: tuple[str, ...]  # one a prompt
    targets: Float[Array, "P H W 3"] | None = None  # reference edits


class Reward(Protocol):
    """Scores candidates; higher is better. A candidate that cannot be scored gets NaN, never a made-up number.

    A class with `needs_target = True` is given only examples with a reference edit.
    """

    def validate(self, instruction: str) -> None:
        """Raises a UserError if no edit for this instruction could be scored; called before training starts."""

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        """Scores every candidate, float32."""


_FACTORIES: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Makes a factory, usually the reward's class, known to `make` under a name."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        if name in _FACTORIES:
            raise ValueError(f"The reward {name!r} is registered twice.")
        _FACTORIES[name] = factory
        return factory

    return add


def make(name: str, **options: Any) -> Reward:
    """Builds a registered reward.

    Args:
        name: The name it was registered under.
        **options: Passed to its factory.

    Raises:
        UsageError: No reward has the name, or its factory does not take the options.
    """
    if name not in _FACTORIES:
        near = nearest(name, _FACTORIES)
        raise UsageError(
            f"reward: {name!r} found; one of {', '.join(sorted(_FACTORIES))} was wanted.",
            f"Did you mean {near!r}?" if near else "Name one of these, or import the module that registers yours.",
        )
    signature = inspect.signature(_FACTORIES[name])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(
            f"reward {name!r}: {error}; the options {', '.join(signature.parameters) or '(none)'} were wanted.",
            "Correct the options.",
        ) from None
    return _FACTORIES[name](**options)


def registered() -> dict[str, dict[str, Any]]:
    """Every registered reward: name -> option -> default, where it has one."""
    parameters = {name: inspect.signature(factory).parameters for name, factory in _FACTORIES.items()}
    return {
        name: {option: x.default for option, x in found.items() if x.default not in (None, x.empty)}
        for name, found in parameters.items()
    }


def name_problems(names: Iterable[str]) -> list[str]:
    """The names under which no reward is registered, a line each."""
    return [f"{name}: no such reward; {_nearest(name, _FACTORIES)}" for name in names if name not in _FACTORIES]


def option_problems(name: str, options: Any) -> list[str]:
    """What is wrong with the options that a configuration gives a reward, a line each.

    Args:
        name: The reward's.
        options: Option -> value. A value of another type than the option's default is a problem, but an int is a float.
    """
    if name not in _FACTORIES:
        return [f"{name}: no such reward; {_nearest(name, _FACTORIES)}"]
    if not isinstance(options, Mapping):
        return [f"{name}: {options!r} found; a group of options was wanted"]
    parameters = inspect.signature(_FACTORIES[name]).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    problems = []
    for option, value in options.items():
        if option not in parameters and not takes_any:
            problems.append(f"{name}.{option}: no such option; {_nearest(option, parameters)}")
        elif option in parameters and not _fits(value, parameters[option].default):
            wanted = type(parameters[option].default).__name__
            problems.append(f"{name}.{option}: {value!r} found; {wanted} was wanted")
    return problems


def _nearest(name: str, known: Collection[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"one of {', '.join(sorted(known)) or '(none)'} was wanted"


def _fits(value: Any, default: Any) -> bool:
    """Whether a value can stand for a default; any can where there is none."""
    return default is None or default is inspect.Parameter.empty or is_like(value, default)


def refuse_broken(
    scores: Mapping[str, Float[np.ndarray, "P G"]], edited: Float[Array, "P G H W 3"]
) -> dict[str, Float[np.ndarray, "P G"]]:
    """The scores, NaN where the picture has a pixel that is not finite: a judge may round it to 8 bits and find black.

    Args:
        scores: Of `score_all`.
        edited: The candidates that were scored.
    """
    sound = np.asarray(jnp.isfinite(edited).all((2, 3, 4)))
    return {name: np.where(sound, score, np.float32("nan")) for name, score in scores.items()}


def score_all(rewards: Mapping[str, Reward], inputs: RewardInputs) -> dict[str, Float[np.ndarray, "P G"]]:
    """Scores a batch by every reward.

    NaN passes through as it is: what combines the scores decides what becomes of the group.

    Args:
        rewards: The rewards under the names that the scores shall have.
        inputs: The batch.

    Returns:
        `{name: [P, G]}` float32 on the host.

    Raises:
        UserError: A reward failed or returned another shape; the message names it.
    """
    wanted = inputs.edited.shape[:2]
    scores = {}
    for name, reward in rewards.items():
        try:
            # Copied to the host inside the `try`: an error in asynchronously dispatched work surfaces here.
            scores[name] = np.asarray(reward(inputs), np.float32)
        except UserError as error:
            raise UserError(f"reward {name!r}: {error.problem}", error.remedy) from error
        except Exception as error:
            raise UserError(
                f"reward {name!r} failed: {type(error).__name__}: {error}",
                "Mend the reward, or leave it out of the configuration; --debug shows where it failed.",
            ) from error
        if scores[name].shape != wanted:
            raise UserError(
                f"reward {name!r}: scores of shape {scores[name].shape}; (prompts, candidates) = {wanted} was wanted.",
                "Return one score for each candidate.",
            )
    return scores
