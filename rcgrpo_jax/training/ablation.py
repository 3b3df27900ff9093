"""The paper's ablations: variants of one run, several training seeds each, evaluated on the same held-out edits.

Every piece (a run, an evaluation) is kept on disk and made once, so that an interrupted ablation goes on where it was.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rcgrpo_jax.data.pipeline import Source
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.evaluate import Evaluation, evaluate
from rcgrpo_jax.models.lora import LoRAConfig, scale_adapter
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.training.encode import encode
from rcgrpo_jax.training.loop import (
    Trainer,
    background_drift,
    check_example,
    first_state,
    load_editor,
    make_rewards,
    train,
)
from rcgrpo_jax.training.metrics import Progress
from rcgrpo_jax.weights.load import ModelFolder


class Variant(NamedTuple):
    """A row of a table: what it changes in the common configuration."""

    name: str
    changes: Mapping[str, Any]  # dotted field -> value


BASE = "base"  # the row without training
COMPONENTS = (  # Table 2
    Variant("Neighbor GRPO", {"explore.kind": "global", "acd.weight": 0.0}),
    Variant("RDP", {"explore.kind": "region", "acd.weight": 0.0}),
    Variant("RDP + ACD", {"explore.kind": "region"}),
)
TAUS = tuple(  # Table 3
    Variant(f"tau {edit} / {base}", {"surrogate.tau_edit": edit, "surrogate.tau_base": base})
    for edit, base in ((1.0, 1.0), (0.9, 1.1), (0.8, 1.2), (1.2, 0.8))
)


class Protocol(NamedTuple):
    """How variants are evaluated: fresh noise, no perturbation."""

    source: Source  # held-out examples with targets
    num_steps: int = 28  # K
    seed: int = 0  # of the noise


def parse_variant(text: str) -> Variant:
    """A variant from `NAME: FIELD=VALUE FIELD=VALUE ...`.

    Raises:
        UsageError: For another form.
    """
    name, colon, changes = text.partition(":")
    fields = dict(re.findall(r"([\w.]+)=(\S+)", changes))
    if not colon or not name.strip() or len(fields) != len(changes.split()):
        raise UsageError(
            f"--variant: {text!r} found; NAME: FIELD=VALUE FIELD=VALUE ... was wanted.",
            "Write --variant 'strong RDP: explore.alpha_edit=0.5 acd.weight=0'.",
        )
    return Variant(name.strip(), {field: _value(value) for field, value in fields.items()})


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def configure(config: ConfigDict, variant: Variant, seed: int) -> ConfigDict:
    """The configuration of one run.

    Raises:
        UsageError: The variant names an unknown field, or a value of another type.
    """
    changed = config.copy_and_resolve_references().lock()  # against new fields
    try:
        changed.update_from_flattened_dict({**variant.changes, "seed": seed})
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"variant {variant.name!r}: {' '.join(str(error).split())}.", "Name fields of the configuration."
        ) from None
    return changed


def run_variant(config: ConfigDict, variant: Variant, seed: int, protocol: Protocol, out: Path) -> Evaluation:
    """Trains one variant from one seed and evaluates its adapter.

    Args:
        config: Common to all variants.
        variant: What is changed.
        seed: Of the training.
        protocol: Of the evaluation.
        out: Gets `runs/VARIANT/SEED` and `evaluations/VARIANT/SEED.npz`.
    """
    file = out / "evaluations" / slug(variant.name) / f"{seed}.npz"
    if file.exists():
        return Evaluation.load(file)
    config = configure(config, variant, seed)
    state = train(config, out / "runs" / slug(variant.name) / str(seed), jax.devices()[:1])
    adapter = scale_adapter(state.averaged, LoRAConfig(**config.lora).scale)
    return _evaluate(config, protocol, file, f"{variant.name}, seed {seed}", adapter)


def run_base(config: ConfigDict, protocol: Protocol, out: Path) -> Evaluation:
    """Evaluates the model without an adapter."""
    file = out / "evaluations" / f"{BASE}.npz"
    return Evaluation.load(file) if file.exists() else _evaluate(config, protocol, file, BASE)


def _evaluate(config: ConfigDict, protocol: Protocol, file: Path, name: str, lora: dict | None = None) -> Evaluation:
    mesh = make_mesh({}, jax.devices()[:1])
    with Progress(len(protocol.source), description=f"evaluate {name}", lines=5) as progress:
        evaluation = evaluate(
            load_editor(config, ModelFolder(config.model.path), mesh),
            protocol.source,
            range(len(protocol.source)),
            num_steps=protocol.num_steps,
            guidance=config.model.guidance,
            seed=protocol.seed,
            lora=lora,
            size=tuple(config.data.size),
            mesh=mesh,
            progress=progress.update,
        )
    evaluation.save(file)
    return evaluation


class Exploration(NamedTuple):
    """What a perturbation does before any training, one value a group (Fig. 5)."""

    drift: Float[np.ndarray, " Q"]  # of the background, between candidates
    reward_std: Float[np.ndarray, " Q"]  # of the task reward, within the group


def explore(config: ConfigDict, variant: Variant, seed: int, out: Path, num_batches: int) -> Exploration:
    """Groups of the untrained model under a variant's perturbation; equal seeds see equal prompts and references.

    Args:
        config: Common to all variants.
        variant: What is changed.
        seed: Of prompts and noise.
        out: Has the cache of encodings.
        num_batches: Batches of `rollout.prompts` groups.
    """
    config = configure(config, variant, seed)
    config.acd.weight = 0.0  # as in the paper: task reward only
    mesh = make_mesh({}, jax.devices()[:1])
    folder, rewards = ModelFolder(config.model.path), make_rewards(config)
    drifts, stds = [], []
    with jax.set_mesh(mesh):
        batches = encode(config, folder, out, mesh, config.rollout.prompts, partial(check_example, rewards))
        trainer = Trainer(config, load_editor(config, folder, mesh), mesh, rewards)
        state = first_state(config, folder, mesh)
        for step in range(num_batches):
            sample = trainer.sample(state.replace(step=jnp.int32(step)), batches[step])
            drifts.append(np.asarray(background_drift(batches[step], sample.images)))
            task = sum(trainer.weights[name] * score for name, score in sample.scores.items())
            stds.append(task.std(-1))
    return Exploration(np.concatenate(drifts), np.concatenate(stds))


def slug(name: str) -> str:
    """A name as a directory."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
