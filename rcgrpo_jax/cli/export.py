"""`rcgrpo export --workdir W [--step N] --out DIR`."""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict
from safetensors import SafetensorError

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import check_apart, path_flag
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.training.checkpoint import Checkpointer
from rcgrpo_jax.training.config import default_config
from rcgrpo_jax.training.state import init_state
from rcgrpo_jax.weights.export import save_lora
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import abstract_params

ABOUT = "Writes a trained LoRA as diffusers loads it (pytorch_lora_weights.safetensors); the average, if one was kept."


def _flags(values: flags.FlagValues) -> None:
    path_flag("workdir", "directory of the run", values)
    path_flag("out", "folder to write", values)
    path_flag("model", "the base, if it has moved since; only its config.json is read", values)
    flags.DEFINE_integer("step", None, "training step of the checkpoint; the latest by default", flag_values=values)


def export(workdir: str | Path, out: str | Path, step: int | None = None, model: str | None = None) -> Path:
    """Writes the LoRA of a run's checkpoint and returns the file; `model` says where the base is if it has moved."""
    checkpointer = Checkpointer(Path(workdir) / "checkpoints", save_every=1, keep=1)
    config = default_config()
    config.update(ConfigDict(checkpointer.saved_config(step)))
    params = abstract_params("transformer", ModelFolder(model or config.model.path).config("transformer"))
    state = checkpointer.restore(jax.eval_shape(lambda: init_state(config, params)), step)
    try:
        return save_lora(Path(out), state.averaged, LoRAConfig(**config.lora))
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        raise UserError(f"--out: {out} cannot be written ({error}).", "Choose a folder you can write to.") from None


def run(argv: list[str]) -> None:
    values, _ = parse("export", ABOUT, argv, _flags, required=("workdir", "out"))
    check_apart("--out", Path(values.out), {"checkpoints of --workdir": Path(values.workdir) / "checkpoints"})
    leave_devices_alone()
    print(f"LoRA: {export(values.workdir, values.out, values.step, values.model)}")
