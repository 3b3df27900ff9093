"""How files store the weights of a network: under a prefix, beside other networks, in float8 with scales.

Checkpoints of few bits are of many kinds. Where a weight is a float8 number, or one times a scale, it is read as that;
all other kinds are refused by their names, since their tensors mean nothing by themselves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np

from rcgrpo_jax.borders import parse_json, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.weights.files import FLOAT8, FLOATS, UNQUANTIZED, TensorFiles

_SCALE = re.compile(r"\.(scale_weight|weight_scale)$")  # beside `.weight`, which it multiplies
_UNUSED = re.compile(r"(\.scale_input|\.input_scale|\.comfy_quant|^scaled_fp8)$")  # for products in float8
_NORM = re.compile(r"\.(query|key)_norm\.weight$")  # ComfyUI's newer name of BFL's `.scale`
_CODES = ("I8", "U8", "I16", "I32", "I64")
_FORMS = (  # endings of keys that tell of weights in other kinds, and the names of these kinds
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$"), "NF4 of bitsandbytes"),
    (re.compile(r"\.(SCB|weight_format)$"), "int8 of bitsandbytes"),
    (re.compile(r"\.(wscales|wtscale|wcscales|smooth|smooth_factor|smooth_orig)$"), "4 bits of SVDQuant (nunchaku)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "few bits of GPTQ, AWQ or SVDQuant"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4"),
    (re.compile(r"\.(_data|_scale)$"), "few bits of optimum-quanto"),
    (re.compile(r"\._weight_(qdata|scale)$"), "few bits of torchao"),
)  # fmt: skip


class StoredNetwork:
    """The tensors of one network by their plain names, in files that may hold them in float8 or beside others.

    A float8 weight stands for itself, or for `weight x scale` with one scale for all of it or one for each row.

    Args:
        files: The opened files.
        prefix: What the keys of this network begin with there.
        beside: First names of keys that belong to other networks; what does not begin with `prefix` does anyway.

    Raises:
        UserError: For weights in few bits of another kind.
    """

    def __init__(self, files: TensorFiles, prefix: str = "", beside: frozenset[str] = frozenset()):
        self.files = files
        self.left_out: Counter[str] = Counter()  # first names of keys beside the network -> how many
        self._keys: dict[str, str] = {}  # plain name -> the files' key
        for key in files.shapes:
            first = key.split(".")[0]
            if key.startswith(prefix) and first not in beside:
                self._keys[_NORM.sub(r".\1_norm.scale", key.removeprefix(prefix))] = key
            else:
                self.left_out[first] += 1
        self._refuse_other_kinds(prefix)
        self._scales: dict[str, str] = {}  # plain name of a weight -> key of its scale
        for name in [name for name in self._keys if _SCALE.search(name)]:
            if (weight := _SCALE.sub(".weight", name)) in self._keys and weight not in self._scales:
                self._scales[weight] = self._keys.pop(name)
        self._keys = {name: key for name, key in self._keys.items() if not _UNUSED.search(name)}
        self.shapes = {name: files.shapes[key] for name, key in self._keys.items()}
        self.dtypes = {name: files.dtypes[key] for name, key in self._keys.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor's values: float32 where it is stored in float8 or with a scale, else in the files' dtype."""
        tensor = self.files.read(self._keys[name])
        if self.dtypes[name] in FLOAT8 or name in self._scales:
            tensor = tensor.astype(np.float32)
        if name in self._scales:
            scale = self.files.read(self._scales[name]).astype(np.float32)
            tensor *= scale.reshape(-1, *(1 for _ in tensor.shape[1:]))
        return tensor

    def dtype(self, name: str) -> np.dtype:
        """The dtype to keep a tensor in where none is asked for: the files', bfloat16 for float8."""
        stored = self.dtypes[name]
        return np.dtype(ml_dtypes.bfloat16) if stored in FLOAT8 else FLOATS[stored]

    def _refuse_other_kinds(self, prefix: str) -> None:
        for pattern, kind in _FORMS:
            for name, key in self._keys.items():
                if pattern.search(name):
                    raise self._refusal(key, kind)
        for name, key in self._keys.items():
            if kind := self._other_kind(name, key):
                raise self._refusal(key, kind)
        for layer, options in self._layers().items():
            if layer.startswith(prefix) and not _is_float8(options):
                raise self._refusal(layer or "the header", shorten(options))

    def _other_kind(self, name: str, key: str) -> str | None:
        """What a tensor tells of weights that are not read; None for one that fits floats or float8 with scales."""
        dtype, shape = self.files.dtypes[key], self.files.shapes[key]
        if name.endswith(".comfy_quant"):
            options = _json(self.files.read(key).tobytes())
            return None if _is_float8(options) else shorten(options)
        if name.endswith(".weight") and dtype in _CODES:
            return "int8" if dtype == "I8" else f"codes of few bits ({dtype})"
        if _SCALE.search(name):
            weight = self.files.shapes.get(_SCALE.sub(".weight", key), ())
            if dtype not in FLOATS or dtype in FLOAT8:
                return f"few bits with scales in {dtype} (MXFP8 or the like)"
            if math.prod(shape) != 1 and (math.prod(shape), *shape[:1]) != (*weight[:1], *weight[:1]):
                return f"few bits with scales of blocks ({list(shape)} for {list(weight)})"
        return None

    def _layers(self) -> dict[str, Any]:
        """What ComfyUI notes in a file's header of the kinds of its layers."""
        noted = _json(self.files.metadata().get("_quantization_metadata") or "{}")
        layers = noted.get("layers", {}) if isinstance(noted, dict) else noted
        return layers if isinstance(layers, dict) else {"": layers}

    def _refusal(self, key: str, kind: str) -> UserError:
        return UserError(
            f"{self.files.path}: weights are stored in {kind}, as {key} tells; floats were wanted, or float8 with or "
            "without a scale a tensor or row.",
            UNQUANTIZED,
        )


def _json(text: str | bytes) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _is_float8(options: Any) -> bool:
    """Whether ComfyUI's note of a layer asks for float8 times a scale, and for nothing more."""
    return isinstance(options, dict) and {
        name: value for name, value in options.items() if value and name != "full_precision_matrix_mult"
    } in ({"format": "float8_e4m3fn"}, {"format": "float8_e5m2"})
