"""Metrics as event files of TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.runs.writers.base import Writer


class TensorBoard(Writer):
    """Writes an event file a start; that of a resumed run purges the steps after its checkpoint from earlier ones.

    A value that is not finite leaves a gap in its curve, as the `null` of `metrics.jsonl` does.
    """

    package = "tensorboardX"

    def __init__(self, folder: Path, resume_step: int, config: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        unique = f".{time.time_ns()}"  # the file's name only counts seconds: a quick restart would overwrite it
        self._board = SummaryWriter(str(folder), purge_step=resume_step and resume_step + 1, filename_suffix=unique)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):  # tensorboardX logs a line without the name for each that is not
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._board.close()
