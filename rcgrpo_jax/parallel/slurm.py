"""What Slurm and the environment say of the processes of a run.

It imports nothing heavy, so that the command line can ask before JAX is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def launched_processes(environ: Mapping[str, str]) -> int:
    """How many processes the launcher has started of a command."""
    return whole_number(environ.get("RCGRPO_NUM_PROCESSES")) or slurm_tasks(environ)


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """The tasks of the Slurm step that this process is in; 1 outside of one.

    `SLURM_NTASKS` is the step's too, but in an interactive step it is still the allocation's.
    """
    if "SLURM_STEP_NODELIST" not in environ:  # which `srun` alone sets
        return 1
    return whole_number(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")) or 1


def whole_number(text: str | None) -> int | None:
    """The number that a text of the digits 0 to 9 means, up to nine of them; None for anything else."""
    return int(text) if text and re.fullmatch("[0-9]{1,9}", text) else None
