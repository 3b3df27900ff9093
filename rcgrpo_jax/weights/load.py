"""A model on disk: a diffusers folder, or the directory that `rcgrpo convert` made of one.

Both have a folder a network with its `config.json`; a diffusers folder holds safetensors there, a converted one an
Orbax checkpoint of our tree in `params/`. Weights are read tensor by tensor straight onto the shards of a mesh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding, SingleDeviceSharding

from rcgrpo_jax.borders import read_object
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.quantization import NONE, QuantizedKernel, is_quantized, quantize
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import TensorFiles, tensor_problems
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.stored import StoredNetwork
from rcgrpo_jax.weights.tokenizers import T5_LENGTH

MANIFEST = "rcgrpo.json"  # marks a converted directory
COPY_AGAIN = "The model folder is not complete or damaged; copy it again."
SMALL_EDITOR = Path(__file__).parents[1] / "assets" / "small-editor"
ShardingOf = Callable[[keymap.Path, tuple[int, ...]], Sharding | None]


def on_default_device(path: keymap.Path, shape: tuple[int, ...]) -> None:
    """The sharding rule that places every leaf whole on the default device."""


class ModelFolder:
    """A model on disk, opened for reading.

    Args:
        path: A diffusers folder or a converted directory; `small-editor` is the editor that ships with the package.

    Raises:
        UserError: If it is neither.
    """

    def __init__(self, path: str | Path):
        self.path = SMALL_EDITOR if str(path) == SMALL_EDITOR.name else Path(path)
        if not self.path.is_dir():
            raise UserError(
                f"model: {self.path} is not a folder.",
                "Give a diffusers folder of FLUX.1-Kontext or a directory made by `rcgrpo convert`.",
            )
        self.converted = (self.path / MANIFEST).is_file()
        if not self.converted and not (self.path / "model_index.json").is_file():
            raise UserError(
                f"model: {self.path} holds neither model_index.json (diffusers) nor {MANIFEST} (converted).",
                "Give a diffusers folder of FLUX.1-Kontext or a directory made by `rcgrpo convert`.",
            )

    def has(self, name: str) -> bool:
        return (self.path / name / "config.json").is_file()

    def config(self, name: str) -> Any:
        """The config of one network, a dataclass of `models.config`."""
        if not self.has(name):
            raise UserError(
                f"model: {self.path} holds no {name}.",
                "For a single-file transformer, convert with --base FOLDER, which gives the other networks.",
            )
        file, network = self.path / name / "config.json", NETWORKS[name]
        config = read_object(file, COPY_AGAIN)
        if config.get("_class_name", network.library[1]) != network.library[1]:
            raise UserError(
                f"{file}: of a {config['_class_name']}; only {network.library[1]} is implemented.",
                "Use a folder of FLUX.1-Kontext-dev or of a model with the same blocks.",
            )
        return network.config.from_json(config)

    @property
    def max_text_tokens(self) -> int:
        """The length of the T5 sequence that the model was trained with, by its tokenizer; at most FLUX's 512."""
        file = self.path / "tokenizer_2" / "tokenizer_config.json"
        return (
            min(read_object(file, COPY_AGAIN).get("model_max_length", T5_LENGTH), T5_LENGTH)
            if file.is_file()
            else T5_LENGTH
        )

    def schedule_options(self) -> dict[str, float]:
        """The scheduler's shift, as `flow.schedule.sigmas` takes it."""
        config = read_object(self.path / "scheduler" / "scheduler_config.json", COPY_AGAIN)
        if config.get("use_dynamic_shifting", True) is not True or config.get("shift_terminal"):
            raise UserError(
                f"{self.path}/scheduler/scheduler_config.json: only FLUX's dynamic shifting is implemented.",
                "Set use_dynamic_shifting to true and remove shift_terminal.",
            )
        names = {"base_image_seq_len": "base_tokens", "max_image_seq_len": "max_tokens"}
        names |= {name: name for name in ("base_shift", "max_shift")}
        return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}

    def fingerprint(self, name: str) -> str:
        """A hash of a network's config and weights; a conversion without a cast keeps it."""
        if name.startswith("tokenizer"):
            files = sorted(file for file in (self.path / name).iterdir() if file.is_file())
            return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
        if self.converted:
            return read_object(self.path / MANIFEST, "Run `rcgrpo convert` again.")["fingerprints"][name]
        return fingerprint(read_object(self.path / name / "config.json", COPY_AGAIN), TensorFiles(self.path / name))

    def whole_fingerprint(self) -> str:
        """A hash of all that an edit depends on: every network and tokenizer."""
        parts = [*NETWORKS, "tokenizer", "tokenizer_2"]
        return hashlib.sha256(" ".join(map(self.fingerprint, parts)).encode()).hexdigest()

    def load(
        self,
        name: str,
        dtype: Any = None,
        sharding_of: ShardingOf = on_default_device,
        quantization: str = NONE,
    ) -> dict:
        """The parameters of one network.

        Kernels to quantise are read in the files' dtype and quantised on their devices, one after another: the memory
        needed is that of the result and of one kernel (over all blocks; at most 3.3 GiB of bfloat16 in FLUX).

        Args:
            name: A key of `NETWORKS`.
            dtype: Dtype of the arrays; None keeps the files'.
            sharding_of: (path, shape) -> sharding of a leaf, None for the default device.
            quantization: A name of `models.quantization.QUANTIZATIONS`.

        Raises:
            UserError: With a line for every tensor that does not fit.
        """
        params = abstract_params(name, self.config(name))
        if self.converted:
            return _load_converted(self.path / name / "params", params, dtype, sharding_of, quantization)
        reader = LeafReader(StoredNetwork(TensorFiles(self.path / name)), name, params)
        reader.check()

        def read(leaf: keymap.Leaf) -> jax.Array | QuantizedKernel:
            if not is_quantized(leaf.path, quantization):
                return reader.read(leaf, dtype, sharding_of)
            return _quantize(leaf.path, reader.read(leaf, None, sharding_of), quantization, sharding_of)

        loaded = unflatten_dict({leaf.path: read(leaf) for leaf in reader.leaves})
        reader.check_finite()
        return loaded


def fingerprint(config: dict, files: TensorFiles) -> str:
    """A hash of a network's `config.json` and weights."""
    return hashlib.sha256((json.dumps(config, sort_keys=True) + files.sha256()).encode()).hexdigest()


class LeafReader:
    """Reads the leaves of one network out of safetensors; each only when asked for.

    Args:
        tensors: The network's in the opened files.
        name: A key of `NETWORKS`.
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
        return tensor_problems(expected, self.tensors.shapes, self.tensors.dtypes, NETWORKS[self.name].ignored)

    def check(self) -> None:
        if problems := self.problems():
            raise problem_report(self.name, self.files.path, problems)

    def check_finite(self) -> None:
        if self.not_finite:
            raise problem_report(self.name, self.files.path, [f"NaN or inf   {key}" for key in sorted(self.not_finite)])

    def read(self, leaf: keymap.Leaf, dtype: Any, sharding_of: ShardingOf) -> jax.Array:
        """The array of one leaf; `not_finite` gathers the tensors that hold a NaN or an infinity."""
        sharding = _sharding(sharding_of, leaf.path, leaf.shape)
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


def _sharding(sharding_of: ShardingOf, path: keymap.Path, shape: tuple[int, ...]) -> Sharding:
    return sharding_of(path, shape) or SingleDeviceSharding(jax.local_devices()[0])


def _quantize(path: keymap.Path, kernel: jax.Array, quantization: str, sharding_of: ShardingOf) -> QuantizedKernel:
    """A kernel in few bits, on the devices that its rule gives codes and scales."""
    shapes = jax.eval_shape(partial(quantize, quantization=quantization), kernel)
    shardings = jax.tree.map(lambda x: _sharding(sharding_of, path, x.shape), shapes)
    return jax.jit(quantize, static_argnums=1, out_shardings=shardings)(kernel, quantization)


def _load_converted(path: Path, params: dict, dtype: Any, sharding_of: ShardingOf, quantization: str) -> dict:
    from rcgrpo_jax.orbax import ocp

    path = path.absolute()
    with _damage(path):
        saved = flatten_dict(ocp.metadata(path).metadata)
    wanted = {}
    for leaf_path, shape in flatten_dict(params).items():
        if leaf_path not in saved or tuple(saved[leaf_path].shape) != tuple(shape.shape):
            found = list(saved[leaf_path].shape) if leaf_path in saved else "nothing"
            raise UserError(
                f"{path}: {'/'.join(leaf_path)} is {found}, wanted {list(shape.shape)}.", "Run `rcgrpo convert` again."
            )
        cast = None if is_quantized(leaf_path, quantization) else dtype
        sharding = _sharding(sharding_of, leaf_path, shape.shape)
        wanted[leaf_path] = jax.ShapeDtypeStruct(shape.shape, cast or saved[leaf_path].dtype, sharding=sharding)

    def read(chosen: set[keymap.Path]) -> dict[keymap.Path, jax.Array]:
        asked = {p: leaf if p in chosen else ocp.PLACEHOLDER for p, leaf in wanted.items()}
        with _damage(path):
            found = flatten_dict(ocp.load(path, unflatten_dict(asked)))
        return {p: found[p] for p in chosen}

    kernels = {p for p in wanted if is_quantized(p, quantization)}
    loaded: dict[keymap.Path, jax.Array | QuantizedKernel] = read(wanted.keys() - kernels)
    for p in sorted(kernels):  # in one order in all processes
        loaded[p] = _quantize(p, read({p})[p], quantization, sharding_of)
    return unflatten_dict(loaded)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns any failure to read a converted network into a `UserError`; there are as many as it has files."""
    from rcgrpo_jax.orbax import is_of_files

    try:
        yield
    except Exception as error:
        if not is_of_files(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a complete Orbax checkpoint ({reason}).", "Run `rcgrpo convert` again.") from None
