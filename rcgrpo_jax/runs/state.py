"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array

from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, start_from
from rcgrpo_jax.options import OptimizerOptions
from rcgrpo_jax.parallel.distributed import from_main, raise_together, to_host, to_mesh
from rcgrpo_jax.weights.lora import load_loras


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; the position in the data follows from `step`."""

    step: Array  # int32, training steps done
    params: dict  # what is trained, float32: for a LoRA the adapter, B not scaled
    opt_state: Any  # of optax
    ema: dict | None  # exponential moving average of `params`, if kept
    key: Array  # random key of the run; step t uses fold_in(key, t)
    old: dict | None = None  # what rolls out in place of `params`, if it is kept

    @property
    def rolling_out(self) -> dict:
        """The parameters that candidates are rolled out with."""
        return self.params if self.old is None else self.old

    @property
    def num_updates(self) -> Array:
        """Optimizer updates done; a step may have several, or none where no group teaches anything."""
        return optax.tree.get(self.opt_state, "ScaleByAdamState").count

    @property
    def averaged(self) -> dict:
        """The average if one is kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """AdamW under a global-norm clip, with linear warm-up and cosine decay; counts are optimizer updates."""
    parts, ends = [optax.constant_schedule(options.learning_rate)], []
    if options.decay_steps:
        parts = [optax.cosine_decay_schedule(options.learning_rate, options.decay_steps)]
    if options.warmup_steps:
        parts.insert(0, optax.linear_schedule(0.0, options.learning_rate, options.warmup_steps))
        ends = [options.warmup_steps]
    rate = optax.join_schedules(parts, ends)
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay),
    )


def new_state(optimizer: OptimizerOptions, params: dict, key: Array, keep_old: bool = False) -> TrainState:
    """The state before the first step: zero moments, the average and the old parameters at the parameters.

    Args:
        optimizer: Its options.
        params: What is trained, float32, on its shardings.
        key: Random key of the run.
        keep_old: Whether rollouts have parameters of their own.
    """
    ema, old = (jax.tree.map(jnp.copy, params) if kept else None for kept in (optimizer.ema_decay, keep_old))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer).init(params), ema, key, old)


def init_state(
    lora: LoRAConfig, optimizer: OptimizerOptions, seed: int, params: dict, keep_old: bool = False
) -> TrainState:
    """The state of a LoRA run before the first step: a fresh adapter (B = 0).

    Args:
        lora: The adapter.
        optimizer: Its options.
        seed: Of the run.
        params: Base parameters of the transformer, arrays or shapes.
        keep_old: As for `new_state`.
    """
    key_lora, key = jax.random.split(jax.random.key(seed))
    return new_state(optimizer, init_adapter(key_lora, params, lora), key, keep_old)


def start_lora(state: TrainState, lora: LoRAConfig, params: dict, mesh: Mesh) -> TrainState:
    """The state before the first step with the LoRA of `lora.init`, if there is one, in place of the fresh adapter.

    Args:
        state: From `new_state`.
        lora: The adapter.
        params: Base parameters of the transformer, arrays or shapes.
        mesh: The mesh.

    Raises:
        UserError: If it cannot be read, or does not fit into `lora.targets` and `lora.rank`.
    """
    if not lora.init:
        return state
    with raise_together():
        given = load_loras([lora.init], [1.0], params)
        started = start_from(to_host(state.params), given, lora)
    started = to_mesh(from_main(started), mesh)
    copies = (None if kept is None else jax.tree.map(jnp.copy, started) for kept in (state.ema, state.old))
    return state.replace(params=started, **dict(zip(("ema", "old"), copies, strict=True)))


def apply_gradients(state: TrainState, grads: dict, optimizer: OptimizerOptions) -> TrainState:
    """One optimizer update of parameters and average; `step` is left to the caller.

    Args:
        state: Before.
        grads: Of the loss with respect to `state.params`.
        optimizer: Its options.
    """
    updates, opt_state = make_optimizer(optimizer).update(grads, state.opt_state, state.params)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if ema is not None:
        # Warmed up: a fixed decay would keep the first parameters in the average for 1 / (1 - decay) steps.
        decay = jnp.minimum(optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1.0 - decay)
    return state.replace(params=params, opt_state=opt_state, ema=ema)
