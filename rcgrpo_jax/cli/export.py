"""`rcgrpo export --workdir W [--step N | --step best | --all] [--format F] --out DIR`."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import check_apart, path_flag
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.runs.best import best_step
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.weights.lora import FORMS

ABOUT = """Writes a trained LoRA as other programs load it; the average, if one was kept.

diffusers: as pipe.load_lora_weights reads it. kohya: lora_unet_* with .alpha, for Forge and most others.
comfyui: diffusion_model.*. Every form has the same strength in every program: alpha is folded in."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("workdir", "directory of the run", values)
    path_flag("out", "folder or .safetensors file to write", values)
    path_flag("model", "the base, if it has moved since; only its config.json is read", values)
    flags.DEFINE_string("step", None, "step of the checkpoint, or best; the latest by default", flag_values=values)
    flags.DEFINE_bool("all", False, "every checkpoint, each to OUT/step_N", values)
    flags.DEFINE_enum("format", "diffusers", list(FORMS), "form of the file", values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the file", values)


def _step(values: flags.FlagValues) -> int | None:
    """The step that `--step` names; None if it names none."""
    if values.step is None:
        return None
    if values.step == "best":
        return best_step(Path(values.workdir) / "checkpoints")
    if not (values.step.isascii() and values.step.isdecimal()):
        raise UsageError(f"--step: {values.step!r} found; a whole number or best was wanted.", "Correct it.")
    return int(values.step)


def run(argv: list[str]) -> None:
    values, _ = parse("export", ABOUT, argv, _flags, required=("workdir", "out"))
    check_apart("--out", Path(values.out), {"checkpoints of --workdir": Path(values.workdir) / "checkpoints"})
    leave_devices_alone()
    options = {"model": values.model, "form": values.format, "dtype": values.dtype}
    if not values.all:
        print(f"LoRA: {export(values.workdir, values.out, _step(values), **options)}")
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
