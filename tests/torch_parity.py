"""Helpers of the parity tests: torch weights in our trees, and how far two results are apart.

The conversion restates the naming rule of the models' docstrings and shares no code with `rcgrpo_jax.weights`, so that
a mistake in either shows.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from references import torch

from rcgrpo_jax.models.t5 import RELATIVE_BIAS_KEY

STACKED = ("block", "layers", "transformer_blocks", "single_transformer_blocks")  # components scanned over layers
UNNUMBERED = ("linear_1", "linear_2", "wi_0", "wi_1")  # names whose number belongs to them
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
TIED = ("encoder.embed_tokens.weight",)  # torch's second name for `shared.weight`


def torch_key(path: tuple[str, ...]) -> str:
    """The torch key of a leaf; `{}` stands for the layer where the leaf is stacked."""
    if path == ("encoder", "relative_attention_bias", "embedding"):
        return RELATIVE_BIAS_KEY
    *modules, leaf = path
    names = [name if name in UNNUMBERED else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([f"{name}.{{}}" if name in STACKED else name for name in names] + [LEAVES[leaf]])


def state_dict_to_params(state_dict: dict[str, torch.Tensor], abstract_params: dict) -> dict:
    """Fills a parameter tree with a torch module's weights.

    Args:
        state_dict: The torch module's; CLIP's may lack the prefix `text_model.`.
        abstract_params: The tree of `jax.eval_shape(module.init, ...)["params"]`.

    Returns:
        The tree with fp32 numpy leaves; every tensor has been used, and every shape fits.
    """
    unused = {key: value.detach().float().numpy() for key, value in state_dict.items() if key not in TIED}
    if "embeddings.token_embedding.weight" in unused:
        unused = {f"text_model.{key}": value for key, value in unused.items()}

    def take(key: str, leaf: str) -> np.ndarray:
        value = unused.pop(key)
        if leaf != "kernel":
            return value
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T

    def fill(path: tuple[jax.tree_util.DictKey, ...], abstract: jax.ShapeDtypeStruct) -> np.ndarray:
        names = tuple(entry.key for entry in path)
        key = torch_key(names)
        if "{}" in key:
            value = np.stack([take(key.format(i), names[-1]) for i in range(abstract.shape[0])])
        else:
            value = take(key, names[-1])
        assert value.shape == abstract.shape, f"{key}: torch has {value.shape}, the tree {abstract.shape}"
        return value

    params = jax.tree_util.tree_map_with_path(fill, abstract_params)
    assert not unused, f"tensors that no leaf took: {sorted(unused)}"
    return params


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every weight, biases and norms included, so that activations stay near unit variance and none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # torch draws its own biases from an unseeded generator
                parameter.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
    """`max |ours - theirs| / max |theirs|`, infinite if a result is not finite."""
    a, b = np.asarray(ours, np.float32), theirs.detach().float().numpy()
    assert a.shape == b.shape, f"ours is {a.shape}, torch's {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max()) if np.isfinite(a).all() else float("inf")


def parameter_count(abstract_params: dict) -> int:
    """The number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params))
