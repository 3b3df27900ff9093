"""`rcgrpo sft`: supervised training on (source, instruction, target) triples, one stage a run.

The stages `vae` and `flow` leave a diffusers folder, `WORKDIR/model`, that the next one starts from; `lora` leaves an
adapter in diffusers format, `WORKDIR/lora`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rcgrpo_jax.editors.flux_kontext import FluxKontext
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.errors import UsageError, UserError, mark_everywhere, reason
from rcgrpo_jax.models.attention import choose
from rcgrpo_jax.options import read_options
from rcgrpo_jax.parallel.distributed import from_main, gather, is_main, raise_together, text_of_main, to_host, to_mesh
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, check_parts, make_mesh
from rcgrpo_jax.parallel.microbatch import accumulate
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.runs.differences import check_same_config
from rcgrpo_jax.runs.grid import GridRow, candidate_pixels, comparison_grid
from rcgrpo_jax.runs.run import GRID, StepFunction, is_finished, open_run, restore, run_steps
from rcgrpo_jax.runs.saved import saved_config
from rcgrpo_jax.runs.sizes import check_tokens
from rcgrpo_jax.runs.state import TrainState, apply_gradients, new_state, start_lora
from rcgrpo_jax.sft import config as schema
from rcgrpo_jax.sft.config import MAY_DIFFER, validate
from rcgrpo_jax.sft.options import Options
from rcgrpo_jax.sft.sizes import check_stage
from rcgrpo_jax.sft.stages import STAGES, Stage
from rcgrpo_jax.weights import random_folder

PICTURED = 4  # examples in a picture


def train_supervised(config: ConfigDict, workdir: str | Path, devices: list[jax.Device] | None = None) -> Path | None:
    """Runs one stage; called again on the same `workdir` it goes on from the last checkpoint.

    `workdir` receives `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `images/` and the result. SIGTERM saves a
    checkpoint and returns.

    Args:
        config: As `sft.config.default_config` lays it out.
        workdir: Directory of the run; created if missing.
        devices: Devices of the mesh; all by default.

    Returns:
        Where process 0 has written the result; None if the run was stopped before its end.

    Raises:
        UserError: For every mistake in configuration, model, data or resume that can be told.
    """
    workdir = Path(workdir)
    devices = jax.devices() if devices is None else devices
    validate(config, len(devices))
    config_record, options = config.to_dict(), read_options(Options, config)
    mesh = make_mesh(vars(options.mesh), devices)
    whole, results = replicated(mesh), ("start", "model", "lora")
    with jax.set_mesh(mesh), open_run(options.train, config_record, workdir, results) as checkpointer:
        if checkpointer.latest_step() is not None:  # before the data are encoded, which may take long
            check_same_config(
                saved_config(checkpointer, schema), config_record, (*MAY_DIFFER, "data_digest", "model_digest")
            )
        folder = open_folder(options, workdir)
        # Then `batch.size` divides over the processes too: it does over data x fsdp, and each has whole rows of these.
        check_parts(mesh, folder.sizes.num_heads)
        choose(options.model.attention, mesh.devices.flat[0].platform, options.model.dtype)
        check_stage(options, folder)
        stage = STAGES[options.stage](options, folder, mesh, workdir)
        key_params, key = jax.random.split(jax.random.key(options.seed))
        state = new_state(options.optimizer, stage.initial(key_params), key)
        if checkpointer.latest_step() is None and options.stage == "lora":
            state = start_lora(state, options.lora, stage.editor.params, mesh)
        batches = stage.batches()
        config_record = config_record | stage.identity(batches)
        shardings = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else whole, state)
        state = restore(checkpointer, jax.device_put(state, shardings), config_record, schema, MAY_DIFFER)
        if not is_finished(state, options.train.num_steps):
            step = make_step(options, stage, mesh, batches, shardings)
            samples = (options.stage, options.batch.size)
            state = run_steps(state, step, options.train, config_record, workdir, checkpointer, *samples, _shown)
        if int(state.step) < options.train.num_steps:
            return None
        return _save(stage, state, batches)


def encode_ahead(config: ConfigDict, workdir: Path) -> list[EncodedSource]:
    """As `rl.setup.encode_ahead`, of a run of the stage `lora`; the others encode nothing before they train.

    Raises:
        UsageError: Also for another stage.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1, "batch.micro_batch": 0})
    validate(config, 1)
    options = read_options(Options, config)
    if options.stage != "lora":
        raise UsageError(
            f"config: stage: {options.stage!r} found; lora, which alone encodes its data ahead, was wanted.",
            "Train it as it is: it reads its pictures while it trains.",
        )
    mesh, folder = make_mesh(vars(options.mesh)), open_folder(options, workdir)
    check_stage(options, folder)
    with jax.set_mesh(mesh):
        return [STAGES["lora"](options, folder, mesh, workdir).batches().source]


def open_folder(options: Options, workdir: Path) -> Model:
    """The model that training starts from; without a path, a new small editor in `workdir/start`.

    Raises:
        UserError: If a stage that trains FLUX's own networks starts from another family, or a converted directory.
    """
    if not options.model.path:
        path = workdir / "start"
        with raise_together():
            if is_main() and not (path / "model_index.json").is_file():  # written last
                random_folder.build(path, options.seed, random_folder.EDITOR, random_folder.EDITOR_TEXT_TOKENS)
        return FluxKontext(path)
    if options.stage == "lora":
        folder = open_model(options.model.path)
    elif (folder := FluxKontext(options.model.path)).converted:
        raise UserError(
            f"model.path: {folder.path} is a converted model; stage {options.stage} writes a diffusers folder.",
            "Give the diffusers folder that it was converted from.",
        )
    check_tokens(options.data, folder.sizes.token_pixels)
    if options.vae.crop % (side := folder.sizes.token_pixels):
        raise UsageError(
            f"config: vae.crop: {options.vae.crop}; this model's tokens are {side} pixels a side.",
            f"Choose a multiple of {side}.",
        )
    return folder


def make_update(options: Options, stage: Stage, mesh: Mesh, shardings: TrainState) -> Any:
    """The compiled (state, frozen, arrays) -> (state, metrics): one optimizer update.

    The state is donated, and stays on its `shardings`.
    """

    def chunk_loss(trained: dict, frozen: dict, keys: Any, examples: Any) -> tuple[Any, dict]:
        one = partial(stage.loss, trained, frozen)
        losses, metrics = jax.vmap(one, spmd_axis_name=SAMPLE_AXES)(keys, examples)
        return losses.mean(), metrics | {"loss": losses}

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    def update(state: TrainState, frozen: dict, examples: Any) -> tuple[TrainState, dict]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), options.batch.size)

        def gradients(*chunk: Any) -> tuple[dict, dict]:
            return jax.grad(chunk_loss, has_aux=True)(state.params, frozen, *chunk)

        grads, metrics = accumulate(gradients, (keys, examples), options.batch.micro_batch, mesh)
        state = apply_gradients(state, grads, options.optimizer)
        metrics = {name: x.mean() for name, x in metrics.items()} | {"grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1), metrics

    return update


def make_step(options: Options, stage: Stage, mesh: Mesh, batches: Any, shardings: TrainState) -> StepFunction:
    """One step on the batch of its index, as `run_steps` takes it; pictures are those of the averaged parameters."""
    update, frozen = make_update(options, stage, mesh, shardings), stage.frozen()
    draw_all = jax.jit(jax.vmap(stage.picture, (None, None, 0)), out_shardings=replicated(mesh))

    def step(state: TrainState, index: int, draw: bool) -> tuple[TrainState, dict[str, float], dict[str, np.ndarray]]:
        start = time.monotonic()
        with raise_together():
            batch = batches[index]
        examples = stage.arrays(batch)
        state, metrics = update(state, frozen, to_mesh(examples, mesh, PartitionSpec(SAMPLE_AXES)))
        metrics = {name: float(x) for name, x in metrics.items()}
        metrics["samples_per_second"] = options.batch.size / (time.monotonic() - start)
        if not draw:
            return state, metrics, {}
        few = from_main(jax.tree.map(lambda x: x[:PICTURED], examples))
        pictures = candidate_pixels(draw_all(state.averaged, frozen, few).astype(np.float32) / 2 + 0.5)
        rows = [
            GridRow(text, source, mask, np.stack([target, made]), ["target", "made"])
            for text, source, mask, target, made in zip(
                batch.instructions, few.source, few.mask, few.target, pictures, strict=False
            )
        ]
        return state, metrics, {GRID: comparison_grid(rows, f"step {index + 1}")}

    return step


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: x for name, x in metrics.items() if name.startswith(("loss", "psnr"))}


def _save(stage: Stage, state: TrainState, batches: Any) -> Path:
    from safetensors import SafetensorError

    try:
        trained, examples = to_host(state.averaged), gather(stage.arrays(batches[0]))
        with raise_together(), jax.set_mesh(stage.mesh.local_mesh):  # a program of one process
            written = stage.save(trained, examples) if is_main() else ""
        return Path(text_of_main(str(written)))
    except (OSError, SafetensorError) as error:  # a full disk is either
        unwritten = UserError(
            f"workdir: the result cannot be written to {stage.workdir} ({reason(error)}).",
            "Free some space, then run the same command: training is done and its last checkpoint kept.",
        )
        raise mark_everywhere(unwritten) from error  # the others have been told
