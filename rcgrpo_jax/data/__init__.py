"""Where examples come from: files to numpy arrays on the host."""

from rcgrpo_jax.data.example import EditExample, check_example
from rcgrpo_jax.data.folder import EditFolder

__all__ = ["EditExample", "EditFolder", "check_example"]
