"""What is known of a published data set: enough to read it as its authors give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.tables import Table

ALL = ""  # the task that stands for all rows, in `Published.splits`


@dataclass(frozen=True)
class Published:
    """A data set that others have published."""

    name: str  # on the command line, and what TFDS calls it
    hub: str  # its id on the Hugging Face hub
    licence: str
    form: RowForm
    splits: Mapping[str, Mapping[str, int]]  # split -> task -> published rows; the first split is the default
    tasks: tuple[str, ...] = ()  # that its rows name; empty: it names none
    open_other: Callable[[Path], Table | None] = lambda path: None  # reads another layout than the hub's Parquet files
    containers: tuple[str, ...] = ("parquet",)  # of its rows where no other layout is found; the first that is there
    layout: str = "the Parquet files of the hub"  # in words, for messages
