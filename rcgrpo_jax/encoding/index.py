"""What was found of examples when they were read: a later start that finds their files unchanged reads no pixel."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Predicate

from rcgrpo_jax.borders import conform, parse_json
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.whole import write_whole

# Raised with any change of `data.images`, `data.masks`, `data.buckets` or `data.example.check_example` that reads files
# in another way or refuses others: the index spares the reading, and would pass over it.
READING = 2
_Entry = Annotated[str, Predicate(re.compile(r"[0-9a-f]{32}").fullmatch)]
_Row = tuple[_Entry, str, str, bool, bool, bool, tuple[int, int], float, float]


class KnownExample(NamedTuple):
    """What is kept of an example that was read: enough to check it again without its pictures."""

    entry: str  # name of its file in the cache, without the suffix
    name: str
    instruction: str
    has_target: bool
    flawed: bool
    has_caption: bool
    size: tuple[int, int]  # (height, width), that of its bucket
    cut: float  # share of the picture that is outside of it
    lost: float  # share of the region


def read_index(folder: Path, settings: str) -> dict[str, KnownExample]:
    """Stamp (`data.example.Source.stamp`) -> what is known, of all processes that wrote into the folder.

    A file that is damaged counts for nothing: its examples are read again.

    Args:
        folder: The cache.
        settings: Names what entries depend on besides their examples, `READING` among it.
    """
    known: dict[str, KnownExample] = {}
    for file in sorted(folder.glob(f"index-{settings}-*.json")):
        try:
            rows = parse_json(file.read_text(encoding="utf-8"))
            rows = conform(rows, dict[str, _Row], f"{file}", "")
        except (OSError, ValueError, UserError):
            continue
        known |= {stamp: KnownExample(*row) for stamp, row in rows.items()}
    return known


def write_index(folder: Path, settings: str, process: int, known: dict[str, KnownExample]) -> None:
    """Keeps what a process found, whole or not at all; the next start is slower where it cannot be written."""
    file = folder / f"index-{settings}-{process}.json"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(known))
