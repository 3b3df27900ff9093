"""Reads the leaves of a network out of safetensors, tensor by tensor, straight onto the shards of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import tensor_problems
from rcgrpo_jax.weights.networks import ALL
from rcgrpo_jax.weights.stored import StoredNetwork

ShardingOf = Callable[[keymap.Path, tuple[int, ...]], Sharding | None]


def on_default_device(path: keymap.Path, shape: tuple[int, ...]) -> None:
    """The sharding rule that places every leaf whole on the default device."""


def place_of(sharding_of: ShardingOf, path: keymap.Path, shape: tuple[int, ...]) -> Sharding:
    """The sharding of a leaf."""
    return sharding_of(path, shape) or SingleDeviceSharding(jax.local_devices()[0])


class LeafReader:
    """Reads the leaves of one network out of safetensors; each only when asked for.

    Args:
        tensors: The network's in the opened files.
        name: A key of `networks.ALL`.
        params: The tree to fill (arrays or shapes).
        to_source: `keymap.Source` for diffusers' files, or a map to BFL's.
    """

    def __init__(
        self,
        tensors: StoredNetwork,
        name: str,
        params: dict,
        to_source: Callable[[str], keymap.Source] = keymap.Source,
    ):
        if name == "text_encoder" and not any(key.startswith("text_model.") for key in tensors.shapes):
            to_source = _without_prefix  # transformers 5 saves CLIP without the prefix that released files carry
        self.tensors, self.files, self.name = tensors, tensors.files, name
        self.leaves = keymap.leaves(params, to_source)
        self.not_finite: set[str] = set()

    def problems(self) -> list[str]:
        """A line for every tensor that is missing, unexpected, mis-shaped or not of a float dtype."""
        expected = keymap.expected_tensors(self.leaves)
        return tensor_problems(expected, self.tensors.shapes, self.tensors.dtypes, ALL[self.name].ignored)

    def check(self) -> None:
        if problems := self.problems():
            raise problem_report(self.name, self.files.path, problems)

    def values_lost(self) -> list[str]:
        """A line for every tensor read so far that holds a NaN or an infinity."""
        return [f"NaN or inf   {key}" for key in sorted(self.not_finite)]

    def check_finite(self) -> None:
        if lost := self.values_lost():
            raise problem_report(self.name, self.files.path, lost)

    def read(self, leaf: keymap.Leaf, dtype: Any, sharding_of: ShardingOf) -> jax.Array:
        """The array of one leaf; `not_finite` gathers the tensors that hold a NaN or an infinity."""
        sharding = place_of(sharding_of, leaf.path, leaf.shape)
        dtype = jnp.dtype(dtype or self.tensors.dtype(leaf.sources[0].key))
        blocks: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}  # this process' distinct shards
        for index in sharding.addressable_devices_indices_map(leaf.shape).values():
            shape = tuple(len(range(size)[cut]) for cut, size in zip(index, leaf.shape, strict=True))
            blocks.setdefault(str(index), (index, np.empty(shape, dtype)))
        for layer, source in enumerate(leaf.sources):
            tensor = self._tensor(leaf, source, dtype)  # read once, however many shards want a part of it
            for index, block in blocks.values():
                if not leaf.stacked:
                    block[...] = tensor[index]
                elif layer in (layers := range(len(leaf.sources))[index[0]]):
                    block[layer - layers.start] = tensor[index[1:]]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: blocks[str(index)][1])

    def _tensor(self, leaf: keymap.Leaf, source: keymap.Source, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):  # an infinity is found next
            part = source.cut(self.tensors.read(source.key)).astype(dtype, copy=False)
        if not np.isfinite(part).all():
            self.not_finite.add(source.key)
        return leaf.to_ours(part)


def problem_report(name: str, path: Path, problems: list[str]) -> UserError:
    listing = "\n".join(f"  {line}" for line in problems)
    return UserError(
        f"{name}: {path} does not fit the network of its config.json; {len(problems)} tensors:\n{listing}",
        "Download the files again, or correct config.json if it belongs to another model.",
    )


def _without_prefix(key: str) -> keymap.Source:
    return keymap.Source(key.removeprefix("text_model."))
