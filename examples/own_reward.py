"""A reward of your own: a class with two methods, and one line that gives it a name.

This one likes light edits. The run trains a LoRA for the small editor that ships with the package: three steps, which
take about a minute on two cores. Most of that is compilation.

    python examples/own_reward.py runs/brightness
    rcgrpo train --config examples/own_reward.py --workdir runs/brightness    # the same from the command line
"""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rcgrpo_jax.rewards import RewardInputs, register
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.metrics import read_metrics


@register("brightness")  # the name of the reward in a configuration and in metrics.jsonl
@dataclass(frozen=True)
class Brightness:
    """The mean of the pixels inside the mask, 0 for black and 1 for white, up to a limit."""

    limit: float = 0.9  # an option: `reward_options.brightness.limit` sets it

    def validate(self, instruction: str) -> None:
        """Is called with every instruction before the training. A UserError would refuse it; this reward takes all."""

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        """Scores G candidates for each of P prompts. NaN would mean "no score", and the group would be left out."""
        mask = inputs.mask[:, None, :, :, None]  # [P, 1, H, W, 1], beside pictures [P, G, H, W, 3] in [0, 1]
        inside = jnp.sum(mask * inputs.edited, (2, 3, 4)) / (3 * jnp.sum(mask, (2, 3, 4)))
        return jnp.minimum(inside, self.limit)


def get_config() -> ConfigDict:
    config = small_editor()
    config.rewards = ConfigDict({"brightness": 1.0, "preservation": 0.5})  # name -> weight
    config.reward_options.brightness = ConfigDict({"limit": 0.8})
    config.data.path = "scenes:train:8"  # eight synthetic scenes
    config.rollout.prompts, config.rollout.group_size = 2, 4
    config.train.num_steps = config.optimizer.decay_steps = 3
    return config


if __name__ == "__main__":
    train(get_config(), sys.argv[1], devices=jax.devices()[:1])
    for line in read_metrics(f"{sys.argv[1]}/metrics.jsonl"):
        print(f"step {line['step']}: brightness {line['reward/brightness']:.3f}")
