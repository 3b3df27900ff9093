"""Any source of examples as a dataset that TensorFlow Datasets finds by its name, written without TensorFlow."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rcgrpo_jax.data.example import Source, check_example
from rcgrpo_jax.data.records import SPLIT, VERSION, RecordSet, encode_pictures
from rcgrpo_jax.errors import UsageError, UserError


def write_tfds(source: Source, name: str, data_dir: str | Path, *, split: str = SPLIT) -> Path:
    """Writes examples as a TFDS dataset of one split, in order, which TFDS and `TfdsSource` find by its name.

    Images and targets are kept exactly, as PNG; masks are rounded to 8 bits, white where the edit belongs. The dataset
    appears whole or not at all.

    Args:
        source: The examples, at least one.
        name: What TFDS will call the dataset: lower-case letters, digits and underscores.
        data_dir: Where TFDS keeps its datasets; created if missing.
        split: The name of the split.

    Returns:
        The folder of the version, `DATA_DIR/NAME/1.0.0`.

    Raises:
        UserError: An example is unusable, or the dataset exists or cannot be written.
        UsageError: TFDS does not take the name of the dataset or split.
    """
    for field, value in (("name", name), ("split", split)):
        if not re.fullmatch("[a-z][a-z0-9_]*", value) or value == "all":
            raise UsageError(
                f"{field}: {value!r} found; lower-case letters, digits and underscores were wanted.",
                f"Choose another {field}, such as 'edits' or 'train'.",
            )
    folder = Path(data_dir) / name / VERSION
    if folder.exists():
        raise UserError(f"{folder}: the dataset exists; a new one was wanted.", "Choose another name, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=folder.parent) as parent:
            partial = Path(parent) / VERSION
            partial.mkdir()
            _write(source, RecordSet(partial, name, "Images to edit, where (white in the mask), and how.", split))
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}).", "Free disk space, or write elsewhere.") from None
    return folder


def _write(source: Source, records: RecordSet) -> None:
    lengths, total, shard = [], 0, None
    for index in range(len(source)):
        example = check_example(source[index])
        shard = shard or records.open_shard(len(lengths))
        shard.add(records.serialize(example, encode_pictures(example)))
        if shard.is_full or index == len(source) - 1:
            shard.close()
            lengths, total, shard = [*lengths, shard.count], total + shard.count_bytes, None
    records.write_info(lengths, total)
