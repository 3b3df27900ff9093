"""Examples in the format of TensorFlow Datasets: ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rcgrpo_jax import filetypes
from rcgrpo_jax.data.example import REGION, EditExample, Needs, Source, check_example
from rcgrpo_jax.data.images import as_rgb, open_image
from rcgrpo_jax.data.jsonl import likely
from rcgrpo_jax.data.kinds import SourceKind, register
from rcgrpo_jax.data.masks import Marking, Polarity, check_marking, edit_region
from rcgrpo_jax.errors import UsageError, UserError, reason

_LOOKED_AT = 16  # files of a dataset that are looked at for pointers: of Git LFS's, none or most are


class TfdsSource:
    """A random-access source of the examples of a TFDS dataset; pixels are decoded when an example is asked for.

    The image is a feature of uint8 `[H, W, 3]`, the mask one of uint8 `[H, W, 1]` or `[H, W]` from 0 to 255, the
    instruction a text. Where the dataset has them, `name`, `caption` and `task` (texts), `target` (uint8 `[H, W, 3]`),
    `has_target` and `flawed` (bool) are read too. An empty caption is none, a target is none where `has_target` is
    false, and without names examples are called by their index. Encoded pictures are treated as files are
    (`images.read_image`, `masks.read_mask`).

    Args:
        name: A dataset that TFDS finds in the data directory (`edits`, `edits/config`, `edits:1.0.0`), or the folder of
            one version, which holds `dataset_info.json`.
        split: A split, or a slice of it such as `train[:90%]`.
        data_dir: Where TFDS keeps its datasets; by default TFDS_DATA_DIR, or else `~/tensorflow_datasets`.
        polarity: The value of the edit region in the masks, `"white"` (255) or `"black"` (0).
        mask_value: What masks hold where the edit belongs, as for `masks.parse_mask_value`; empty: by `polarity`.
        image_field: The feature with the image.
        mask_field: The feature with the mask.
        instruction_field: The feature with the instruction.
        needs: Whether a dataset without masks is refused; else its masks are the whole pictures.

    Raises:
        UserError: There is no such dataset or split, it is empty or not in ArrayRecord, or a feature is missing or of
            another type.
        UsageError: The polarity is neither of the two, or the mask value is malformed.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        data_dir: str | Path | None = None,
        polarity: Polarity = "white",
        mask_value: str = "",
        image_field: str = "image",
        mask_field: str = "mask",
        instruction_field: str = "instruction",
        needs: Needs = REGION,
    ):
        import tensorflow_datasets as tfds  # imported here: two seconds that a folder of images need not wait

        check_marking(polarity, mask_value)
        self._where, self._marking = f"tfds:{name}@{split}", (polarity, mask_value)
        self._fields = image_field, mask_field, instruction_field
        builder = _open(name, data_dir)
        self._folder, features = Path(builder.data_dir), builder.info.features
        required = list(zip(self._fields, ("RGB", "L", "text"), strict=True))
        if needs.each_alone or (not needs.mask and mask_field not in features):
            del required[1]
        for field, kind in required:
            _check_feature(f"tfds:{name}", features, field, kind, needs.mask if field == mask_field else "")
        optional = {
            "name": "text", "id": "text", "caption": "text", "task": "text", "has_target": "bool", "target": "RGB",
            "flawed": "bool",
        }  # fmt: skip
        known = [
            (field, kind) for field, kind in optional.items() if field in features and _kind(features[field]) == kind
        ]
        self._kinds = dict(required + known)

        # Pictures come encoded and are decoded here: TFDS takes the indices of a palette for grey values.
        pictures = [field for field in features if isinstance(features[field], tfds.features.Image)]
        decoders = {field: tfds.decode.SkipDecoding() for field in pictures}
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError:
            raise UserError(
                f"tfds:{name}: the files are in the {builder.info.file_format.value} format; array_record was wanted.",
                "Prepare it with `tfds build --file_format=array_record`, or use `tfds convert_format`.",
            ) from None
        except ValueError as error:
            raise UserError(
                f"{self._where}: the split cannot be read ({reason(error)}).",
                f"Choose one of {', '.join(builder.info.splits)}, or a slice of one such as train[:90%].",
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def stamp(self, index: int) -> str:
        """Changes with the path, size or time of any of the dataset's files, and with the split; see `Source`."""
        return f"{self._files_stamp}-{index}"

    @cached_property
    def _files_stamp(self) -> str:
        found = [(str(file.absolute()), file.stat()) for file in sorted(self._folder.iterdir())]
        files = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
        return hashlib.sha256(json.dumps([self._where, self._marking, self._fields, files]).encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> EditExample:
        """Reads and checks one example; see `check_example` for what is refused."""
        index = range(len(self))[index]  # as a sequence: negative ones count from the end, others raise IndexError
        try:
            record = self._records[index]
            if missing := [field for field in self._fields if field in self._kinds and record[field] is None]:
                raise ValueError(f"{missing[0]} is missing")  # of a file that was cut short
            row = {
                field: _decode(record[field], kind, f"{self._where}, example {index}, {field}")
                for field, kind in self._kinds.items()
            }
        except UserError:
            raise
        except Exception as error:  # of the record reader, zlib or Pillow: damage shows in many ways
            raise UserError(
                f"{self._where}: example {index} cannot be read ({error}).", "Copy or write the dataset again."
            ) from error
        image, mask, instruction = (row.get(field) for field in self._fields)
        if mask is None:
            region = np.ones(image.shape[:2], np.float32)
        else:
            region = edit_region(mask, f"{self._where}, example {index}, {self._fields[1]}", *self._marking)
        return check_example(
            EditExample(
                name=row.get("name") or f"{index:05d}",
                image=image,
                mask=region,
                instruction=instruction,
                caption=row.get("caption") or None,
                target=row.get("target") if row.get("has_target", True) else None,
                task=row.get("task", ""),
                flawed=row.get("flawed", False),
                id=row.get("id", ""),
            )
        )


@register("tfds")
class TfdsKind(SourceKind):
    """`DATASET` is a name in TFDS's data directory, or the folder of one version; `SPLIT` is `train` if not given:
    `tfds:edits`, `tfds:edits/config:1.0.0@train[:90%]`, `tfds:/data/edits/1.0.0@test`.
    """

    form = "tfds:DATASET[@SPLIT]"

    def open(self, path: str, marking: Marking, needs: Needs) -> Source:
        dataset, split = dataset_and_split(path)
        if not dataset or not split:
            raise UsageError(f"data.path: 'tfds:{path}' found; {self.form} was wanted.", "Write tfds:edits@train.")
        return TfdsSource(dataset, split=split, polarity=marking[0], mask_value=marking[1], needs=needs)

    def same_examples(self, path: str, other: str) -> bool:
        """Whether they are one split, of which two different slices are taken to be apart."""
        one, two = ("@".join(dataset_and_split(x)) for x in (path, other))
        whole = {x.partition("[")[0] for x in (one, two) if "[" in x}
        return one == two or not whole.isdisjoint({one, two})

    def folder(self, path: str) -> Path:
        return Path(dataset_and_split(path)[0])


def dataset_and_split(path: str) -> tuple[str, str]:
    """The two parts of `DATASET[@SPLIT]`."""
    dataset, at, split = path.rpartition("@")
    if not at or "/" in split:  # no split has a slash: the "@" is in the name of a folder
        return path, "train"
    return dataset, split


def _open(name: str, data_dir: str | Path | None):
    """Finds a dataset by its folder or its name, as a `tfds.core.DatasetBuilder` whose files exist."""
    import tensorflow_datasets as tfds

    folder, cause = tfds.core.Path(name).expanduser(), None
    if (folder / "dataset_info.json").exists():
        return _open_folder(folder)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if builder.is_prepared():
            return builder
    except (ValueError, OSError) as error:  # TFDS raises ValueError for names that it does not know or cannot parse
        cause = error
    raise UserError(
        f"tfds:{name}: no such dataset in {data_dir or 'the default data directory'}, nor a folder with "
        "dataset_info.json.",
        "Name a prepared dataset, set TFDS_DATA_DIR, or give the folder of a version, such as edits/1.0.0.",
    ) from cause


def _open_folder(folder: Path):
    """The `tfds.core.DatasetBuilder` of the folder of a version."""
    import tensorflow_datasets as tfds

    for file in sorted(folder.iterdir())[:_LOOKED_AT]:
        if filetypes.describe(file) == filetypes.LFS_POINTER:
            raise UserError(
                f"tfds:{folder}: {file.name} is {filetypes.LFS_POINTER}; the file itself was wanted.",
                filetypes.LFS_REMEDY,
            )
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf's own and others, by what is damaged
        raise UserError(
            f"tfds:{folder}: the description of the dataset cannot be read ({reason(error)}).",
            "Copy or write the dataset again.",
        ) from error


def _kind(feature) -> str | None:
    """Names what a feature holds: "RGB" or "L" (Pillow's modes of colour and grey), "text", "bool", or None."""
    shape, dtype = feature.shape, feature.np_dtype
    if dtype == np.bool_ and shape == ():
        return "bool"
    if dtype == np.object_ and shape == ():
        return "text"
    if dtype == np.uint8 and len(shape) == 3 and shape[2] == 3:
        return "RGB"
    if dtype == np.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)):
        return "L"
    return None


def _check_feature(where: str, features: Mapping, field: str, kind: str, who: str) -> None:
    """Raises a UserError, with who needs it, unless the dataset has the feature and it holds what it should."""
    if field not in features:
        near = likely(field, features)
        raise UserError(
            f"{where}: the feature {field!r} is missing; found {', '.join(map(repr, sorted(features)))}"
            f"{f'; {who} needs it' if who else ''}.",
            f"Did you mean {near!r}? Rename it." if near else f"Write the dataset with {field!r}.",
        )
    if _kind(features[field]) != kind:
        wanted = {"RGB": "uint8 [H, W, 3]", "L": "uint8 [H, W, 1] or [H, W]", "text": "a text"}[kind]
        raise UserError(
            f"{where}: the feature {field!r} is {features[field]!r}; {wanted} was wanted.",
            "Write the dataset again with this type.",
        )


def _decode(
    value: bytes | np.ndarray | None, kind: str, where: str
) -> str | bool | UInt8[np.ndarray, "H W 3"] | Image.Image:
    """A feature as an example has it; masks ("L") as images, whose values are still to be read."""
    if kind == "bool":
        return bool(value)
    if kind == "text":
        try:
            return (value or b"").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: {error}; text in UTF-8 was wanted.", "Write the dataset again.") from None
    if isinstance(value, bytes):
        picture = open_image(io.BytesIO(value), where)
        return picture if kind == "L" else as_rgb(picture, where)
    return Image.fromarray(value.reshape(value.shape[:2])) if kind == "L" else value
