"""Where examples come from: files to numpy arrays on the host."""

from rcgrpo_jax.data.example import EditExample, Needs, check_example
from rcgrpo_jax.data.folder import EditFolder

__all__ = ["EditExample", "EditFolder", "Needs", "check_example"]
