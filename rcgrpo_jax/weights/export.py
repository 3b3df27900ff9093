"""Parameter trees back into files: networks and folders in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.networks import NETWORKS


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
