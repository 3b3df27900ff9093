"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array
from ml_collections import ConfigDict

from rcgrpo_jax.models.lora import LoRAConfig, init_adapter


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; the position in the data follows from `step`."""

    step: Array  # int32, training steps done
    lora: dict  # adapter, B not scaled, float32
    opt_state: Any  # of optax
    ema: dict | None  # exponential moving average of `lora`, if kept
    key: Array  # random key of the run; step t uses fold_in(key, t)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW under a global-norm clip, with linear warm-up; counts are optimizer updates."""
    rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps) if config.warmup_steps else None
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate or config.learning_rate, config.b1, config.b2, weight_decay=config.weight_decay),
    )


def init_state(config: ConfigDict, params: dict) -> TrainState:
    """The state before the first step: a fresh adapter (B = 0) and zero moments.

    Args:
        config: The run's configuration.
        params: Base parameters of the transformer, arrays or shapes.
    """
    lora = LoRAConfig(**config.lora)
    key_lora, key = jax.random.split(jax.random.key(config.seed))
    adapter = init_adapter(key_lora, params, lora)
    ema = jax.tree.map(jnp.copy, adapter) if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), adapter, make_optimizer(config.optimizer).init(adapter), ema, key)
