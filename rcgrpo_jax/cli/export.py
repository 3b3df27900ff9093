"""`rcgrpo export --workdir W [--step N | --all] [--format F] --out DIR`."""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict
from safetensors import SafetensorError

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import check_apart, path_flag
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.state import init_state
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import FORMS, holds_lora, lora_file, save_lora
from rcgrpo_jax.weights.networks import abstract_params

ABOUT = """Writes a trained LoRA as other programs load it; the average, if one was kept.

diffusers: as pipe.load_lora_weights reads it. kohya: lora_unet_* with .alpha, for Forge and most others. comfyui: \
diffusion_model.*. Every form has the same strength in every program: alpha is folded in."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("workdir", "directory of the run", values)
    path_flag("out", "folder or .safetensors file to write", values)
    path_flag("model", "the base, if it has moved since; only its config.json is read", values)
    flags.DEFINE_integer("step", None, "training step of the checkpoint; the latest by default", flag_values=values)
    flags.DEFINE_bool("all", False, "every checkpoint, each to OUT/step_N", values)
    flags.DEFINE_enum("format", "diffusers", list(FORMS), "form of the file", values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the file", values)


def export(
    workdir: str | Path,
    out: str | Path,
    step: int | None = None,
    model: str | None = None,
    form: str = "diffusers",
    dtype: str = "bfloat16",
) -> Path:
    """Writes the LoRA of a run's checkpoint.

    Args:
        workdir: Of `rcgrpo train`, or of `rcgrpo sft` with stage lora.
        out: Folder or `.safetensors` file.
        step: Of the checkpoint; the latest by default.
        model: Where the base is, if it has moved.
        form: A name of `FORMS`.
        dtype: bfloat16 or float32.

    Returns:
        The file.

    Raises:
        UserError: If there is no such checkpoint, its run trained no LoRA, or the file cannot be written or is there
            and holds something else.
    """
    file = lora_file(Path(out), form)
    if file.is_file() and file.stat().st_size and not holds_lora(file):
        raise UserError(
            f"--out: {file} is there and holds no LoRA; a file that this command has written was wanted.",
            "Choose another name, or remove the file.",
        )
    checkpointer = Checkpointer(Path(workdir) / "checkpoints", save_every=1, keep=1)
    saved = read_saved_config(checkpointer, step)
    if saved.get("stage", "lora") != "lora":
        raise UserError(
            f"--workdir: {workdir} is a run of stage {saved['stage']}, which trains no LoRA.",
            f"Its result is {Path(workdir) / 'model'}.",
        )
    config = ConfigDict(saved)
    params = abstract_params("transformer", ModelFolder(model or config.model.path).config("transformer"))
    state = checkpointer.restore(jax.eval_shape(lambda: init_state(config, params)), step)
    try:
        return save_lora(Path(out), state.averaged, LoRAConfig(**config.lora), params, form, dtype)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        raise UserError(f"--out: {out} cannot be written ({error}).", "Choose a folder you can write to.") from None


def run(argv: list[str]) -> None:
    values, _ = parse("export", ABOUT, argv, _flags, required=("workdir", "out"))
    check_apart("--out", Path(values.out), {"checkpoints of --workdir": Path(values.workdir) / "checkpoints"})
    leave_devices_alone()
    options = {"model": values.model, "form": values.format, "dtype": values.dtype}
    if not values.all:
        print(f"LoRA: {export(values.workdir, values.out, values.step, **options)}")
        return
    if values.step is not None or Path(values.out).suffix == ".safetensors":
        raise UsageError(
            "--all: together with --step, or with a file for --out; every checkpoint and a folder were wanted.",
            "Leave --step out, and name a folder.",
        )
    steps = Checkpointer(Path(values.workdir) / "checkpoints", save_every=1, keep=1).steps()
    if not steps:
        raise UserError(f"--workdir: {values.workdir} has no checkpoint.", "Name that of a run that has saved.")
    for step in steps:
        print(f"LoRA of step {step}: {export(values.workdir, Path(values.out) / f'step_{step:06d}', step, **options)}")
