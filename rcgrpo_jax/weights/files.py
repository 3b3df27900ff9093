"""Reading safetensors: one file or a sharded set with its index. Nothing else is read; pickles can run code."""

from __future__ import annotations

import hashlib
import math
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from rcgrpo_jax.borders import conform, parse_json, read_object
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.filetypes import LFS_POINTER, LFS_REMEDY, describe

SUFFIXES = (".safetensors", ".sft")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PLAIN = tuple(  # names that diffusers and transformers give weights without a variant
    f"{stem}.safetensors{end}" for stem in ("diffusion_pytorch_model", "model") for end in (".index.json", "")
)
FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
FLOATS = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), **FLOAT8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
AGAIN = "Download the file again."
UNQUANTIZED = (
    "Get the same model in bfloat16 or float8, as flux1-kontext-dev.safetensors or a diffusers folder; `--quantization "
    "int8` or `nf4` saves memory when it is used."
)


class TensorFiles:
    """The tensors of one network on disk: names, shapes and dtypes at once, data only when asked for.

    Of a folder with several variants of the weights (`*.fp16.safetensors`), the one without a variant's name is read,
    as diffusers does; a variant that is alone is read too.

    Args:
        path: A `.safetensors` file, or a folder with one such file or a sharded set and its index.

    Raises:
        UserError: For a missing, truncated or foreign file, or a pickle.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._handles: dict[Path, object] = {}
        self._headers: dict[Path, tuple[int, dict]] = {}
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
            if self.path.suffix not in SUFFIXES:
                raise _foreign(self.path)
            return [self.path]
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such file or folder.", "Check the path of the model.")
        found = _variants(self.path)
        if not found:
            raise self._nothing()
        chosen = found if len(found) == 1 else [file for file in found if file.name in PLAIN]
        if not chosen:
            raise UserError(
                f"{self.path}: holds {', '.join(file.name for file in found)}; one file, or one index of all its "
                f"shards, was wanted, or else one called {PLAIN[1]}.",
                "Keep the one to read in this folder, with its shards if it is an index, and move the others away.",
            )
        return self._from_index(chosen[0]) if chosen[0].suffix == ".json" else chosen[:1]

    def _from_index(self, index: Path) -> list[Path]:
        weight_map = read_object(index, AGAIN).get("weight_map")
        names = sorted(set(conform(weight_map, dict[str, str], f"{index}: weight_map", AGAIN).values()))
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names {elsewhere[0]!r}, which is not in its folder.", AGAIN)
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise UserError(
                f"{index.name} names {len(names)} files; missing in {self.path}: {', '.join(missing)}.",
                "Download the missing files.",
            )
        return [self.path / name for name in names]

    def _nothing(self) -> UserError:
        if shards := sorted(self.path.glob("*.safetensors")):
            return UserError(
                f"{self.path}: {shards[0].name} is one of several parts, and their *.safetensors.index.json is not "
                "there.",
                "Download the index too.",
            )
        foreign = sorted(file for file in self.path.iterdir() if file.suffix in (*PICKLES, ".gguf"))
        return _foreign(foreign[0] if foreign else self.path)

    def _open(self, file: Path):
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="np")
            except (SafetensorError, OSError) as error:
                raise _damage(file, error) from None
        return self._handles[file]

    def read(self, key: str) -> np.ndarray:
        """The tensor `key`, in the file's dtype; float8 as `ml_dtypes` has it."""
        file = self._file_of[key]
        if self.dtypes[key] not in FLOAT8:
            return self._open(file).get_tensor(key)
        if file not in self._headers:  # safetensors gives numpy no float8
            self._headers[file] = _header(file)
        start, header = self._headers[file]
        shape, first = self.shapes[key], header[key]["data_offsets"][0]
        content = np.fromfile(file, np.uint8, math.prod(shape), offset=start + first)
        return content.view(FLOAT8[self.dtypes[key]]).reshape(shape)

    def metadata(self) -> dict[str, str]:
        """The texts of the files' headers, by name; of one name in several files, the first."""
        return dict(ChainMap(*(handle.metadata() or {} for handle in self._handles.values())))

    def sha256(self) -> str:
        """A hash of the files' bytes."""
        digest = hashlib.sha256()
        for file in sorted(self._handles):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def _variants(folder: Path) -> list[Path]:
    """The files of a folder that stand for all weights each: indices of shards first, then files that are no shards."""
    whole = (file for file in folder.glob("*.safetensors") if not re.search(r"-\d{5}-of-\d{5}", file.name))
    return [*sorted(folder.glob("*.safetensors.index*.json")), *sorted(whole)]


def _foreign(path: Path) -> UserError:
    """Why a file or folder that holds no safetensors is not read."""
    kind = describe(path)
    if kind == LFS_POINTER:
        return UserError(f"{path}: {kind}, not the file itself.", LFS_REMEDY)
    if path.suffix == ".gguf" or kind == "a GGUF file":
        return UserError(
            f"{path}: a GGUF file, whose blocks of few bits are not read; only safetensors are.", UNQUANTIZED
        )
    if path.suffix in PICKLES or (kind and "pickle" in kind):
        return UserError(
            f"{path}: a pickle checkpoint; loading one can run any code it holds; only safetensors are read",
            "Use the release's .safetensors files, or convert it with safetensors' own tools where you trust it.",
        )
    named = f" It is {kind}." if kind else ""
    return UserError(f"{path}: no .safetensors file found.{named}", "Give a diffusers folder or a .safetensors file.")


def _header(file: Path) -> tuple[int, dict]:
    """Where the data of a safetensors file begins, and its header.

    The format: 8 bytes with the header's length, little-endian; the header, JSON, with each tensor's first and last
    byte as `data_offsets`; the data.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > min(size, MAX_HEADER):
            raise ValueError
        return start, parse_json(stream.read(start - 8))


def _damage(file: Path, error: Exception) -> UserError:
    """What is wrong with a file that safetensors refuses; each tensor that ends beyond the file is named."""
    kind = describe(file)
    if kind == LFS_POINTER:
        return UserError(f"{file}: {kind}, not the weights themselves.", LFS_REMEDY)
    if kind not in (None, "a safetensors file"):
        return UserError(f"{file}: {kind}, no safetensors.", AGAIN)
    try:
        size = file.stat().st_size
        start, header = _header(file)
        ends = {key: start + entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"}
        cut = [f"  truncated   {key}: ends at byte {end}" for key, end in ends.items() if end > size]
    except OSError:
        return UserError(f"{file}: cannot be read ({error}).", "Check the file and its permissions.")
    except (ValueError, LookupError, TypeError, AttributeError):
        return UserError(f"{file}: the header of this safetensors file is damaged ({error}).", AGAIN)
    if cut:
        return UserError("\n".join([f"{file}: cut short at byte {size}; {len(cut)} tensors:", *cut]), AGAIN)
    return UserError(f"{file}: not a valid safetensors file ({error}).", AGAIN)


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
