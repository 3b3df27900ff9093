"""A trained LoRA as other programs read it: one strength in every reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.lora import names
from rcgrpo_jax.weights.lora.scales import DIFFUSERS_KEY, OUR_KEY

LORA_FILE = "pytorch_lora_weights.safetensors"
Pair = tuple[Float[np.ndarray, "r in"], Float[np.ndarray, "out r"]]  # A and B as files have them
FORMS = {  # what `export` writes -> the usual name of the file
    "diffusers": LORA_FILE,
    "kohya": "lora_kohya.safetensors",
    "comfyui": "lora_comfyui.safetensors",
}
_KEYS = {  # of A, of B, and of alpha where the form has one
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", None),
}


def save_lora(
    target: Path,
    adapter: Mapping,
    config: LoRAConfig,
    params: Mapping,
    form: str = "diffusers",
    dtype: Any = "bfloat16",
) -> Path:
    """Writes an adapter as other programs read it.

    The scale alpha / r is folded into B, and alpha is written as r: programs that read the tensors alone, their
    `.alpha`, or diffusers' metadata all apply the same scale. The trained rank and alpha stand under `rcgrpo_jax` in
    the header, so that `load_lora` gives the trained A and B back.

    | form | keys |
    |---|---|
    | diffusers | `transformer.<module>.lora_A.weight` [r, in], `.lora_B.weight` [out, r]; PEFT's settings beside |
    | kohya | `lora_unet_<BFL's module>.lora_down.weight`, `.lora_up.weight`, `.alpha` |
    | comfyui | `diffusion_model.<BFL's module>.lora_down.weight`, `.lora_up.weight` |

    Args:
        target: A `.safetensors` file, or a folder, which gets a file of the form's usual name.
        adapter: Tree of the `lora` collection, as trained (B not scaled).
        config: Rank, alpha and targets.
        params: Parameters of the trained network (arrays or shapes).
        form: A name of `FORMS`.
        dtype: Of the factors in the file.

    Returns:
        Path of the file; equal adapters give equal bytes.

    Raises:
        UserError: If a factor is not finite in `dtype`; nothing is written.
        UsageError: If the form is one of FLUX's alone, and the network another.
        OSError: If it cannot be written.
    """
    if form != "diffusers" and not names.is_flux(params):
        raise UsageError(
            f"--format: {form} found; diffusers was wanted: the model's layers have no other names.",
            "Write --format=diffusers.",
        )
    key_a, key_b, key_alpha = _KEYS[form]
    tensors, modules = {}, _modules(adapter, params, form)
    for module, (a, b) in modules.items():
        name = names.plain(module) if form == "kohya" else module
        tensors[key_a.format(name)] = a.astype(jnp.dtype(dtype))
        tensors[key_b.format(name)] = (b * np.float32(config.scale)).astype(jnp.dtype(dtype))
        if key_alpha:
            tensors[key_alpha.format(name)] = np.array(len(a), np.float32)
    if bad := next((key for key, x in tensors.items() if not np.isfinite(x).all()), None):
        raise UserError(
            f"LoRA: {bad} is not finite in {jnp.dtype(dtype)}; finite numbers were wanted.",
            "Export another step of the run, or in float32.",
        )
    header = {"format": "pt", OUR_KEY: _json({"rank": config.rank, "alpha": config.alpha, "targets": config.targets})}
    if form == "diffusers":
        settings = {
            "r": config.rank, "lora_alpha": config.rank, "target_modules": sorted(modules), "lora_dropout": 0.0,
            "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
        }  # fmt: skip
        header[DIFFUSERS_KEY] = _json({f"transformer.{name}": value for name, value in settings.items()})
    file = lora_file(target, form)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(_serialize(tensors, header))
        return partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def lora_file(target: Path, form: str) -> Path:
    """The file that `save_lora` writes."""
    return target if target.suffix == ".safetensors" else target / FORMS[form]


def adapter_fingerprint(adapter: Mapping) -> str:
    """A hash of an adapter's factors."""
    factors = sorted(flatten_dict(adapter, sep="/").items())
    return hashlib.sha256(b"".join(name.encode() + np.asarray(x).tobytes() for name, x in factors)).hexdigest()


def _modules(adapter: Mapping, params: Mapping, form: str) -> dict[str, Pair]:
    """The linear layers of a form that the adapter touches, with their factors."""
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(adapter).items()}
    layers: dict[str, list[names.Rows]] = {}
    for row in names.rows(params, keymap.Source if form == "diffusers" else names.bfl_source(params)):
        layers.setdefault(row.source.key.removesuffix(".weight"), []).append(row)
    return {
        module: _join(sorted(rows, key=lambda row: row.source.start), flat)
        for module, rows in layers.items()
        if any((*row.path, "A") in flat for row in rows)
    }


def _join(rows: Sequence[names.Rows], flat: Mapping[keymap.Path, np.ndarray]) -> Pair:
    """A and B of a file's layer: those of its kernels side by side, A stacked and B in blocks, so the ranks add up."""
    ends = np.cumsum([0] + [row.fan_in_out[1] for row in rows])
    stacked, blocks = [], []
    for row, start in zip(rows, ends, strict=False):
        if (*row.path, "A") not in flat:
            continue
        a, b = (flat[(*row.path, factor)] for factor in "AB")
        a, b = (a[row.layer], b[row.layer]) if row.leaf.stacked else (a, b)
        block = np.zeros((ends[-1], b.shape[0]), np.float32)
        block[start : start + b.shape[1]] = row.source.cut(b.T) if len(rows) == 1 else b.T
        stacked.append(a.T)
        blocks.append(block)
    return np.concatenate(stacked), np.concatenate(blocks, axis=1)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose header is in one order: the library's differs from process to process.

    The format: the header's length in 8 bytes, little-endian; the header, JSON, padded with blanks to 8; the data.
    """
    from safetensors.numpy import save

    file = save({key: np.asarray(x, order="C") for key, x in tensors.items()}, dict(metadata))
    start = 8 + int.from_bytes(file[:8], "little")
    header = _json(json.loads(file[8:start])).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]
