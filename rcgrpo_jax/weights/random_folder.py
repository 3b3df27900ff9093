"""A small FLUX.1-Kontext folder with random weights, in diffusers' exact layout.

It has every part of the real folder at a size that runs on a laptop: for tests, for examples, and to try a set-up
before the gated weights are at hand. It has learned nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax.models.config import CLIPTextConfig, MMDiTConfig, T5Config, VAEConfig
from rcgrpo_jax.weights.export import save_network
from rcgrpo_jax.weights.keymap import is_stacked
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.tokenizers import T5_LENGTH, write_clip_tokenizer, write_t5_tokenizer

SMALL: Mapping[str, Any] = {
    "transformer": MMDiTConfig(
        num_layers=2, num_single_layers=4, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=64,
        pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    ),
    "vae": VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8),
    "text_encoder": CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    ),
    "text_encoder_2": T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
}  # fmt: skip

# The editor that ships with the package, before it has learned; images of 128 x 128 pixels are 8 x 8 tokens.
EDITOR_TEXT_TOKENS = 24  # the longest instruction of the scenes has 20
EDITOR: Mapping[str, Any] = {
    "transformer": MMDiTConfig(
        num_layers=2, num_single_layers=4, num_attention_heads=3, attention_head_dim=64, joint_attention_dim=128,
        pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ),
    "vae": VAEConfig(block_out_channels=(8, 16, 32, 64), layers_per_block=1, norm_num_groups=4),
    "text_encoder": CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    ),
    "text_encoder_2": T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
}  # fmt: skip

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def build(
    path: str | Path, seed: int = 0, configs: Mapping[str, Any] = SMALL, max_text_tokens: int = T5_LENGTH
) -> Path:
    """Writes a folder that diffusers' `FluxKontextPipeline.from_pretrained` and `rcgrpo convert` read.

    Args:
        path: Folder to write; files of the same names are replaced.
        seed: Of all weights; equal seeds give equal files.
        configs: A config for each of `weights.networks.NETWORKS`; vocabulary sizes are those of the small tokenizers.
        max_text_tokens: N_txt, the length that T5 sequences are padded to.

    Returns:
        The folder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    clip_size = write_clip_tokenizer(path / "tokenizer")
    t5_size = write_t5_tokenizer(path / "tokenizer_2", max_text_tokens)
    configs = dict(configs)
    configs["text_encoder"] = replace(configs["text_encoder"], vocab_size=clip_size, eos_token_id=clip_size - 1)
    configs["text_encoder_2"] = replace(configs["text_encoder_2"], vocab_size=t5_size)
    for name in NETWORKS:
        params = _draw(seed, name, abstract_params(name, configs[name]))
        save_network(path, name, configs[name], params)
    (path / "scheduler").mkdir(exist_ok=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    (path / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n")
    return path


def _draw(seed: int, name: str, shapes: dict) -> dict:
    """Kernels with variance 1 / fan-in, unit scales, zero biases, unit-variance embeddings, each from its own name."""
    params = {}
    for path, leaf in flatten_dict(shapes).items():
        rng = np.random.default_rng([seed, zlib.crc32("/".join((name, *path)).encode())])
        match path[-1]:
            case "kernel":
                fan_in = np.prod(leaf.shape[1 if is_stacked(path) else 0 : -1])
                params[path] = rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))
            case "embedding":
                params[path] = rng.standard_normal(leaf.shape, np.float32)
            case _:
                params[path] = np.full(leaf.shape, path[-1] == "scale", np.float32)
    return unflatten_dict(params)


def model_index() -> dict[str, Any]:
    """The `model_index.json` of FLUX.1-Kontext-dev."""
    return {
        "_class_name": "FluxKontextPipeline",
        "_diffusers_version": "0.34.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **{name: list(network.library) for name, network in NETWORKS.items()},
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    }
