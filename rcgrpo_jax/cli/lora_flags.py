"""The flags of the commands that edit with LoRAs: `--lora FILE`, as often as wanted, and their strengths."""

from __future__ import annotations

from absl import flags

from rcgrpo_jax.cli.paths import PathParser
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.weights.lora import load_loras


def define_lora(values: flags.FlagValues) -> None:
    about = "LoRA of FLUX, its file or folder, in any form of docs/files.md; given again, both apply"
    flags.DEFINE_multi(PathParser("lora"), flags.ArgumentSerializer(), "lora", None, about, values)
    strength = "strength of each --lora, in their order; 1 by default"
    flags.DEFINE_multi_float("lora_scale", None, strength, flag_values=values)


def read_strengths(values: flags.FlagValues) -> list[float]:
    """The strength of each `--lora`.

    Raises:
        UsageError: If there are not as many strengths as LoRAs.
    """
    count = len(values.lora or [])
    strengths = values.lora_scale or [1.0] * count
    if len(strengths) != count:
        raise UsageError(
            f"--lora_scale: {len(strengths)} strengths for {count} LoRAs; one for each was wanted.",
            "Give it once for each --lora, in the same order.",
        )
    return strengths


def read_lora(values: flags.FlagValues, model: Model) -> dict | None:
    """The adapter of all `--lora`, with every scale folded in; None without any.

    Raises:
        UsageError: As `read_strengths`.
        UserError: As `load_lora`.
    """
    strengths = read_strengths(values)
    if not values.lora:
        return None
    return load_loras(values.lora, strengths, model.param_shapes)
