"""`rcgrpo data scenes --out DIR`: synthetic editing tasks as a folder that trains and evaluates."""

from __future__ import annotations

import shutil
from pathlib import Path

from absl import flags

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import path_flag
from rcgrpo_jax.data.scenes.files import LAYOUTS, check_replaceable
from rcgrpo_jax.data.scenes.source import KINDS, MIN_SIZE, SPLITS, Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.progress import Progress

ABOUT = """Writes synthetic editing tasks as a folder of PNG files and a metadata.jsonl, which data.path takes.

Add, Remove and Replace on pictures of shapes, with exact masks, captions and rendered targets."""
LEAST_BYTES = 1000  # of a task in a folder: three PNG files and a line


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory to write; scenes that it holds are replaced", values)
    flags.DEFINE_enum("split", "train", SPLITS, "heldout and photo show combinations unseen in the others", values)
    flags.DEFINE_list("kinds", [*KINDS], "kinds of the tasks, in turn; one named twice comes twice as often", values)
    flags.DEFINE_integer("count", 300, "tasks", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("size", 128, "side, pixels", lower_bound=MIN_SIZE, flag_values=values)
    flags.DEFINE_integer("seed", 0, "another seed gives other tasks", lower_bound=0, flag_values=values)
    flags.DEFINE_float("flaws", 0.0, "share of targets that show an edit gone wrong", 0, 1, flag_values=values)
    about = "of the files: a folder that data.path takes, or what `rcgrpo data prepare compbench` reads"
    flags.DEFINE_enum("layout", "folder", [*LAYOUTS], about, values)


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


def run(argv: list[str]) -> None:
    values, _ = parse("data scenes", ABOUT, argv, _flags, required=("out",))
    scenes = Scenes(values.split, values.count, values.size, values.seed, values.flaws, values.kinds)
    out = Path(values.out)
    leave_devices_alone()
    check_replaceable(out)
    check_room(out, values.count, values.size)
    with Progress(len(scenes), description=f"scenes {values.split}", lines=10) as progress:
        LAYOUTS[values.layout](scenes, out, progress.update)
    print(f"{len(scenes)} tasks ({values.split}, {values.size} x {values.size}): {values.out}")
