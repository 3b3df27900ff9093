"""LoRA files into our tree: all of a file, at the strength that it says, or none of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lora import LoRAConfig, scale_adapter, target_kernels
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import FLOATS, TensorFiles
from rcgrpo_jax.weights.lora import names, scales
from rcgrpo_jax.weights.lora.write import LORA_FILE

logger = logging.getLogger(__name__)
FILES = (LORA_FILE, "adapter_model.safetensors")  # what diffusers and PEFT call the file in a folder
_ADDITIVE = re.compile(r"\.(diff|diff_b|bias)$")
_NUMBERS = {*FLOATS, *(f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64))}  # what an alpha may be
_FORMS = (
    "Give a LoRA of FLUX in the form of diffusers, PEFT, kohya, ComfyUI, ai-toolkit, fal or XLabs; docs/files.md lists "
    "them."
)


class Factors(NamedTuple):
    """One kernel's update x A B in one layer."""

    a: Float[np.ndarray, "in r"]
    b: Float[np.ndarray, "r out"]  # alpha / r folded in


@dataclass
class _Layer:
    """What a file holds of one linear layer."""

    name: str  # in the file's words
    keys: dict[str, str] = field(default_factory=dict)  # "A", "B", "alpha" -> key


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # what is not finite is refused
def load_lora(path: str | Path, params: Mapping) -> tuple[dict, LoRAConfig]:
    """Reads a LoRA, in any form of `names`, into our tree.

    A layer of a stacked projection that the file leaves out has factors of zero. Fused projections are taken apart by
    their rows of B. Tensors of text encoders are left out, with a warning that names them.

    Args:
        path: The file, or the folder that holds it.
        params: Parameters of the transformer it is for (arrays or shapes).

    Returns:
        The adapter, float32, and its configuration: `scale_adapter(adapter, config.scale)` is what the file says. For
        our own files these are the trained A, B, rank and alpha; for others the scale is in B, and alpha is the rank,
        the largest of all layers. `targets` names exactly the kernels found.

    Raises:
        UserError: If a tensor does not belong to this transformer, does not fit it or is not finite, or if the file
            asks for more than plain LoRA. Nothing is read in part.
    """
    file = find_file(Path(path))
    files = TensorFiles(file)
    header = files.metadata()
    settings, trained = scales.read_settings(file, header), scales.read_trained(file, header)
    own = (set(target_kernels(params, trained.targets)), trained.rank) if trained else None
    table = names.linear_layers(params)
    found: dict[keymap.Path, dict[int, Factors]] = {}
    leaves, owner = {}, {}
    for entry, layer in _layers(files, table).items():
        scales.check_patterns(file, _module(layer.name), [row.module for row in table[entry]], settings)
        a, b = _factors(files, layer, table[entry])
        alpha = _alpha(files, layer.keys.get("alpha"))
        b = b * np.float32(scales.scale_of(file, _module(layer.name), len(a), alpha, settings))
        for row, factors in _parts(a, b, table[entry], own):
            if row.layer in found.setdefault(row.path, {}):
                raise _twice(file, owner[row.path, row.layer], layer.name)
            owner[row.path, row.layer] = layer.name
            found[row.path][row.layer] = factors
            leaves[row.path] = row.leaf
    adapter = {path: _stack(leaves[path], factors) for path, factors in found.items()}
    ranks = {factors.a.shape[-1] for factors in adapter.values()}
    targets = "|".join("/".join(path) for path in sorted(adapter))
    rank = max(ranks, default=1)  # none where all that is found is fused, and zero
    config = LoRAConfig(rank, float(rank), targets)
    if trained and ranks == {trained.rank}:
        config = LoRAConfig(trained.rank, trained.alpha, targets)
    scale = np.float32(config.scale)
    flat = {(*path, name): x for path, (a, b) in adapter.items() for name, x in (("A", a), ("B", b / scale))}
    tree = unflatten_dict(flat)
    _scaled(file, tree, config.scale)
    return tree, config


def load_loras(paths: Sequence[str | Path], strengths: Sequence[float], params: Mapping) -> dict:
    """Several LoRAs as one, sum_i s_i A_i B_i: their factors side by side, as the network reads them.

    Args:
        paths: As for `load_lora`.
        strengths: s_i, one a path; 1 is the file's own.
        params: As for `load_lora`.

    Returns:
        The adapter with every scale folded in.
    """
    joined: dict[keymap.Path, list[np.ndarray]] = {}
    for path, strength in zip(paths, strengths, strict=True):
        adapter, config = load_lora(path, params)
        for leaf, factor in flatten_dict(_scaled(path, adapter, config.scale * strength)).items():
            joined.setdefault(leaf, []).append(factor)
    # A is [..., in, r] and B [..., r, out].
    return unflatten_dict({p: np.concatenate(x, axis=-1 if p[-1] == "A" else -2) for p, x in joined.items()})


@np.errstate(over="ignore", invalid="ignore")
def _scaled(path: str | Path, adapter: Mapping, scale: float) -> dict:
    """The adapter with its scale folded in.

    Raises:
        UserError: If a factor is not finite then, in float32.
    """
    scaled = scale_adapter(adapter, np.float32(scale))
    if bad := next((leaf for leaf, x in flatten_dict(scaled, sep="/").items() if not np.isfinite(x).all()), None):
        raise UserError(
            f"lora: {bad} of {path} is not finite at a scale of {scale:g}; finite numbers were wanted.",
            "Lower its strength, or export the LoRA again.",
        )
    return scaled


def find_file(path: Path) -> Path:
    """The LoRA file that a path means.

    Raises:
        UserError: If there is none, or several.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"lora: {path} cannot be read ({error.strerror}).", "Check the path.") from None
    if not is_folder:
        if not is_file:
            raise UserError(f"lora: {path} does not exist.", f"Give a folder with {LORA_FILE}, or the file itself.")
        return path
    known = [path / name for name in FILES if (path / name).is_file()]
    others = sorted(other for other in path.glob("*.safetensors") if not other.is_dir())
    if known or len(others) == 1:
        return (known or others)[0]
    if not others:
        raise UserError(
            f"lora: {path / LORA_FILE} does not exist, nor another .safetensors file in that folder.",
            "Give the folder of a LoRA, or the file itself.",
        )
    listed = ", ".join(other.name for other in others)
    raise UserError(f"lora: {path} holds {len(others)} files ({listed}); one was wanted.", "Give the file itself.")


def holds_lora(file: Path) -> bool:
    """Whether a file has a tensor that is called as those of LoRAs are."""
    try:
        return any(names.split(key) for key in TensorFiles(file).shapes)
    except UserError:
        return False


def _layers(files: TensorFiles, table: Mapping[str, list[names.Rows]]) -> dict[str, _Layer]:
    """The entries of the table that a file adapts.

    Raises:
        UserError: For a tensor that is none of a plain LoRA of this transformer, or one layer under two names.
    """
    layers: dict[str, _Layer] = {}
    left_out = []
    for key in sorted(files.shapes):
        if names.TEXT_ENCODERS.match(key):
            left_out.append(key)
            continue
        found = names.split(key)
        entry = names.find(found[0], table) if found else None
        if entry is None:
            if _ADDITIVE.search(key) and files.dtypes[key] in FLOATS and not files.read(key).any():
                continue  # zeros, which some trainers write beside, change nothing
            raise _refusal(files.path, key)
        layer = layers.setdefault(entry, _Layer(found[0]))
        if layer.name != found[0] or found[1] in layer.keys:
            raise _twice(files.path, next(iter(layer.keys.values())), key)
        layer.keys[found[1]] = key
    if left_out:
        logger.warning(
            "lora: %s: %d tensors of text encoders are left out (%s%s): the transformer alone is adapted",
            files.path, len(left_out), left_out[0], ", ..." if len(left_out) > 1 else "",
        )  # fmt: skip
    if not layers:
        raise UserError(f"lora: {files.path} holds no LoRA of a transformer.", _FORMS)
    return layers


def _refusal(file: Path, key: str) -> UserError:
    if kind := names.foreign_kind(key):
        return UserError(
            f"lora: {file} holds {key!r}: {kind}; plain LoRA was wanted.",
            "Convert it to plain LoRA, or merge it into the base, with the program that trained it.",
        )
    return UserError(f"lora: {file} holds {key!r}, which is no low-rank factor of this transformer.", _FORMS)


def _twice(file: Path, first: str, second: str) -> UserError:
    return UserError(
        f"lora: {file} adapts one layer under two names, {first!r} and {second!r}; once was wanted.",
        "Remove one form of the two: they may be the same LoRA twice.",
    )


def _module(name: str) -> str:
    """A layer's name as PEFT's patterns of rank and alpha see it."""
    for prefix in ("base_model.model.", "transformer.", "diffusion_model."):
        name = name.removeprefix(prefix)
    return name


def _factors(
    files: TensorFiles, layer: _Layer, rows: Sequence[names.Rows]
) -> tuple[Float[np.ndarray, "r in"], Float[np.ndarray, "out r"]]:
    """A and B of one layer as the file has them, in float32."""
    if missing := {"A", "B"} - layer.keys.keys():
        raise UserError(
            f"lora: {layer.name} in {files.path} has no {missing.pop()}; both factors were wanted.", scales.AGAIN
        )
    a, b = (_read_factor(files, layer.keys[part]) for part in "AB")
    fan_in, fan_out = rows[0].fan_in_out[0], sum(row.fan_in_out[1] for row in rows)
    rank = a.shape[0] if a.ndim else 0
    for factor, array, wanted in (("A", a, (rank, fan_in)), ("B", b, (fan_out, rank))):
        if array.shape != wanted or not rank:
            raise UserError(
                f"lora: {layer.name}.{factor} in {files.path} has shape {list(array.shape)}; {list(wanted)} was "
                "wanted.",
                "Give a LoRA that was trained for this model.",
            )
    return a, b


def _read(files: TensorFiles, key: str, dtypes: Collection[str]) -> np.ndarray:
    """A tensor in float32, if the file has it in one of these dtypes."""
    if files.dtypes[key] not in dtypes:
        raise UserError(
            f"lora: {key} in {files.path} is {files.dtypes[key]}; one of {', '.join(sorted(dtypes))} was wanted.",
            "Save the LoRA in float16, bfloat16 or float32.",
        )
    return files.read(key).astype(np.float32)


def _read_factor(files: TensorFiles, key: str) -> np.ndarray:
    array = _read(files, key, FLOATS)
    if not np.isfinite(array).all():
        raise UserError(f"lora: {key} in {files.path} holds NaN or inf.", "Export another step of the run.")
    return array.reshape(array.shape[:2]) if array.ndim == 4 and array.shape[2:] == (1, 1) else array  # 1 x 1 kernels


def _alpha(files: TensorFiles, key: str | None) -> float | None:
    if key is None:
        return None
    found = _read(files, key, _NUMBERS)
    if found.size != 1:
        raise UserError(
            f"lora: {key} in {files.path} has shape {list(found.shape)}; one number was wanted.", scales.AGAIN
        )
    return float(found.reshape(()))


def _parts(
    a: np.ndarray, b: np.ndarray, rows: Sequence[names.Rows], trained: tuple[set[keymap.Path], int] | None
) -> list[tuple[names.Rows, Factors]]:
    """The kernels of one layer of a file, each with its factors.

    A fused layer's kernels share A, and have their rows of B. Columns of B that are zero there are another kernel's:
    they are cut off, and a kernel without any other is not adapted. In our own files each kernel has its own columns.
    """
    if len(rows) == 1:
        return [(rows[0], Factors(a.T, rows[0].source.cut(b).T))]
    parts = [(row, _cut(b, row, rows)) for row in rows]
    if trained and len(a) == trained[1] * len(own := [row for row in rows if row.path in trained[0]]):
        columns = [range(i * trained[1], (i + 1) * trained[1]) for i in range(len(own))]
        own_columns = {row.path: c for row, c in zip(own, columns, strict=True)}
        others = (np.delete(part, own_columns.get(row.path, ()), axis=1) for row, part in parts)
        if not any(other.any() for other in others):  # else another program has changed B
            return [(row, Factors(a[c].T, part[:, c].T)) for row, part in parts if (c := own_columns.get(row.path))]
    return [(row, Factors(a[used].T, part[:, used].T)) for row, part in parts if (used := part.any(axis=0)).any()]


def _cut(b: np.ndarray, row: names.Rows, rows: Sequence[names.Rows]) -> np.ndarray:
    return b[row.source.start - rows[0].source.start : row.source.stop - rows[0].source.start]


def _stack(leaf: keymap.Leaf, layers: Mapping[int, Factors]) -> Factors:
    """The factors of all layers on one axis; zeros for a layer without, and beside a smaller rank."""
    count = len(leaf.sources)
    rank = max(factors.a.shape[1] for factors in layers.values())
    fan_in, fan_out = leaf.shape[-2:]
    a, b = np.zeros((count, fan_in, rank), np.float32), np.zeros((count, rank, fan_out), np.float32)
    for layer, factors in layers.items():
        a[layer, :, : factors.a.shape[1]], b[layer, : factors.b.shape[0]] = factors
    return Factors(a, b) if leaf.stacked else Factors(a[0], b[0])
