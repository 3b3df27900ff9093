"""How several rewards score a batch at the same time: all are started before the first result is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rcgrpo_jax.errors import StopRequested, UserError, reason
from rcgrpo_jax.rewards.base import Local, Pending, Reward, RewardInputs, Unscored, named

POLL = 0.2  # seconds between two looks at whether a stop was requested


class Scores(NamedTuple):
    """What the rewards say of a batch."""

    by_reward: dict[str, Float[np.ndarray, "P G"]]  # float32; NaN where a candidate has no score
    failures: dict[str, str]  # reward -> why a call of it gave no scores at all, the first such cause


@dataclass(frozen=True)
class PendingScores:
    """The scores of a batch by every reward, under way."""

    started: Mapping[str, Pending | Unscored]  # what a reward started, or why it could not
    sound: Bool[Array, "P G"]  # whether a picture is finite

    def result(self, stop: Event | None = None) -> Scores:
        """Waits for all scores.

        NaN passes through as it is: what combines the scores decides what becomes of the group.

        Args:
            stop: Set once scores are no longer wanted: futures that are not done then are cancelled.

        Raises:
            StopRequested: `stop` was set while a future was waited for.
            UserError: A reward failed, but for `Unscored`, or returned no array of the shape; the message names it.
        """
        sound = np.asarray(self.sound)
        by_reward, failures = {}, {}
        for name, pending in self.started.items():
            try:
                with named(name):
                    if isinstance(pending, Unscored):
                        raise pending
                    # Copied to the host here: an error in asynchronously dispatched work surfaces now.
                    scores = np.asarray(_checked(_wait(pending, stop).result()), np.float32)
            except Unscored as cause:
                failures[name] = reason(cause)
                scores = np.full(sound.shape, np.nan, np.float32)
            if scores.shape != sound.shape:
                raise UserError(
                    f"reward {name!r}: scores of shape {scores.shape}; (prompts, candidates) = {sound.shape} was "
                    "wanted.",
                    "Return one score for each candidate.",
                )
            # A judge may round a picture to 8 bits and find black where it is not finite.
            by_reward[name] = np.where(sound, scores, np.float32("nan"))
        return Scores(by_reward, failures)


def start_all(rewards: Mapping[str, Reward], inputs: RewardInputs) -> PendingScores:
    """Starts every reward on a batch.

    Args:
        rewards: The rewards under the names that the scores shall have.
        inputs: The batch. A picture with a pixel that is not finite gets no score, whatever the rewards say.

    Raises:
        UserError: A reward failed, but for `Unscored`; the message names it.
    """
    started = {}
    # Local rewards come last: one that computes on the host would keep the others waiting.
    for name in sorted(rewards, key=lambda name: isinstance(rewards[name], Local)):
        try:
            with named(name):
                started[name] = rewards[name].start(inputs)
        except Unscored as cause:
            started[name] = cause
    return PendingScores({name: started[name] for name in rewards}, jnp.isfinite(inputs.edited).all((2, 3, 4)))


def check_all(rewards: Mapping[str, Reward]) -> None:
    """Calls the `check` of every reward.

    Raises:
        UserError: One could not score; the message names it.
    """
    for name, reward in rewards.items():
        with named(name):
            reward.check()


def take_all(parts: Sequence[PendingScores], stop: Event | None = None) -> Scores:
    """Waits for the scores of all parts `[P, g]` of a batch, and puts them side by side; `stop` as in `result`."""
    taken = [part.result(stop) for part in parts]
    by_reward = {name: np.concatenate([x.by_reward[name] for x in taken], axis=1) for name in taken[0].by_reward}
    failures = {name: cause for x in reversed(taken) for name, cause in x.failures.items()}
    return Scores(by_reward, failures)


def _wait(pending: Pending, stop: Event | None) -> Pending:
    """What is pending once it is done; what is no future, and waits by itself, as it is."""
    while stop is not None and isinstance(pending, Future) and not pending.done():
        if stop.is_set():
            pending.cancel()
            raise StopRequested("a stop was requested before it had scored.", "The same command resumes.")
        wait([pending], POLL)
    return pending


def _checked(scores: object) -> np.ndarray | jax.Array:
    """Scores as they are, if they are an array of numbers of ours: others may lie on another device, or be futures."""
    numbers = (jnp.floating, jnp.integer, jnp.bool_)
    if isinstance(scores, np.ndarray | jax.Array) and any(jnp.issubdtype(scores.dtype, kind) for kind in numbers):
        return scores
    kind = type(scores)
    found = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    found += f" of {scores.dtype}" if hasattr(scores, "dtype") else ""
    raise UserError(
        f"scores of type {found}; a NumPy or JAX array of numbers was wanted.",
        "Convert them: a torch tensor by scores.detach().cpu().numpy().",
    )
