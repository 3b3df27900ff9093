"""Rewards: a batch of edits in, a score for each candidate out. Importing this package registers the ones below."""

from rcgrpo_jax.rewards.base import (
    Reward,
    RewardInputs,
    make,
    name_problems,
    option_problems,
    refuse_broken,
    register,
    registered,
    score_all,
)
from rcgrpo_jax.rewards.colour import Colour
from rcgrpo_jax.rewards.oracle import Oracle
from rcgrpo_jax.rewards.preservation import Preservation

__all__ = [
    "Colour", "Oracle", "Preservation", "Reward", "RewardInputs", "make", "name_problems", "option_problems",
    "refuse_broken", "register", "registered", "score_all",
]  # fmt: skip
