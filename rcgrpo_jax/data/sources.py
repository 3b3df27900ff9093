"""The examples that `data.path` of a configuration names."""

from __future__ import annotations

import re
from pathlib import Path

from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.masks import Polarity
from rcgrpo_jax.data.scenes.source import Scenes, parse_scenes
from rcgrpo_jax.data.tfds import TfdsSource
from rcgrpo_jax.errors import UsageError


def open_source(
    path: str, polarity: Polarity = "white", needs_mask: bool = True, mask_value: str = ""
) -> EditFolder | Scenes | TfdsSource:
    """Opens a folder of examples, a TFDS dataset (`tfds:DATASET[@SPLIT]`) or scenes (`scenes:` and `parse_scenes`).

    `DATASET` is a name in TFDS's data directory, or the folder of one version; `SPLIT` is `train` if not given:
    `tfds:edits`, `tfds:edits/config:1.0.0@train[:90%]`, `tfds:/data/edits/1.0.0@test`.

    Args:
        path: The value of `data.path`.
        polarity: The colour of the edit region in the masks.
        needs_mask: Whether examples without a mask are refused; else the whole picture is their region.
        mask_value: What masks hold where the edit belongs (`masks.parse_mask_value`); empty: a colour, by `polarity`.

    Raises:
        UserError: As `EditFolder` and `TfdsSource`.
        UsageError: No dataset or split is named, or polarity or mask value are malformed.
    """
    if path.startswith("scenes:"):
        return parse_scenes(path.removeprefix("scenes:"))
    if not path.startswith("tfds:"):
        return EditFolder(path, polarity=polarity, mask_value=mask_value, needs_mask=needs_mask)
    dataset, split = dataset_and_split(path)
    if not dataset or not split:
        raise UsageError(f"data.path: {path!r} found; tfds:DATASET[@SPLIT] was wanted.", "Write tfds:edits@train.")
    return TfdsSource(dataset, split=split, polarity=polarity, mask_value=mask_value, needs_mask=needs_mask)


def dataset_and_split(path: str) -> tuple[str, str]:
    """The two parts of `tfds:DATASET[@SPLIT]`."""
    dataset, at, split = path.removeprefix("tfds:").rpartition("@")
    if not at or "/" in split:  # no split has a slash: the "@" is in the name of a folder
        return path.removeprefix("tfds:"), "train"
    return dataset, split


def same_examples(path: str, other: str) -> bool:
    """Whether two values of `data.path` share examples by their names: one split of the scenes, one folder, one TFDS
    split, of which two different slices are taken to be apart.
    """
    one, two = _examples_of(path), _examples_of(other)
    whole = {x.partition("[")[0] for x in (one, two) if x.startswith("tfds:") and "[" in x}
    return one == two or not whole.isdisjoint({one, two})


def _examples_of(path: str) -> str:
    if path.startswith("scenes:"):
        return "scenes:" + re.split("[/:]", path)[1]
    if path.startswith("tfds:"):
        return "tfds:" + "@".join(dataset_and_split(path))
    folder = Path(path).resolve()
    return str(folder.parent if folder.name == "metadata.jsonl" else folder)
