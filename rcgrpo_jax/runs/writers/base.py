"""What a writer of metrics is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


class Writer(ABC):
    """Takes the metrics of a run, in process 0 alone.

    A run that was killed may have written steps after its last checkpoint. It takes these steps again when it resumes,
    and a curve must have one value a step all the same.

    Args:
        folder: The writer's own, in the directory of the run; it need not be there.
        resume_step: Step of the checkpoint that the run resumes from; 0 for a new run.
        config: The configuration of the run, as it is saved with it.
    """

    package: str  # what has to be installed, for a writer of `WRITERS`

    @abstractmethod
    def __init__(self, folder: Path, resume_step: int, config: Mapping[str, Any]): ...

    @abstractmethod
    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step, which need not be finite; steps come in ascending order, from 0 or 1."""

    @abstractmethod
    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Writes images of the step whose metrics were written last, uint8 `[height, width, 3]`."""

    @abstractmethod
    def close(self) -> None:
        """Returns when all is written."""
