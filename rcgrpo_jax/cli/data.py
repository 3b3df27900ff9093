"""`rcgrpo data scenes --out DIR`: synthetic editing tasks as a folder that trains and evaluates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.data.pipeline import Source
from rcgrpo_jax.data.scenes import KINDS, MIN_SIZE, SPLITS, Scenes
from rcgrpo_jax.errors import UsageError, UserError, nearest
from rcgrpo_jax.training.metrics import Progress

ABOUT = """Writes a data set as a folder of PNG files and a metadata.jsonl, which data.path of a configuration takes.

scenes: Add, Remove and Replace on pictures of shapes, with exact masks, captions and rendered targets."""
DATASETS = ("scenes",)


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "directory to write; files of the same names are replaced", values)
    flags.DEFINE_enum("split", "train", SPLITS, "heldout and photo show combinations unseen in the others", values)
    flags.DEFINE_list("kinds", [*KINDS], "kinds of the tasks, in turn; one named twice comes twice as often", values)
    flags.DEFINE_integer("count", 300, "tasks", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("size", 128, "side, pixels", lower_bound=MIN_SIZE, flag_values=values)
    flags.DEFINE_integer("seed", 0, "another seed gives other tasks", lower_bound=0, flag_values=values)
    flags.DEFINE_float("flaws", 0.0, "share of targets that show an edit gone wrong", 0, 1, flag_values=values)


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
    values, (dataset,) = parse("data", ABOUT, argv, _flags, positional=("dataset",), required=("out",))
    if dataset not in DATASETS:
        near = nearest(dataset, DATASETS)
        raise UsageError(
            f"unknown data set {dataset!r}; {', '.join(DATASETS)} was wanted."
            + (f" Did you mean {near!r}?" if near else ""),
            "`rcgrpo data --help` describes them.",
        )
    scenes = Scenes(values.split, values.count, values.size, values.seed, values.flaws, values.kinds)
    with Progress(len(scenes), description=f"scenes {values.split}") as progress:
        write_folder(scenes, Path(values.out), progress.update)
    print(f"{len(scenes)} tasks ({values.split}, {values.size} x {values.size}): {values.out}")
