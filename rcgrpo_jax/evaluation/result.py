"""An evaluation: what was measured of the edits of one model, and the file it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from annotated_types import Ge
from jaxtyping import Float, UInt8

from rcgrpo_jax.borders import STRICT, check_memory, conform, parse_json
from rcgrpo_jax.data.buckets import KINDS as BUCKETS
from rcgrpo_jax.data.buckets import NONE as ONE_SIZE
from rcgrpo_jax.data.scenes.source import KINDS
from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.flow.solvers import SOLVERS
from rcgrpo_jax.models.quantization import QUANTIZATIONS

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
LATER = {"solver": "euler"}  # settings that came later, and what edits were made with before
PICTURED = 8  # edits that an evaluation keeps for people: memory must not grow with the examples


@dataclass(frozen=True)
class Settings:
    """The types of `Evaluation.settings` in a file, of edits that a model of this package made."""

    __pydantic_config__ = STRICT
    steps: Positive
    guidance: float
    seed: Count
    size: tuple[Positive, Positive]
    acd_layers: Positive
    text_tokens: Positive
    dtype: Literal["bfloat16", "float32"]
    quantization: Literal[QUANTIZATIONS]
    model: str
    acd_reference_keys: bool = False
    solver: Literal[tuple(SOLVERS)] = LATER["solver"]
    data: str = ""
    buckets: Literal[BUCKETS] = ONE_SIZE


@dataclass(frozen=True)
class PictureSettings:
    """Those where the pictures alone are known, as of another program's edits."""

    __pydantic_config__ = STRICT
    size: tuple[Positive, Positive]
    data: str


@dataclass(frozen=True)
class Origin:
    """Those of `Evaluation.origin`."""

    __pydantic_config__ = STRICT
    lora: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Described:
    """What a file holds beside its arrays."""

    __pydantic_config__ = STRICT
    names: tuple[str, ...]
    settings: Settings
    origin: Origin = Origin()
    uncaptioned: Count = 0


@dataclass(frozen=True)
class _DescribedPictures(_Described):
    settings: PictureSettings


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The edits of one model, and what was measured of each."""

    names: tuple[str, ...]  # of the examples
    measures: Mapping[str, Float[np.ndarray, " N"]]  # float32; NaN where something could not be measured
    images: UInt8[np.ndarray, "n H W 3"]  # the first edits, `PICTURED` at most; `rcgrpo ablate` keeps none
    settings: Mapping[str, Any]  # what the values depend on besides the adapter: base model, data, noise, solver, ACD
    origin: Mapping[str, Any] = field(default_factory=dict)  # the adapter's fingerprint, or its run's configuration
    uncaptioned: int = 0  # how many examples have no caption

    @property
    def of_pictures(self) -> bool:
        """Whether the pictures alone are known, as of another program's edits, and not how they were made."""
        return _of_pictures(self.settings)

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kind of each edit (add, remove, replace) where its name ends in one, as those of scenes do."""
        ends = (name.rpartition("-")[2] for name in self.names)
        return tuple(end if end in KINDS else None for end in ends)

    def save(self, path: str | Path) -> None:
        """Writes all into one `.npz` file, whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f"{path.name}.partial")
        described = {
            "names": self.names, "settings": dict(self.settings), "origin": dict(self.origin),
            "uncaptioned": self.uncaptioned,
        }  # fmt: skip
        measures = {f"measures/{name}": values for name, values in self.measures.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(file, described=np.array(json.dumps(described)), images=self.images, **measures)
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error}).", "Choose a folder you can write to.") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            UserError: The file is missing, damaged, or something else, or memory cannot hold it.
        """
        remedy = "Remove the file, and evaluate again."
        try:
            with np.load(path, allow_pickle=False) as file:
                check_memory(f"{path}", sum(member.file_size for member in file.zip.infolist()), remedy)
                described = parse_json(str(file["described"]))
                arrays = {name: file[name] for name in file.files if name != "described"}
        except UserError:
            raise
        except Exception as error:  # numpy and zipfile raise many types on damaged bytes, and no list is complete
            raise UserError(f"{path}: not an evaluation ({reason(error)}).", remedy) from None
        settings = described.get("settings") if isinstance(described, dict) else None
        kind = _DescribedPictures if _of_pictures(settings) else _Described
        conform(described, kind, f"{path}: not an evaluation: described", remedy)
        images = arrays.pop("images", None)
        measures = {name.partition("/")[2]: x for name, x in arrays.items() if name.startswith("measures/")}
        if problem := _array_problem(measures, images, len(described["names"])):
            raise UserError(f"{path}: not an evaluation: {problem}.", remedy)
        settings = settings if _of_pictures(settings) else LATER | settings
        rest = (settings, described.get("origin", {}), described.get("uncaptioned", 0))
        return cls(tuple(described["names"]), measures, images, *rest)


def _of_pictures(settings: Any) -> bool:
    return isinstance(settings, Mapping) and set(settings) == {"size", "data"}


def _array_problem(measures: Mapping[str, np.ndarray], images: np.ndarray | None, count: int) -> str:
    """What is wrong with the arrays of a file that names so many examples; empty if nothing."""
    for name, values in measures.items():
        if values.dtype != np.float32 or values.shape != (count,) or np.isinf(values).any():
            return f"{name}: {values.dtype} {list(values.shape)} found; finite or NaN float32 [{count}] was wanted"
    if images is None:
        return "no images found"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) > count:
        return f"images: {images.dtype} {list(images.shape)} found; uint8 [{count} or less, H, W, 3] was wanted"
    return ""
