"""`rcgrpo data scenes --out DIR`: synthetic editing tasks as a folder that trains and evaluates."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import path_flag
from rcgrpo_jax.data.example import Source
from rcgrpo_jax.data.scenes.source import KINDS, MIN_SIZE, SPLITS, Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.progress import Progress

ABOUT = """Writes synthetic editing tasks as a folder of PNG files and a metadata.jsonl, which data.path takes.

Add, Remove and Replace on pictures of shapes, with exact masks, captions and rendered targets."""
NAME = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5,}}-({'|'.join(KINDS)})\.png")  # of a picture of a scene
LEAST_BYTES = 1000  # of a task in a folder: three PNG files and a line


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory to write; scenes that it holds are replaced", values)
    flags.DEFINE_enum("split", "train", SPLITS, "heldout and photo show combinations unseen in the others", values)
    flags.DEFINE_list("kinds", [*KINDS], "kinds of the tasks, in turn; one named twice comes twice as often", values)
    flags.DEFINE_integer("count", 300, "tasks", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("size", 128, "side, pixels", lower_bound=MIN_SIZE, flag_values=values)
    flags.DEFINE_integer("seed", 0, "another seed gives other tasks", lower_bound=0, flag_values=values)
    flags.DEFINE_float("flaws", 0.0, "share of targets that show an edit gone wrong", 0, 1, flag_values=values)


def check_room(folder: Path, count: int, size: int) -> None:
    """Refuses tasks that neither this machine's memory, one at a time, nor the disk, all of them, can hold.

    Raises:
        UserError: With the size or the count.
    """
    # Two pictures in 8 bits, and the background, float64.
    check_memory(f"--size: {size}", size**2 * (2 * 3 + 3 * 8), "Draw smaller pictures: 128 pixels are the default.")
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if (needed := count * LEAST_BYTES) > (free := shutil.disk_usage(disk).free):
        raise UserError(
            f"--count: {count} tasks take {needed / 2**30:,.1f} GiB at least; {disk} has {free / 2**30:,.1f} GiB free.",
            "Write fewer tasks, or elsewhere.",
        )


def check_replaceable(folder: Path) -> None:
    """Refuses a folder with another data set, of whose files some would be replaced or called scenes.

    Raises:
        UserError: With the first file of it.
    """
    table = folder / "metadata.jsonl"
    found = [file for part in ("images", "masks", "targets", "instructions") for file in (folder / part).glob("*")]
    other = [file for file in found if not NAME.fullmatch(file.name)] + [*folder.glob("dataset_info.json")]
    if table.is_file():
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        named = (re.match(r'{"image": "images/([^"/]*)"', line) for line in lines if line.strip())
        other += [table] * any(not name or not NAME.fullmatch(name[1]) for name in named)
    if other:
        raise UserError(f"--out: {folder} holds another data set ({other[0]}).", "Name a folder of its own.")


def write_folder(source: Source, folder: Path, progress: Callable[[], None] = lambda: None) -> None:
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
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        for part in ("images", "masks", "targets"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for index in range(len(source)):
            example = source[index]
            pictures = {"image": example.image, "mask": np.rint(example.mask * 255).astype(np.uint8)}
            if example.target is not None:
                pictures["target"] = example.target
            line = {field: f"{field}s/{example.name}.png" for field in pictures}
            for field, pixels in pictures.items():
                Image.fromarray(pixels).save(folder / line[field])
            line |= {"instruction": example.instruction, "caption": example.caption}
            line |= {"flawed": True} if example.flawed else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            progress()
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error}).", "Choose a folder you can write to.") from error


def run(argv: list[str]) -> None:
    values, _ = parse("data scenes", ABOUT, argv, _flags, required=("out",))
    scenes = Scenes(values.split, values.count, values.size, values.seed, values.flaws, values.kinds)
    out = Path(values.out)
    leave_devices_alone()
    check_replaceable(out)
    check_room(out, values.count, values.size)
    with Progress(len(scenes), description=f"scenes {values.split}") as progress:
        write_folder(scenes, out, progress.update)
    print(f"{len(scenes)} tasks ({values.split}, {values.size} x {values.size}): {values.out}")
