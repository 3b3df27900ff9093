"""The autoencoder of the small editor that ships with the package: stage 1 of 2.

rcgrpo sft --config configs/small_vae.py --workdir runs/small_vae
"""

from ml_collections import ConfigDict

from rcgrpo_jax.sft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stage = "vae"
    config.save_dtype = "float16"
    config.model.dtype = "float32"
    config.data.path = "scenes:train:60000"
    config.data.size = (128, 128)
    config.batch.size = 16
    config.vae.crop = 64
    config.vae.kl_weight = 1e-4
    config.optimizer.learning_rate = 3e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 3150
    config.train.num_steps = 3200
    config.train.save_every = 250
    config.train.image_every = 250
    return config
