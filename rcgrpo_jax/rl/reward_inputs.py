"""What rewards compare edits with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.rewards import RewardInputs


def reward_inputs(batch: EditBatch, mesh: Mesh) -> Callable[..., RewardInputs]:
    """The inputs of rewards, all but `edited`, on the devices of this process' mesh."""
    with jax.set_mesh(mesh):
        source = jnp.asarray(batch.pixels, jnp.float32) / 255
        targets = None if batch.targets is None else jnp.asarray(batch.targets, jnp.float32) / 255
        return partial(
            RewardInputs, source=source, mask=jnp.asarray(batch.mask), instructions=batch.instructions,
            targets=targets, captions=batch.captions,
        )  # fmt: skip
