"""Where each leaf of our parameter trees lies in a released file: diffusers' keys and BFL's single-file keys.

Our modules carry diffusers' names, so one rule serves all networks: the key of a leaf is its path joined by dots,
`name_3` read as `name.3`, with the layer's number after the name of its scanned stack. BFL's file of the transformer is
a table on top of that (names of black-forest-labs/flux).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flax.traverse_util import flatten_dict

from rcgrpo_jax.models.t5 import RELATIVE_BIAS_KEY

Path = tuple[str, ...]
STACKS = (
    ("transformer_blocks",),
    ("single_transformer_blocks",),
    ("text_model", "encoder", "layers"),
    ("vision_model", "encoder", "layers"),
    ("encoder", "block"),
)
_NUMBERED = re.compile(r"^(?!linear_|wi_)(.*)_(\d+)$")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclass(frozen=True)
class Source:
    """A tensor of a file, or some rows of it."""

    key: str
    start: int = 0
    stop: int | None = None  # None: all rows
    swap_halves: bool = False  # the two halves of the rows are exchanged

    def cut(self, tensor: np.ndarray) -> np.ndarray:
        part = tensor[self.start : self.stop]
        return np.roll(part, part.shape[0] // 2, axis=0) if self.swap_halves else part


@dataclass(frozen=True)
class Leaf:
    """One leaf of a parameter tree and the tensors that fill it, one a layer for scanned stacks."""

    path: Path
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    stacked: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one source in the file's layout: [out, in] for kernels, OIHW for convolutions."""
        shape = self.shape[1:] if self.stacked else self.shape
        if self.path[-1] != "kernel":
            return shape
        return shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.path[-1] != "kernel":
            return tensor
        return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        if self.path[-1] != "kernel":
            return array
        return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def is_stacked(path: Path) -> bool:
    """Whether a leaf has a leading axis of layers."""
    if path[-2:] == ("relative_attention_bias", "embedding"):
        return False
    return any(path[: len(stack)] == stack for stack in STACKS)


def diffusers_key(path: Path, layer: int | None = None) -> str:
    """The key of a leaf (or of a module, for a path without leaf) in diffusers' and transformers' files."""
    if path[-2:] == ("relative_attention_bias", "embedding"):
        return RELATIVE_BIAS_KEY
    names = [_NUMBERED.sub(r"\1.\2", name) for name in path]
    names[-1] = _LEAVES.get(names[-1], names[-1])
    if layer is not None:
        depth = next(len(stack) for stack in STACKS if path[: len(stack)] == stack)
        names.insert(depth, str(layer))
    return ".".join(names)


_TOP = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
_EMBEDDERS = {"timestep": "time_in", "guidance": "guidance_in", "text": "vector_in"}
_DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
_SINGLE = {
    "norm.linear": "modulation.lin", "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm",
}  # fmt: skip
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


def bfl_source(key: str, width: int) -> Source:
    """Where the single-file BFL layout keeps the tensor that diffusers calls `key`; `width` = heads x head_dim."""
    module, leaf = key.rsplit(".", 1)
    if module in _TOP:
        return Source(f"{_TOP[module]}.{leaf}")
    if module == "norm_out.linear":  # BFL stores (shift, scale), diffusers (scale, shift)
        return Source(f"final_layer.adaLN_modulation.1.{leaf}", swap_halves=True)
    if found := re.fullmatch(r"time_text_embed\.(\w+)_embedder\.linear_([12])", module):
        return Source(f"{_EMBEDDERS[found[1]]}.{'in' if found[2] == '1' else 'out'}_layer.{leaf}")
    kind, layer, name = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.*)", module).groups()
    double = kind == "transformer_blocks"
    prefix = f"{'double' if double else 'single'}_blocks.{layer}"
    if (renamed := (_DOUBLE if double else _SINGLE).get(name)) is not None:
        return Source(f"{prefix}.{renamed}.{'scale' if renamed.endswith('_norm') else leaf}")
    if name == "proj_mlp":
        return Source(f"{prefix}.linear1.{leaf}", 3 * width, 7 * width)
    projection = name.removeprefix("attn.")
    row = _QKV[projection] * width
    fused = "linear1" if not double else f"{'txt' if projection.startswith('add_') else 'img'}_attn.qkv"
    return Source(f"{prefix}.{fused}.{leaf}", row, row + width)


def leaves(params: Mapping, to_source: Callable[[str], Source] = Source) -> list[Leaf]:
    """Every leaf of a parameter tree (arrays or shapes) with its sources.

    Args:
        params: Nested tree of one network.
        to_source: diffusers' key to the file's source; `Source` for diffusers' own files, `bfl_source` for BFL's.
    """
    found = []
    for path, leaf in flatten_dict(params).items():
        layers = range(leaf.shape[0]) if is_stacked(path) else [None]
        sources = tuple(to_source(diffusers_key(path, layer)) for layer in layers)
        found.append(Leaf(path, tuple(leaf.shape), sources, is_stacked(path)))
    return found


def expected_tensors(mapped: list[Leaf]) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a file must hold to fill the leaves; fused tensors are put together."""
    expected: dict[str, tuple[int, ...]] = {}
    for leaf in mapped:
        for source in leaf.sources:
            rows = source.stop or leaf.tensor_shape[0]
            before = expected.get(source.key, (0,))[0]
            expected[source.key] = (max(before, rows), *leaf.tensor_shape[1:])
    return expected
