"""Transformer and text encoders of the small editor that ships with the package, after its autoencoder.

    rcgrpo sft --config configs/small_flow.py --workdir runs/1 --config.model.path=runs/vae/model

This is the first leg; docs/pretraining.md has what the others change. 30 % of the targets are flawed: half of these
spill, the others have the wrong shape or colour or leave a ghost.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.sft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stage = "flow"
    config.save_dtype = "float16"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.path = "scenes:train:400000:0.3"
    config.data.size = (128, 128)
    config.batch.size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 10000
    config.train.save_every = 200
    config.train.image_every = 500
    return config
