"""Synthetic tasks as files: a folder with a table that `data.path` takes, or the layout of a published benchmark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.scenes.source import KINDS, SPLITS
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.whole import write_whole

NAME = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5,}}-({'|'.join(KINDS)})\.png")  # of a picture of a scene
TABLE, TASK_TABLE = "metadata.jsonl", "metadata.json"

Progress = Callable[[], None]


def write_folder(source: Source, folder: Path, progress: Progress = lambda: None) -> None:
    """Writes examples as `images/`, `masks/` and `targets/` (PNG, lossless) and a `metadata.jsonl` that names them.

    Masks are kept to 8 bits. The `metadata.jsonl` comes last, so that a folder that has one is whole.

    Args:
        source: The examples.
        folder: Where to write; made if need be.
        progress: Called after each example.

    Raises:
        UserError: The folder cannot be written.
    """
    lines = []
    try:
        (folder / TABLE).unlink(missing_ok=True)
        for index in range(len(source)):
            example = source[index]
            pictures = _pictures(example)
            line = {field: f"{field}s/{example.name}.png" for field in pictures}
            _save({folder / line[field]: pixels for field, pixels in pictures.items()})
            line |= {"instruction": example.instruction, "caption": example.caption}
            line |= {"flawed": True} if example.flawed else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            progress()
        write_whole(folder / TABLE, "".join(lines))
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_tasks(source: Source, folder: Path, progress: Progress = lambda: None) -> None:
    """Writes examples as CompBench's downloader does: `tasks/TASK/{input_image,edited_image,mask}/`, `metadata.json`.

    Args:
        source: Examples that name their task and have targets; the layout cannot say that one is flawed.
        folder: Where to write; made if need be.
        progress: Called after each example.

    Raises:
        UserError: The folder cannot be written.
    """
    tables: dict[str, list[dict[str, str | None]]] = {}
    columns = {"image": "input_image", "target": "edited_image", "mask": "mask"}
    try:
        for file in folder.glob(f"tasks/*/{TASK_TABLE}"):
            file.unlink()
        for index in range(len(source)):
            example = source[index]
            if example.flawed:
                raise UserError(
                    f"--flaws: {example.name} is flawed, which the layout of CompBench cannot say.",
                    "Leave --flaws out.",
                )
            task, file = folder / "tasks" / example.task, f"{example.name}.png"
            _save({task / columns[field] / file: pixels for field, pixels in _pictures(example).items()})
            line = {"image_path": file, "instruction": example.instruction, "caption": example.caption}
            tables.setdefault(example.task, []).append(line)
            progress()
        for task, table in tables.items():
            text = json.dumps(table, ensure_ascii=False, indent=1) + "\n"
            write_whole(folder / "tasks" / task / TASK_TABLE, text)
    except OSError as error:
        raise _unwritable(folder, error) from error


LAYOUTS: Mapping[str, Callable[[Source, Path, Progress], None]] = {"folder": write_folder, "compbench": write_tasks}


def check_replaceable(folder: Path) -> None:
    """Refuses a folder with another data set, of whose files some would be replaced or called scenes.

    Raises:
        UserError: With the first file of it.
    """
    table = folder / TABLE
    found = [file for part in ("images", "masks", "targets", "instructions") for file in (folder / part).glob("*")]
    found += [file for file in folder.glob("tasks/*/*/*") if file.name != TASK_TABLE]
    other = [file for file in found if not NAME.fullmatch(file.name)] + [*folder.glob("dataset_info.json")]
    if table.is_file():
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        named = (re.match(r'{"image": "images/([^"/]*)"', line) for line in lines if line.strip())
        other += [table] * any(not name or not NAME.fullmatch(name[1]) for name in named)
    if other:
        raise UserError(f"--out: {folder} holds another data set ({other[0]}).", "Name a folder of its own.")


def _pictures(example: EditExample) -> dict[str, UInt8[np.ndarray, "H W *_"]]:
    pictures = {"image": example.image, "mask": np.rint(example.mask * 255).astype(np.uint8)}
    return pictures if example.target is None else pictures | {"target": example.target}


def _save(files: Mapping[Path, UInt8[np.ndarray, "H W *_"]]) -> None:
    for file, pixels in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"--out: {folder} cannot be written ({error}).", "Choose a folder you can write to.")
