"""How far a data set has been prepared: a part is a finished shard and the rows that it is made of."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcgrpo_jax.borders import STRICT, conform, read_object
from rcgrpo_jax.data.prepare.row import NOT_CHOSEN, Prepared, Skipped
from rcgrpo_jax.data.records import RecordSet, count_records
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.whole import write_whole

FOLDER = "parts"
SETTINGS = "settings.json"
MOST_INSIDE = 0.5  # share of a target's change: a mask that covers less is suspect


@dataclass
class Part:
    """What became of consecutive rows."""

    __pydantic_config__ = STRICT

    rows: int = 0
    names: list[str] = field(default_factory=list)  # of the examples in the shard
    bytes: int = 0  # of its records
    read: dict[str, int] = field(default_factory=dict)  # task -> rows, of the tasks that were chosen
    kept: dict[str, int] = field(default_factory=dict)  # task -> examples
    targets: int = 0  # examples with a target
    captions: int = 0
    not_chosen: dict[str, int] = field(default_factory=dict)  # task -> rows
    skipped: list[tuple[str, str, str, str]] = field(default_factory=list)  # where, id, reason, detail
    compared: int = 0  # examples whose target differs from the source
    outside: int = 0  # of these, those of whose change the mask covers less than `MOST_INSIDE`

    def add(self, prepared: Prepared) -> None:
        """Counts an example."""
        example = prepared.example
        self.rows += 1
        self.names.append(example.name)
        _count(self.read, example.task)
        _count(self.kept, example.task)
        self.targets += example.has_target
        self.captions += example.has_caption
        if prepared.inside is not None:
            self.compared += 1
            self.outside += prepared.inside < MOST_INSIDE

    def leave_out(self, skipped: Skipped) -> None:
        """Counts a row that is no example."""
        self.rows += 1
        if skipped.reason == NOT_CHOSEN:
            _count(self.not_chosen, skipped.task)
        else:
            _count(self.read, skipped.task)
            self.skipped.append((skipped.where, skipped.id, skipped.reason, skipped.detail))


def _count(counts: dict[str, int], task: str) -> None:
    counts[task] = counts.get(task, 0) + 1


def total(parts: Iterable[Part]) -> Part:
    """The sum of parts."""
    whole = Part()
    for part in parts:
        for name in ("rows", "bytes", "targets", "captions", "compared", "outside"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        for name in ("read", "kept", "not_chosen"):
            setattr(whole, name, dict(sorted((Counter(getattr(whole, name)) + Counter(getattr(part, name))).items())))
        whole.names += part.names
        whole.skipped += part.skipped
    return whole


def write_part(folder: Path, index: int, part: Part) -> None:
    """Keeps a part whose shard, if it has one, is whole."""
    (folder / FOLDER).mkdir(exist_ok=True)
    write_json(folder / FOLDER / f"{index:05d}.json", dataclasses.asdict(part))


def read_parts(folder: Path, records: RecordSet) -> list[Part]:
    """The parts that are finished: up to the first that is missing, or whose shard is not whole."""
    parts: list[Part] = []
    while (file := folder / FOLDER / f"{len(parts):05d}.json").is_file():
        remedy = f"Remove {folder} to begin again."
        part = conform(read_object(file, remedy), Part, str(file), remedy)
        if part.names and count_records(records.file(len(parts))) != len(part.names):
            break
        parts.append(part)
    return parts


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keeps what the data set is made from and how; refuses to go on from finished parts with something else.

    Raises:
        UserError: With the first setting that differs.
    """
    file = folder / SETTINGS
    if not (folder / FOLDER / "00000.json").is_file():
        write_json(file, settings)
        return
    remedy = f"Give the same flags and files again, or remove {folder} to begin anew."
    before = read_object(file, remedy)
    for name in dict.fromkeys([*before, *settings]):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{folder}: begun with {name} {_shown(before.get(name))}; {_shown(settings.get(name))} found now.",
                remedy,
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file that is whole or not there."""
    write_whole(file, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
