"""What supervised training cannot do without, in bytes, counted before weights are read."""

from __future__ import annotations

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.data.buckets import make_buckets
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.runs.sizes import candidate_bytes, check_lora, check_picture
from rcgrpo_jax.sft.options import Options


def check_stage(options: Options, model: Model) -> None:
    """Refuses supervised training whose batch, pictures or parameters are larger than that.

    Raises:
        UserError: With the field that asks for it.
    """
    height, width = size = make_buckets(options.data.buckets, options.data.size).largest
    check_picture(size, model)
    check_memory(
        f"batch.size: {options.batch.size} sources and targets of {height} x {width} pixels",
        options.batch.size * 2 * 3 * height * width,
        "Lower batch.size or data.size.",
    )
    check_memory(
        f"flow.picture_steps: {options.flow.picture_steps} of {height} x {width} pixels",
        candidate_bytes(size, model, options.flow.picture_steps),
        "Lower flow.picture_steps or data.size.",
    )
    if options.stage == "lora":
        check_lora(options.lora, bool(options.optimizer.ema_decay), model)
