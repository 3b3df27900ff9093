"""A folder of examples with the masks that a method finds for them; resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json, read_object, shorten
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import open_image
from rcgrpo_jax.data.masks import edit_region
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.examples import Digest
from rcgrpo_jax.evaluation.pictures import LONGEST_NAME, picture_file
from rcgrpo_jax.masking.method import LEVELS, Finish, Method, finish_mask, flaw
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder, write_text
from rcgrpo_jax.whole import sweep, whole_file

SETTINGS, LOG, SKIPPED, TABLE, SHEET = "masks.json", "made.jsonl", "skipped.jsonl", "metadata.jsonl", "sheet.png"
PARTS = ("images", "masks", "targets")
WRITTEN = (SETTINGS, LOG, SKIPPED, TABLE, SHEET, *PARTS, LOCK)  # into the folder


class _Entry(TypedDict):
    """What is kept of an example whose mask is made."""

    __pydantic_config__ = STRICT
    name: str
    digest: str  # of what the mask was made from
    line: dict[str, Any]  # of metadata.jsonl


class Made(NamedTuple):
    """What a call has done."""

    lines: list[dict[str, Any]]  # of metadata.jsonl, in the order of the source
    skipped: list[dict[str, str]]  # name and reason, likewise
    kept: int  # lines that were there before


def make_masks(
    source: Source,
    folder: Path,
    method: Method,
    finish: Finish,
    settings: Mapping[str, Any],
    progress: Callable[[], None] = lambda: None,
) -> Made:
    """Finds a mask for every example, and writes all of them as a folder that trains and evaluates.

    The folder gets `images/`, `masks/` and `targets/` (PNG, lossless), a `metadata.jsonl` that names them, and
    `skipped.jsonl`: the examples that cannot be read, have not what the method needs, or whose mask came out empty or
    full, with the reason. Both come last, so that a folder that has them is whole. A call that was stopped goes on: an
    example whose pictures and instruction are as they were when its mask was made is not made again.

    Args:
        source: The examples; masks that they have are not looked at.
        folder: Where to write; made if need be.
        method: Finds scores.
        finish: Makes masks of them.
        settings: What the masks depend on besides. The folder keeps them, and refuses masks of others.
        progress: Called after each example.

    Raises:
        UserError: The folder holds something else or masks of other settings, or cannot be written.
    """
    settings = {**settings, **method.settings, "finish": finish._asdict()}
    make_folder(folder, "--out", PARTS, (SETTINGS, LOG, SKIPPED, TABLE, SHEET, LOCK))
    with hold(folder):
        try:
            for part in (folder, *(folder / part for part in PARTS)):
                sweep(part)
            _claim(folder, settings)
            return _make_all(source, folder, method, finish, progress)
        except OSError as error:
            raise UserError(
                f"--out: {folder} cannot be written ({error}).",
                "Make room, or choose another folder; the same command goes on.",
            ) from error


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Says in a folder how its masks are made, or refuses one of other contents or other masks."""
    file = folder / SETTINGS
    if not file.exists():
        if other := sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, *PARTS)):
            raise UserError(
                f"--out: {folder} holds {other[0]} and no {SETTINGS}; a new folder was wanted, or one of such masks.",
                "Name a folder of its own.",
            )
        write_text(file, json.dumps(settings, indent=2) + "\n")
    there, now = read_object(file, "Use another folder."), json.loads(json.dumps(settings))
    if differing := [
        f"{name}: there {shorten(there.get(name), 40)}, now {shorten(now.get(name), 40)}"
        for name in {**there, **now}
        if there.get(name) != now.get(name)
    ]:
        raise UserError(
            f"--out: {folder} has masks that were made otherwise: {'; '.join(differing)}.",
            "Use another folder, or put the values back.",
        )


def _make_all(source: Source, folder: Path, method: Method, finish: Finish, progress: Callable[[], None]) -> Made:
    (folder / TABLE).unlink(missing_ok=True)
    for part in PARTS:
        (folder / part).mkdir(exist_ok=True)
    before = _read_log(folder / LOG)
    lines, skipped, kept = [], [], 0
    names: set[str] = set()
    with (folder / LOG).open("a", encoding="utf-8", newline="\n") as log:
        for index in range(len(source)):
            name = f"example {index}"
            try:
                example = source[index]
                name = example.name
                _take(picture_file(folder, name).name, names)
                digest = Digest()
                digest.add(example)
                entry = before.get(name)
                if entry and entry["digest"] == str(digest) and _is_whole(folder, entry["line"]):
                    kept += 1
                else:
                    entry = {"name": name, "digest": str(digest), "line": _make(example, folder, method, finish)}
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                lines.append(entry["line"])
            except UserError as error:
                skipped.append({"name": name, "reason": error.problem})
            progress()
    write_text(folder / SKIPPED, _as_lines(skipped))
    write_text(folder / TABLE, _as_lines(lines))
    return Made(lines, skipped, kept)


def _make(example: EditExample, folder: Path, method: Method, finish: Finish) -> dict[str, Any]:
    """Finds and writes one mask, its pictures beside it; the example's line of metadata.jsonl.

    Raises:
        UserError: The method cannot, or what it found is no region that a run would read.
    """
    mask = finish_mask(method.scores(example), finish)
    if problem := flaw(mask):
        raise UserError(f"{example.name}: {problem}.", "Look at the example, or lower or raise the threshold.")
    grey = Image.fromarray(np.rint(mask * LEVELS).astype(np.uint8))
    edit_region(grey, example.name, "white", "")  # as whoever reads it will
    pictures = {"image": Image.fromarray(example.image), "mask": grey}
    if example.target is not None:
        pictures["target"] = Image.fromarray(example.target)
    file = picture_file(Path(), example.name).name
    line: dict[str, Any] = {field: f"{field}s/{file}" for field in pictures}
    for field, picture in pictures.items():
        with whole_file(folder / line[field]) as partial:
            picture.save(partial, "PNG")
    line |= {"instruction": example.instruction, "caption": example.caption}
    line |= {"flawed": True} if example.flawed else {}
    return line | ({"task": example.task} if example.task else {})


def _take(file: str, files: set[str]) -> None:
    """Puts the name of an example's pictures among those that are taken; a UserError if it is there, or is none."""
    if len(os.fsencode(file)) > LONGEST_NAME:
        raise UserError(f"{file[:40]}...: no file can have a name that long.", "Give its image a shorter name.")
    if file in files:
        raise UserError(f"{file}: another example has this name.", "Rename one of them.")
    files.add(file)


def _is_whole(folder: Path, line: Mapping[str, Any]) -> bool:
    """Whether a line names its pictures, and all of them can be read."""
    try:
        for field in ("image", "mask", *({"target"} & line.keys())):
            open_image(folder / str(line.get(field)))
    except UserError:
        return False
    return True


def _read_log(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> what was made of it; what a kill tore off at the end is cut off."""
    if not file.exists():
        return {}
    whole = file.read_bytes().rpartition(b"\n")[0]
    os.truncate(file, len(whole) + 1 if whole else 0)
    entries = {}
    for number, text in enumerate(filter(None, whole.split(b"\n")), start=1):
        where, remedy = f"{file}, line {number}", "Remove that line: its mask is made again."
        try:
            entry = conform(parse_json(text), _Entry, where, remedy)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}).", remedy) from None
        entries[entry["name"]] = entry
    return entries


def _as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
