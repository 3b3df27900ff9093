"""Rewards: a batch of edits in, a score for each candidate out. Importing this package registers the ones below."""

from rcgrpo_jax.rewards.base import (
    Local,
    Pending,
    Reward,
    RewardInputs,
    Unscored,
    as_reward,
    default_options,
    factories,
    incidental_fields,
    is_remote,
    make,
    name_problems,
    option_problems,
    register,
)
from rcgrpo_jax.rewards.change import Change
from rcgrpo_jax.rewards.clip import CLIPDirection, CLIPReward, CLIPText
from rcgrpo_jax.rewards.colour import Colour
from rcgrpo_jax.rewards.editscore import EditScore
from rcgrpo_jax.rewards.imgedit import ImgEditJudge
from rcgrpo_jax.rewards.lpips import LPIPS
from rcgrpo_jax.rewards.oracle import Oracle
from rcgrpo_jax.rewards.plugins import known_rewards, try_reward
from rcgrpo_jax.rewards.preservation import Preservation
from rcgrpo_jax.rewards.rubric import Rubric
from rcgrpo_jax.rewards.scoring import PendingScores, Scores, check_all, start_all, take_all
from rcgrpo_jax.rewards.viescore import VIEScore
from rcgrpo_jax.rewards.vlm_digits import VLMDigits

__all__ = [
    "LPIPS", "CLIPDirection", "CLIPReward", "CLIPText", "Change", "Colour", "EditScore", "ImgEditJudge", "Local",
    "Oracle", "Pending", "PendingScores", "Preservation", "Reward", "RewardInputs", "Rubric", "Scores", "Unscored",
    "VIEScore", "VLMDigits", "as_reward", "check_all", "default_options", "factories", "incidental_fields",
    "is_remote", "known_rewards", "make", "name_problems", "option_problems", "register", "start_all", "take_all",
    "try_reward",
]  # fmt: skip
