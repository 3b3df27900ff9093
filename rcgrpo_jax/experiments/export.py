"""The LoRA of a run's checkpoint, as other programs load it."""

from __future__ import annotations

from pathlib import Path

import jax
from safetensors import SafetensorError

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.options import OptimizerOptions, read_options
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.state import init_state
from rcgrpo_jax.weights.lora import holds_lora, lora_file, save_lora


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
    lora, optimizer = read_options(LoRAConfig, saved["lora"]), read_options(OptimizerOptions, saved["optimizer"])
    params = open_model(model or saved["model"]["path"]).param_shapes
    keep_old = "policy" in saved and POLICIES[saved["policy"]].keeps_old
    wanted = jax.eval_shape(lambda: init_state(lora, optimizer, saved["seed"], params, keep_old))
    state = checkpointer.restore(wanted, step)
    try:
        return save_lora(Path(out), state.averaged, lora, params, form, dtype)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        raise UserError(f"--out: {out} cannot be written ({error}).", "Choose a folder you can write to.") from None
