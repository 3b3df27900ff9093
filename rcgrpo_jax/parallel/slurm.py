"""What Slurm says of itself; imports nothing, so that the command line can ask before JAX is there."""

from __future__ import annotations

from collections.abc import Mapping


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """The tasks of the Slurm step that this process is in; 1 outside of one.

    `SLURM_NTASKS` is the step's too, but in an interactive step it is still the allocation's.
    """
    if "SLURM_STEP_NODELIST" not in environ:  # which `srun` alone sets
        return 1
    found = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "")
    return int(found) if found.isdigit() else 1
