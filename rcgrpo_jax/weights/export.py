"""Parameter trees back into files: a LoRA as diffusers loads it, and whole networks in diffusers' layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.networks import NETWORKS

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
_FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight"}


def diffusers_tensors(params: Mapping) -> dict[str, np.ndarray]:
    """The tensors of a network under diffusers' keys and in its layout; the inverse of loading."""
    arrays = flatten_dict(params)
    tensors = {}
    for leaf in keymap.leaves(params):
        array = np.asarray(arrays[leaf.path])
        for source, part in zip(leaf.sources, array if leaf.stacked else [array], strict=True):
            tensors[source.key] = np.ascontiguousarray(leaf.to_file(part))
    return tensors


def save_network(folder: Path, name: str, config: Any, params: Mapping) -> None:
    """Writes one network of a diffusers folder: `folder/name/config.json` and its safetensors."""
    from safetensors.numpy import save_file

    network = NETWORKS[name]
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(network_json(name, config), indent=2) + "\n")
    save_file(diffusers_tensors(params), target / f"{network.file}.safetensors", metadata={"format": "pt"})


def save_folder(start: Path, target: Path, networks: Mapping[str, tuple[Any, Mapping]], dtype: Any) -> Path:
    """Writes a diffusers folder with new networks and everything else as in `start`; one at `target` is replaced.

    Args:
        start: A diffusers folder.
        target: The folder to write; it is never there in part.
        networks: Name -> config and parameters.
        dtype: Of the files of these networks.

    Raises:
        OSError, SafetensorError: If it cannot be written; a full disk is either.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(start, partial, ignore=shutil.ignore_patterns(*networks, partial.name))  # it may lie in `start`
    for name, (config, params) in networks.items():
        save_network(partial, name, config, jax.tree.map(lambda x: np.asarray(x).astype(dtype), params))
    shutil.rmtree(target, ignore_errors=True)
    return partial.rename(target)


def network_json(name: str, config: Any) -> dict[str, Any]:
    """The `config.json` of a network, as diffusers and transformers write it."""
    class_name = NETWORKS[name].library[1]
    extra = {
        "transformer": {"patch_size": 1, "out_channels": None},
        "vae": {
            "act_fn": "silu", "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
            "down_block_types": ["DownEncoderBlock2D"] * len(getattr(config, "block_out_channels", ())),
            "up_block_types": ["UpDecoderBlock2D"] * len(getattr(config, "block_out_channels", ())),
        },
        "text_encoder": {
            "hidden_act": "quick_gelu", "model_type": "clip_text_model", "bos_token_id": 0, "pad_token_id": 1,
        },
        "text_encoder_2": {"feed_forward_proj": "gated-gelu", "model_type": "t5", "is_encoder_decoder": False},
    }[name]  # fmt: skip
    fields = asdict(config)
    fields.pop("rope_theta", None)  # fixed in diffusers
    owner = {"_class_name": class_name} if NETWORKS[name].library[0] == "diffusers" else {"architectures": [class_name]}
    return owner | fields | extra


def save_lora(folder: Path, adapter: Mapping, config: LoRAConfig) -> Path:
    """Writes an adapter as diffusers' `load_lora_weights` reads it: `pytorch_lora_weights.safetensors`.

    Keys are `transformer.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. The loader takes alpha from the
    metadata `lora_adapter_metadata`; without it, it would assume alpha == r.

    Args:
        folder: Created if missing.
        adapter: Tree of the `lora` collection, as trained (B not scaled).
        config: Rank and alpha.

    Returns:
        Path of the file.
    """
    from safetensors.numpy import save_file

    tensors, modules = {}, []
    for path, array in flatten_dict(adapter).items():
        stacked = keymap.is_stacked(path)
        parts = np.asarray(array, np.float32)
        for layer, part in enumerate(parts if stacked else [parts]):
            module = keymap.diffusers_key(path[:-1], layer if stacked else None)
            tensors[f"{PREFIX}{module}.{_FACTORS[path[-1]]}"] = np.ascontiguousarray(part.T)
            modules.append(module)
    metadata = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted(set(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    target = Path(folder) / LORA_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    adapter_metadata = json.dumps({PREFIX + key: value for key, value in metadata.items()}, sort_keys=True)
    partial = target.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt", "lora_adapter_metadata": adapter_metadata})
    partial.replace(target)
    return target


def load_lora(path: str | Path, params: Mapping) -> tuple[dict, LoRAConfig]:
    """Reads a LoRA in diffusers format into our tree.

    Args:
        path: The file, or the folder that holds it.
        params: Parameters of the transformer it is for (arrays or shapes).

    Returns:
        The adapter (B not scaled) and its rank and alpha; `targets` names exactly the layers found.

    Raises:
        UserError: If a tensor does not belong to this transformer or does not fit it, a stacked layer is only partly
            adapted, or the layers differ in rank or scale.
    """
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"lora: {file} does not exist.", f"Give a folder with {LORA_FILE}, or the file itself.")
    files = TensorFiles(file)
    module_of = {}
    for leaf in keymap.leaves(params):
        if leaf.path[-1] == "kernel":
            for layer, source in enumerate(leaf.sources):
                module_of[source.key.removesuffix(".weight")] = (leaf, layer)
    found: dict[keymap.Path, dict[int, dict[str, np.ndarray]]] = {}
    for key in files.shapes:
        module, _, factor = key.removeprefix(PREFIX).partition(".lora_")
        if module not in module_of or not key.startswith(PREFIX) or factor not in ("A.weight", "B.weight"):
            raise UserError(
                f"lora: {file} holds {key!r}, which is no low-rank factor of this transformer.",
                "Give a LoRA of this model in diffusers format (transformer.<module>.lora_A.weight).",
            )
        leaf, layer = module_of[module]
        found.setdefault(leaf.path[:-1], {}).setdefault(layer, {})[factor[0]] = files.read(key).T.astype(np.float32)
    config = _lora_config(file, found)
    return _stack(file, found, {leaf.path[:-1]: leaf for leaf, _ in module_of.values()}, config.rank), config


def adapter_fingerprint(adapter: Mapping) -> str:
    """A hash of an adapter's factors."""
    factors = sorted(flatten_dict(adapter, sep="/").items())
    return hashlib.sha256(b"".join(name.encode() + np.asarray(x).tobytes() for name, x in factors)).hexdigest()


def _stack(file: Path, found: dict, leaves: dict[keymap.Path, keymap.Leaf], rank: int) -> dict:
    adapter = {}
    for path, layers in found.items():
        leaf, name = leaves[path], "/".join(path)
        if len(layers) != len(leaf.sources) or any(set(factors) != {"A", "B"} for factors in layers.values()):
            raise UserError(
                f"lora: {file} adapts {len(layers)} of the {len(leaf.sources)} layers of {name}, or misses A or B.",
                "Only LoRAs that adapt a projection in every block are supported.",
            )
        fan_in, fan_out = leaf.shape[-2:]
        for factor, wanted in (("A", (fan_in, rank)), ("B", (rank, fan_out))):
            arrays = [layers[i][factor] for i in range(len(layers))]
            if shapes := sorted({array.shape for array in arrays} - {wanted}):
                raise UserError(
                    f"lora: {name}.{factor} in {file} has shape {list(shapes[0])}; {list(wanted)} was wanted.",
                    "Give a LoRA that was trained for this model.",
                )
            stacked = np.stack(arrays)
            if not np.isfinite(stacked).all():
                raise UserError(f"lora: {name}.{factor} in {file} holds NaN or inf.", "Export another step of the run.")
            adapter[(*path, factor)] = stacked if leaf.stacked else stacked[0]
    return unflatten_dict(adapter)


def _lora_config(file: Path, found: dict) -> LoRAConfig:
    from safetensors import safe_open

    ranks = {factors["A"].shape[-1] for layers in found.values() for factors in layers.values() if "A" in factors}
    if len(ranks) != 1:
        raise UserError(f"lora: {file} has ranks {sorted(ranks)}; one rank is supported.", "Export with one rank.")
    with safe_open(file, framework="np") as handle:
        text = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        metadata = {key.removeprefix(PREFIX): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"lora: the metadata of {file} is damaged: {text!r}.", "Export the LoRA again.") from None
    if metadata.get("alpha_pattern") or metadata.get("use_rslora"):
        raise UserError(
            f"lora: {file} scales its layers by alpha_pattern or use_rslora; one scale alpha / r is supported.",
            "Export with one alpha.",
        )
    rank = ranks.pop()
    targets = "|".join("/".join(path) for path in sorted(found))
    return LoRAConfig(rank, float(metadata.get("lora_alpha", rank)), targets)
