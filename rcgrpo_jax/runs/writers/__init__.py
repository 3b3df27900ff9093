"""Where metrics can go beside `metrics.jsonl`: a writer is a file here, and a line in `WRITERS`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from rcgrpo_jax.errors import UserError, nearest
from rcgrpo_jax.runs.writers.base import Writer
from rcgrpo_jax.runs.writers.tensorboard import TensorBoard
from rcgrpo_jax.runs.writers.wandb import WandB

__all__ = ["WRITERS", "Writer", "check_installed", "writer_names", "writer_problems"]

WRITERS: dict[str, type[Writer]] = {  # a name of `train.writers`, and of the writer's folder in that of the run
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def writer_names(text: str) -> list[str]:
    """The names in a value of `train.writers`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def writer_problems(text: str) -> list[str]:
    """What is wrong with a value of `train.writers`, a line each."""
    names, problems = writer_names(text), []
    for name in dict.fromkeys(names):
        if name not in WRITERS:
            near = nearest(name, WRITERS)
            wanted = f"did you mean {near}?" if near else f"names of {', '.join(WRITERS)} were wanted"
            problems.append(f"train.writers: {name!r} found; {wanted}")
        elif names.count(name) > 1:
            problems.append(f"train.writers: {name!r} found {names.count(name)} times; once was wanted")
    return problems


def check_installed(names: Iterable[str]) -> None:
    """Imports the packages that writers need.

    Raises:
        UserError: One is not installed.
    """
    for name in names:
        package = WRITERS[name].package
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"train.writers: {name} needs the package {package}, which cannot be imported.",
                f"pip install {package}, or leave {name} out of train.writers.",
            ) from None
