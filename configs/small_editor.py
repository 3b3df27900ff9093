"""RC-GRPO on the small editor that ships with the package, judged by the oracle of the scenes: minutes on two cores.

    rcgrpo train --config configs/small_editor.py --workdir runs/small_editor

The common configuration of the ablations in docs/findings.md.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.path = "small-editor"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.model.max_text_tokens = 24
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
