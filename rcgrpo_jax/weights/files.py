"""Reading safetensors: one file or a sharded set with its index. Nothing else is read; pickles can run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rcgrpo_jax.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


class TensorFiles:
    """The tensors of one network on disk: names, shapes and dtypes at once, data only when asked for.

    Args:
        path: A `.safetensors` file, or a folder with one such file or a sharded set and its index.

    Raises:
        UserError: For a missing, truncated or foreign file, or a pickle.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._handles: dict[Path, object] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in self._find():
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                view = handle.get_slice(key)
                self._file_of[key] = file
                self.shapes[key] = tuple(view.get_shape())
                self.dtypes[key] = view.get_dtype()

    def _find(self) -> list[Path]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise self._refusal([self.path])
            return [self.path]
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such file or folder.", "Check the path of the model.")
        indices = sorted(self.path.glob("*.safetensors.index.json"))
        files = sorted(self.path.glob("*.safetensors"))
        if len(indices) == 1:
            return self._from_index(indices[0])
        if len(files) == 1 and not indices:
            return files
        if not files and not indices:
            raise self._refusal(sorted(f for f in self.path.iterdir() if f.suffix in PICKLES))
        raise UserError(
            f"{self.path}: {len(files)} safetensors files and {len(indices)} *.safetensors.index.json; one file, or "
            "one index of all its shards, was wanted.",
            "Keep one variant of the weights, with its index if it is sharded.",
        )

    def _from_index(self, index: Path) -> list[Path]:
        try:
            names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index with a weight_map.", "Download the index file again.") from None
        missing = sorted(name for name in names if not (self.path / name).is_file())
        if missing:
            raise UserError(
                f"{index.name} names {len(names)} files; missing in {self.path}: {', '.join(missing)}.",
                "Download the missing files.",
            )
        return [self.path / name for name in sorted(names)]

    def _refusal(self, found: list[Path]) -> UserError:
        if found and found[0].suffix in PICKLES:
            return UserError(
                f"{found[0]}: a pickle checkpoint; loading one can run any code it holds; only safetensors are read",
                "Use the release's .safetensors files, or convert it with safetensors' own tools where you trust it.",
            )
        return UserError(f"{self.path}: no .safetensors file found.", "Give a diffusers folder or a .safetensors file.")

    def _open(self, file: Path):
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="np")
            except (SafetensorError, OSError) as error:
                raise _damage(file, error) from None
        return self._handles[file]

    def read(self, key: str) -> np.ndarray:
        """The tensor `key`, in the file's dtype."""
        return self._open(self._file_of[key]).get_tensor(key)

    def sha256(self) -> str:
        """A hash of the files' bytes."""
        digest = hashlib.sha256()
        for file in sorted(self._handles):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def _damage(file: Path, error: Exception) -> UserError:
    """What is wrong with a file that safetensors refuses; each tensor that ends beyond the file is named.

    The format: 8 bytes with the header's length, little-endian; the header, JSON, with each tensor's first and last
    byte as `data_offsets`; the data.
    """
    again = "Download the file again."
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            if start > min(size, MAX_HEADER):
                raise ValueError
            header = json.loads(stream.read(start - 8))
        ends = {key: start + entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"}
        cut = [f"  truncated   {key}: ends at byte {end}" for key, end in ends.items() if end > size]
    except OSError:
        return UserError(f"{file}: cannot be read ({error}).", "Check the file and its permissions.")
    except (ValueError, LookupError, TypeError, AttributeError):
        return UserError(f"{file}: the header of this safetensors file is damaged ({error}).", again)
    if cut:
        return UserError("\n".join([f"{file}: cut short at byte {size}; {len(cut)} tensors:", *cut]), again)
    return UserError(f"{file}: not a valid safetensors file ({error}).", again)


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    ignored: frozenset[str] = frozenset(),
) -> list[str]:
    """One line for every missing, unexpected, mis-shaped or mis-typed tensor; empty if the file fits exactly."""
    problems = [f"missing     {key}, shape {list(shape)}" for key, shape in expected.items() if key not in shapes]
    for key, shape in shapes.items():
        if key in ignored:
            continue
        if key not in expected:
            problems.append(f"unexpected  {key}, shape {list(shape)}")
        elif shape != expected[key]:
            problems.append(f"mis-shaped  {key}: found {list(shape)}, wanted {list(expected[key])}")
        elif dtypes[key] not in FLOATS:
            problems.append(f"mis-typed   {key}: found {dtypes[key]}, wanted one of {', '.join(FLOATS)}")
    return problems
