"""Configurations that the package itself runs."""

from __future__ import annotations

from ml_collections import ConfigDict

from rcgrpo_jax.training.config import default_config
from rcgrpo_jax.weights.load import SMALL_EDITOR


def small_editor() -> ConfigDict:
    """RC-GRPO on the editor that ships with the package, judged by the oracle of its scenes: minutes on two cores."""
    config = default_config()
    config.model.path = SMALL_EDITOR.name
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.path = "scenes:train:600"
    config.data.size = (128, 128)
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.surrogate.steps = "early"
    config.rewards = ConfigDict({"oracle": 1.0})
    config.acd.layers = 4  # of 6 blocks
    config.optimizer.learning_rate = 2e-3
    config.train.num_steps = 40
    config.train.image_every = 20
    return config
