"""What supervised training cannot do without, in bytes, counted before weights are read."""

from __future__ import annotations

from ml_collections import ConfigDict

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.runs.sizes import candidate_bytes, check_lora, check_picture
from rcgrpo_jax.weights.load import ModelFolder


def check_stage(config: ConfigDict, folder: ModelFolder) -> None:
    """Refuses supervised training whose batch, pictures or parameters are larger than that.

    Raises:
        UserError: With the field that asks for it.
    """
    height, width = config.data.size
    check_picture(config, folder)
    check_memory(
        f"batch.size: {config.batch.size} sources and targets of {height} x {width} pixels",
        config.batch.size * 2 * 3 * height * width,
        "Lower batch.size or data.size.",
    )
    check_memory(
        f"flow.picture_steps: {config.flow.picture_steps} of {height} x {width} pixels",
        candidate_bytes(config, folder, config.flow.picture_steps),
        "Lower flow.picture_steps or data.size.",
    )
    if config.stage == "lora":
        check_lora(config, folder)
