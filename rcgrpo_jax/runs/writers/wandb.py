"""Metrics as a run of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.runs.writers.base import Writer

RUN_ID = "run_id"  # file in the writer's folder
PROJECT = "rcgrpo"  # unless WANDB_PROJECT names another


class WandB(Writer):
    """Writes to one W&B run, which a resumed run goes on with: its id is kept in the writer's folder.

    W&B takes no step back. Steps that it has from before a kill are left as they are: the resumed run repeats them
    bit for bit. A run that starts over, without a checkpoint, gets a new W&B run.

    W&B's own environment variables count: WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE and others.

    Raises:
        UserError: The W&B run cannot be opened.
    """

    package = "wandb"

    def __init__(self, folder: Path, resume_step: int, config: Mapping[str, Any]):
        import wandb

        file = folder / RUN_ID
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = file.read_text(encoding="utf-8").strip() if resume_step and file.exists() else None
            self._run = wandb.init(
                dir=str(folder.parent),  # W&B appends wandb/ to it, which is `folder`
                id=known,
                resume="allow" if known else None,
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", str(folder.parent)),
                config=dict(config),
            )
            file.write_text(self._run.id, encoding="utf-8")
        except Exception as error:  # of the account, the network or the disk, by what failed
            raise UserError(
                f"train.writers: wandb: the run cannot be opened ({reason(error)}).",
                "Call `wandb login`, or set WANDB_MODE=offline, or leave wandb out of train.writers.",
            ) from error
        self._picture, self._next = wandb.Image, self._run.step  # the first step that W&B does not have

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(metrics), step=step)

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        if step >= self._next:
            self._run.log({name: self._picture(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
