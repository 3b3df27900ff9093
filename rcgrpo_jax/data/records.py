"""Examples as records of TensorFlow Datasets: what a record holds, ArrayRecord files of them, and their description."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.errors import UserError, reason

VERSION = "1.0.0"  # of every data set that is written here
SPLIT = "train"
MOST_EXAMPLES = 256  # of one file
MOST_BYTES = 128 * 2**20  # of one file: TFDS recommends 100 to 200 MB
_OPTIONS = "group_size:1"  # as TFDS writes: each record can be read alone


def encode_png(pixels: np.ndarray) -> bytes:
    """A picture, uint8 `[H, W, 3]` or `[H, W]`, as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_pictures(example: EditExample) -> dict[str, bytes]:
    """The pictures of an example as PNG: `image`, `mask` rounded to 8 bits and, where there is one, `target`."""
    pixels = {"image": example.image, "mask": np.rint(example.mask * 255).astype(np.uint8), "target": example.target}
    return {field: encode_png(picture) for field, picture in pixels.items() if picture is not None}


class RecordSet:
    """The ArrayRecord files of one split in a folder, and the files by which TFDS knows them.

    A record has the features `name`, `id` (of the data set it comes from), `image`, `mask` (white where the edit
    belongs), `instruction`, `caption` and `task` (empty: none), `has_target`, `target` (a black pixel where there is
    none: TFDS knows no picture that is absent) and `flawed`. Equal examples make equal bytes.

    Args:
        folder: Which; it exists.
        name: What TFDS calls the data set.
        description: Of the data set, for its readers.
        split: The name of the split.
    """

    def __init__(self, folder: Path, name: str, description: str, split: str = SPLIT):
        # Imported here, before any thread decodes: its lazy imports replace `__import__` in every thread meanwhile.
        import tensorflow_datasets as tfds

        self._folder, self._name, self._split = folder, name, split
        text = tfds.features.Text
        picture = {"shape": (None, None, 3), "encoding_format": "png"}
        features = {
            "name": text(),
            "id": text(doc="In the data set that the example comes from."),
            "image": tfds.features.Image(**picture),
            "mask": tfds.features.Image(**picture | {"shape": (None, None, 1)}),
            "instruction": text(),
            "caption": text(doc="Of the edited image; empty where there is none."),
            "task": text(doc="The kind of edit; empty where it is not known."),
            "has_target": tfds.features.Scalar(np.bool_, doc="Whether there is a target; it is one pixel if not."),
            "target": tfds.features.Image(**picture),
            "flawed": tfds.features.Scalar(np.bool_, doc="Whether the target is wrong on purpose."),
        }
        identity = tfds.core.DatasetIdentity(name, tfds.core.Version(VERSION), str(folder), module_name=__name__)
        self._info = tfds.core.DatasetInfo(
            builder=identity,
            description=description,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )
        self._info.set_file_format("array_record")
        self._serializer = tfds.core.ExampleSerializer(self._info.features.get_serialized_info())

    def load(self) -> None:
        """Imports TFDS now. While it is imported, the imports of all other threads fail, such as Pillow's own."""
        _ = self._serializer

    def serialize(self, example: EditExample, pictures: Mapping[str, bytes], identifier: str = "") -> bytes:
        """A record of the data set.

        Args:
            example: Checked.
            pictures: The content of PNG or JPEG files of `image`, `mask` and, where there is one, `target`.
            identifier: The example's id in the data set that it comes from.
        """
        row: dict[str, Any] = {
            "name": example.name,
            "id": identifier,
            "image": pictures["image"],
            "mask": pictures["mask"],
            "instruction": example.instruction,
            "caption": example.caption or "",
            "task": example.task,
            "has_target": example.has_target,
            "target": pictures["target"] if example.has_target else encode_png(np.zeros((1, 1, 3), np.uint8)),
            "flawed": example.flawed,
        }
        proto = self._serializer.get_tf_example(self._info.features.encode_example(row))
        return proto.SerializeToString(deterministic=True)  # else its fields come in an order of the process's own

    def file(self, index: int) -> Path:
        """The path of a shard."""
        return self._folder / f"{self._name}-{self._split}.array_record-{index:05d}"

    def open_shard(self, index: int) -> ShardWriter:
        """A shard to be written; what there is of it is replaced."""
        return ShardWriter(self.file(index))

    def write_info(self, lengths: Sequence[int], count_bytes: int) -> None:
        """Writes `dataset_info.json` and `features.json`, by which TFDS finds the shards.

        Args:
            lengths: Records of each shard, in order.
            count_bytes: Of all records.
        """
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            dataset_name=self._name,
            data_dir=self._folder,
            split=self._split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        )
        split = tfds.core.SplitInfo(
            name=self._split, shard_lengths=list(lengths), num_bytes=count_bytes, filename_template=template
        )
        self._info.set_splits(tfds.core.SplitDict([split]))
        self._info.write_to_directory(self._folder)


class ShardWriter:
    """One ArrayRecord file, which appears under its name when it is whole."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._partial = path, path.with_name(f"incomplete.{path.name}")
        self.count = self.count_bytes = 0
        self._writer = self._call(ArrayRecordWriter, str(self._partial), _OPTIONS)

    def add(self, record: bytes) -> None:
        self._call(self._writer.write, record)
        self.count += 1
        self.count_bytes += len(record)

    @property
    def is_full(self) -> bool:
        return self.count >= MOST_EXAMPLES or self.count_bytes >= MOST_BYTES

    def close(self) -> None:
        """Ends the file and gives it its name."""
        self._call(self._writer.close)
        self._call(os.replace, self._partial, self._path)

    def _call(self, function, *arguments):
        try:
            return function(*arguments)
        except (OSError, RuntimeError, ValueError) as error:  # the writer has no type of its own for a full disk
            raise UserError(
                f"{self._path}: cannot be written ({reason(error)}).",
                "Free disk space, or write elsewhere.",
            ) from None


def count_records(path: Path) -> int | None:
    """How many records an ArrayRecord file holds; None if it is not there or not whole."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        return None
    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (OSError, RuntimeError, ValueError):
        return None
