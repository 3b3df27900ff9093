"""A run of either kind of training, told by its saved configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcgrpo_jax.rl import config as rl
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.saved import Schema, saved_config
from rcgrpo_jax.sft import config as sft


def schema_of(config: Mapping[str, Any]) -> Schema:
    """The kind of training that a saved configuration is of."""
    return sft if "stage" in config else rl


def read_saved_config(checkpointer: Checkpointer, step: int | None = None) -> dict[str, Any]:
    """As `runs.saved.saved_config`, of a run of either kind."""
    return saved_config(checkpointer, schema_of(checkpointer.saved_config(step)), step)
