"""`rcgrpo_jax.rl.config` is the name now."""

from rcgrpo_jax.rl.config import default_config, validate

__all__ = ["default_config", "validate"]
