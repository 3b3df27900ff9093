"""`rcgrpo_jax.sft.config` is the name now."""

from rcgrpo_jax.sft.config import default_config, validate

__all__ = ["default_config", "validate"]
