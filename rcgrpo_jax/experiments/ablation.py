"""The paper's ablations: variants of one run, several training seeds each, evaluated on the same held-out edits.

Every piece (a run, an evaluation) is kept on disk and made once, so that an interrupted ablation goes on where it was.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from rcgrpo_jax.data.sources import open_source, same_examples
from rcgrpo_jax.editors.open import check_fits, open_model
from rcgrpo_jax.encoding.encode import Batches
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.evaluate import evaluate
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.experiments.cost import Cost
from rcgrpo_jax.models.lora import LoRAConfig, scale_adapter
from rcgrpo_jax.options import ModelOptions, read_options
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.progress import ProgressCallback, count_steps, no_progress
from rcgrpo_jax.rl.config import MAY_DIFFER
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.reward_fields import name_rewards
from rcgrpo_jax.rl.setup import Setup, set_up
from rcgrpo_jax.rl.step_metrics import background_drift
from rcgrpo_jax.rl.trainer import Trainer, train_to_end
from rcgrpo_jax.runs.differences import config_differences
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.runs.state import TrainState


class Variant(NamedTuple):
    """A row of a table: what it changes in the common configuration."""

    name: str
    changes: Mapping[str, Any]  # dotted field -> value


BASE = "base"  # the row without training
COMPONENTS = (  # Table 2
    Variant("GRPO (global)", {"explore.kind": "global", "acd.weight": 0.0}),
    Variant("GRPO + RDP", {"explore.kind": "region", "acd.weight": 0.0}),
    Variant("RDP + ACD", {"explore.kind": "region"}),
)
TAUS = tuple(  # Table 3, of the region metric
    Variant(
        f"tau {edit} / {base}",
        {"surrogate.distance": "region", "surrogate.tau_edit": edit, "surrogate.tau_base": base},
    )
    for edit, base in ((1.0, 1.0), (0.9, 1.1), (0.8, 1.2), (1.2, 0.8))
)
# Fields of a run that do not touch what it learns.
_INCIDENTAL = (
    *(field for field in MAY_DIFFER if field != "train"),
    "model.path",  # its fingerprint counts
    *(
        f"train.{field}"
        for field in ("save_every", "keep", "image_every", "samples", "sample_every", "writers", "profile_steps")
    ),
)


class EvaluationSettings(NamedTuple):
    """How variants are evaluated: fresh noise, no perturbation."""

    data: str  # held-out examples with targets, as `data.path` names them
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
    changed = config.copy_and_resolve_references()
    name_rewards(changed, variant.changes)
    changed.lock()  # against new fields
    try:
        if common := {"seed", "model.path"} & variant.changes.keys():
            raise TypeError(f"{', '.join(common)} found; all variants share seeds and base")
        if None in variant.changes.values():
            raise TypeError("a field without a value found")
        changed.update_from_flattened_dict({**variant.changes, "seed": seed})
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"variant {variant.name!r}: {' '.join(str(error).split())}.", "Name fields of the configuration."
        ) from None
    return changed


def check_variants(
    config: ConfigDict,
    variants: Sequence[Variant],
    protocol: EvaluationSettings,
    seeds: int,
    batches: int,
    devices: Sequence[jax.Device],
) -> dict[str, ConfigDict]:
    """The configuration of each variant's run, by its name, before hours of training.

    Args:
        config: Common to all variants.
        variants: What each of them changes.
        protocol: Of the evaluation.
        seeds: How many trainings of each.
        batches: How many batches of groups each explores before training.
        devices: Of the mesh.

    Raises:
        UsageError: A variant cannot run or is another's, or nothing would be done.
        UserError: The held-out examples cannot be read, or no memory here holds an edit of them.
    """
    names = [variant.name for variant in variants]
    if not variants or len({"", BASE, *map(slug, names)}) < len(names) + 2:
        raise UsageError(
            f"--table, --variant: {', '.join(names) or 'none'} found; at least one was wanted, of names that differ in "
            "their letters and digits.",
            "Write --table components, or --variant 'NAME: FIELD=VALUE'.",
        )
    runs = {variant.name: configure(config, variant, 0) for variant in variants}
    for name, run in runs.items():
        set_up(run, devices)
        if same_examples(run.data.path, protocol.data):
            raise UsageError(
                f"--data: {protocol.data} found, and {name!r} trains on {run.data.path}; other examples were wanted.",
                "Name a held-out split or folder.",
            )
    for (one, a), (other, b) in combinations(runs.items(), 2):
        if a == b:
            raise UsageError(f"variants {one!r} and {other!r} are the same run.", "Leave one of them out.")
        if batches and (a.data, a.rollout.prompts) != (b.data, b.rollout.prompts):
            raise UsageError(
                f"--batches: {one!r} and {other!r} differ in data or rollout.prompts; the same groups were wanted.",
                "Leave --batches out, and call it again for variants that explore the same examples.",
            )
    if not seeds and not batches:
        raise UsageError("--seeds: 0 found, and no --batches; nothing would be done.", "Raise one of them.")
    open_source(protocol.data, config.data.polarity, mask_value=config.data.mask_value)
    if seeds:
        model = open_model(config.model.path)
        check_fits(model, config.data.size, protocol.num_steps, config.model.dtype, field="data.size")
    return runs


def run_variant(
    config: ConfigDict,
    variant: Variant,
    seed: int,
    protocol: EvaluationSettings,
    out: Path,
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback = no_progress,
) -> Evaluation:
    """Trains one variant from one seed and evaluates its adapter.

    Args:
        config: Common to all variants.
        variant: What is changed.
        seed: Of the training.
        protocol: Of the evaluation.
        out: Gets `runs/VARIANT/SEED`, `evaluations/VARIANT/SEED.npz` and, beside it, what the training cost.
        devices: The run's mesh is over these; all by default.
        progress: Told of each edit of the evaluation.

    Raises:
        UserError: The training was stopped, or an evaluation is there that was made otherwise.
    """
    file = out / "evaluations" / slug(variant.name) / f"{seed}.npz"
    changed = configure(config, variant, seed)
    origin = _origin(config, protocol, changed)
    if file.exists():
        return _load(file, origin)
    workdir = out / "runs" / slug(variant.name) / str(seed)
    state = train_to_end(changed, workdir, devices)
    Cost.of_run(read_options(Options, changed), workdir).save(file.with_suffix(".json"))
    adapter = scale_adapter(state.averaged, read_options(LoRAConfig, changed.lora).scale)
    mesh = make_mesh(config.mesh, devices)
    return _evaluate(config, protocol, file, f"{variant.name}, seed {seed}", origin, mesh, progress, adapter)


def cost_of(variant: Variant, seed: int, out: Path) -> Cost | None:
    """What a training cost; None if it was made before costs were kept."""
    return Cost.load(out / "evaluations" / slug(variant.name) / f"{seed}.json")


def run_base(
    config: ConfigDict,
    protocol: EvaluationSettings,
    out: Path,
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback = no_progress,
) -> Evaluation:
    """Evaluates the model without an adapter; arguments as for `run_variant`."""
    file, origin = out / "evaluations" / f"{BASE}.npz", _origin(config, protocol)
    if file.exists():
        return _load(file, origin)
    return _evaluate(config, protocol, file, BASE, origin, make_mesh(config.mesh, devices), progress)


def _origin(config: ConfigDict, protocol: EvaluationSettings, run: ConfigDict | None = None) -> dict[str, Any]:
    """What an evaluation is an evaluation of, and how it is made."""
    common = {name: config[name].to_dict() for name in ("model", "data", "acd")}
    model = {"fingerprint": open_model(config.model.path).whole_fingerprint()}
    evaluated = {
        "protocol": protocol._asdict(),
        "model": model | {name: common["model"][name] for name in ("dtype", "quantization", "guidance")},
        "data": {name: common["data"][name] for name in ("size", "polarity", "mask_value")},
        "acd": {name: common["acd"][name] for name in ("layers", "reference_keys")},
    }
    return {"evaluation": evaluated, "run": run.to_dict() if run else {}}


def _load(file: Path, origin: Mapping[str, Any]) -> Evaluation:
    """Reads an evaluation of that origin."""
    evaluation = Evaluation.load(file)
    ignored = [f"run.{field}" for field in _INCIDENTAL]
    if differences := config_differences(evaluation.origin, origin, ignored, saved_as="there"):
        raise UserError(
            f"{file} was made otherwise: {'; '.join(differences)}.", "Use another --out, or put the values back."
        )
    return evaluation


def _evaluate(
    config: ConfigDict,
    protocol: EvaluationSettings,
    file: Path,
    name: str,
    origin: Mapping[str, Any],
    mesh: Mesh,
    progress: ProgressCallback,
    lora: dict | None = None,
) -> Evaluation:
    source = open_source(protocol.data, config.data.polarity, mask_value=config.data.mask_value)
    model, acd = config.model, config.acd
    evaluation = evaluate(
        load_editor(read_options(ModelOptions, model), open_model(model.path), mesh, acd.layers, acd.reference_keys),
        source,
        range(len(source)),
        num_steps=protocol.num_steps,
        guidance=model.guidance,
        seed=protocol.seed,
        lora=lora,
        size=tuple(config.data.size),
        mesh=mesh,
        progress=count_steps(progress, f"evaluate {name}", len(source)),
    )
    evaluation = replace(evaluation, origin=origin, images=evaluation.images[:0])  # the adapters make them again
    evaluation.save(file)
    return evaluation


def untrained_run(setup: Setup, cache: Path) -> tuple[Trainer, TrainState, Batches]:
    """What the first step of a run starts from: its trainer, its state, and its prompts, encoded.

    Args:
        setup: Of the run; its mesh is set by `jax.set_mesh`.
        cache: Has the cache of encodings.
    """
    batches = setup.encode(cache)
    trainer = Trainer(setup.options, setup.load_editor(), setup.mesh, setup.rewards)
    return trainer, setup.initial_state(), batches


class GroupStatistics(NamedTuple):
    """What a perturbation does before any training, one value a group (Fig. 5), over the perturbed candidates."""

    drift: Float[np.ndarray, " Q"]  # of the background, between candidates
    reward_std: Mapping[str, Float[np.ndarray, " Q"]]  # of each reward, within the group


def group_statistics(
    config: ConfigDict,
    variant: Variant,
    seed: int,
    out: Path,
    num_batches: int,
    devices: Sequence[jax.Device] | None = None,
) -> GroupStatistics:
    """Groups of the untrained model under a variant's perturbation; equal seeds see equal prompts and references.

    Candidate 0 is left out: RDP does not perturb it, and global perturbation does.

    Args:
        config: Common to all variants.
        variant: What is changed.
        seed: Of prompts and noise.
        out: Has the cache of encodings.
        num_batches: Batches of `rollout.prompts` groups.
        devices: The run's mesh is over these; all by default.
    """
    config = configure(config, variant, seed)
    config.acd.weight = 0.0  # as in the paper: task reward only
    drifts, stds = [], []
    setup = set_up(config, devices)
    with jax.set_mesh(setup.mesh):
        trainer, state, batches = untrained_run(setup, out)
        for step in range(num_batches):
            prepared_batch = trainer.prepare(batches[step])
            sample = trainer.sample(state.replace(step=jnp.int32(step)), prepared_batch)
            drifts.append(np.asarray(background_drift(prepared_batch.reward_inputs(edited=sample.images))))
            stds.append({name: scores[:, 1:].std(-1) for name, scores in sample.scores.items()})
    return GroupStatistics(np.concatenate(drifts), jax.tree.map(lambda *parts: np.concatenate(parts), *stds))


def slug(name: str) -> str:
    """A name as a directory."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
