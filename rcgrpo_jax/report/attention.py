"""Attention maps of a run's edits: those of its base beside those of its LoRA, from the noise of their evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.editors.model import EditorOptions, Model
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.report.heatmaps import attention_maps, overlay
from rcgrpo_jax.report.page import Row
from rcgrpo_jax.weights.lora import adapter_fingerprint


def trained_model(workdir: Path, config: Mapping[str, Any]) -> Model:
    """The model that a run post-trains.

    Raises:
        UserError: The run has no checkpoint of a post-training.
    """
    if not config or "stage" in config:
        raise UserError(
            f"--attention: {workdir} has no checkpoint of `rcgrpo train`; one was wanted.", "Leave --attention out."
        )
    return open_model(config["model"]["path"])


def check_evaluated(model: Model, paths: Sequence[str], adapter: dict, evaluations: Mapping[str, Evaluation]) -> None:
    """Refuses a model or LoRAs that are not those of the evaluation.

    Raises:
        UserError: Naming the flag.
    """
    for flag, path, here, measured in (
        ("workdir", model.path, model.whole_fingerprint(), {x.settings.get("model") for x in evaluations.values()}),
        ("lora", ", ".join(paths), adapter_fingerprint(adapter), {x.origin.get("lora") for x in evaluations.values()}),
    ):
        if here not in measured:
            raise UserError(
                f"--{flag}: {path} is not what --evaluation is of.", f"Name the --{flag} whose edits were evaluated."
            )


def attention_rows(
    model: Model,
    lora: dict,
    examples: Sequence[EditExample],
    settings: Mapping[str, Any],
    devices: Sequence[jax.Device] | None = None,
) -> tuple[list[Row], float]:
    """Attention maps of base and LoRA, and what their brightest colour stands for: the 99th percentile of all.

    Edits start from the noise of the evaluation.
    """
    mesh = make_mesh({"fsdp": -1}, devices)
    options = EditorOptions(
        dtype=settings["dtype"],
        max_text_tokens=settings["text_tokens"],
        quantization=settings["quantization"],
        attention="xla",  # the one that gives maps
        acd_layers=settings["acd_layers"],
    )
    editor = model.open(options, mesh)
    images, masks = (np.stack([getattr(x, field) for x in examples]) for field in ("image", "mask"))
    grid = editor.grid(*images.shape[1:3])
    shape = (grid[0] * grid[1], model.sizes.channels)
    noise = initial_noise(np.uint32(settings["seed"]), np.arange(len(examples)), shape)
    lora = jax.device_put(lora, replicated(mesh))
    instructions = [x.instruction for x in examples]
    how = (settings["steps"], settings["guidance"])
    with jax.set_mesh(mesh):
        found = {
            name: attention_maps(editor, images, instructions, masks, noise, *how, adapter, settings["solver"])
            for name, adapter in (("base", None), ("lora", lora))
        }
    top = float(np.percentile([x.relative() for x in found.values()], 99))
    rows = [
        Row(
            instruction,
            [
                (f"{name}, ACD {x.acd[i]:.2f}", overlay(x.edited[i], x.relative()[i], grid, masks[i], top))
                for name, x in found.items()
            ],
        )
        for i, instruction in enumerate(instructions)
    ]
    return rows, top
