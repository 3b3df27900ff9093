"""A model on disk: a diffusers folder, or the directory that `rcgrpo convert` made of one.

Both have a folder a network with its `config.json`; a diffusers folder holds safetensors there, a converted one an
Orbax checkpoint of our tree in `params/`. Weights are read tensor by tensor straight onto the shards of a mesh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax.borders import check_memory, read_object
from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.models.clip import LEGACY_EOS
from rcgrpo_jax.models.config import Config
from rcgrpo_jax.models.quantization import NONE, QuantizedKernel, is_quantized, quantize
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.folder_json import Manifest, ModelIndex, SchedulerConfig, TokenizerSettings
from rcgrpo_jax.weights.leaf_reader import LeafReader, ShardingOf, on_default_device, place_of
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.stored import StoredNetwork
from rcgrpo_jax.weights.tokenizers import T5_LENGTH, Tokenizers, load_tokenizers

MANIFEST = Manifest.file
AGREE = (  # (network, field, network, field, ratio): numbers that two networks share
    ("transformer", "joint_attention_dim", "text_encoder_2", "d_model", 1),
    ("transformer", "pooled_projection_dim", "text_encoder", "hidden_size", 1),
    ("transformer", "in_channels", "vae", "latent_channels", 4),  # a token is 2 x 2 cells
)
COPY_AGAIN = "The model folder is not complete or damaged; copy it again."
SMALL_EDITOR = Path(__file__).parents[1] / "assets" / "small-editor"


def find_folder(path: str | Path) -> Path:
    """The folder of a model; `small-editor` is the editor that ships with the package.

    Raises:
        UserError: If it is neither a diffusers folder nor a converted directory.
    """
    folder = SMALL_EDITOR if str(path) == SMALL_EDITOR.name else Path(path)
    remedy = "Give a diffusers folder of FLUX.1-Kontext or a directory made by `rcgrpo convert`."
    if not folder.is_dir():
        raise UserError(f"model: {folder} is not a folder.", remedy)
    if not any((folder / file).is_file() for file in (MANIFEST, ModelIndex.file)):
        raise UserError(
            f"model: {folder} holds neither {ModelIndex.file} (diffusers) nor {MANIFEST} (converted).", remedy
        )
    return folder


class ModelFolder:
    """A model on disk, opened for reading.

    Args:
        path: As `find_folder` takes it.

    Raises:
        UserError: If it is not a folder of FLUX.
    """

    def __init__(self, path: str | Path):
        self.path = find_folder(path)
        self.converted = (self.path / MANIFEST).is_file()
        self._read(Manifest if self.converted else ModelIndex)

    def has(self, name: str) -> bool:
        return (self.path / name / "config.json").is_file()

    def config(self, name: str) -> Any:
        """The config of one network, a dataclass of `models.config`."""
        if not self.has(name):
            raise UserError(
                f"model: {self.path} holds no {name}.",
                "For a single-file transformer, convert with --base FOLDER, which gives the other networks.",
            )
        self._check_agreement(name)
        return self._read(NETWORKS[name].config)

    def _check_agreement(self, name: str) -> None:
        for one, field, other, other_field, factor in AGREE:
            if name in (one, other) and self.has(one) and self.has(other):
                config, neighbour = self._read(NETWORKS[one].config), self._read(NETWORKS[other].config)
                found, wanted = getattr(config, field), factor * getattr(neighbour, other_field)
                if found != wanted:
                    raise UserError(
                        f"{self.path}/{config.file}: {field} is {found}; {wanted} was wanted, {factor} x {other_field} "
                        f"of {neighbour.file}.",
                        "The folder mixes two models, or a file is damaged; copy it again.",
                    )

    def _read(self, kind: type[Config]) -> Any:
        """What one of the folder's JSON files says, checked."""
        content = read_object(self.path / kind.file, COPY_AGAIN)
        try:
            return kind.from_json(content)
        except UserError as error:
            raise UserError(f"{self.path}/{error.problem}", error.remedy) from None

    @property
    def max_text_tokens(self) -> int:
        """The length of the T5 sequence that the model was trained with, by its tokenizer; at most FLUX's 512."""
        return int(min(TokenizerSettings.read(self.path / "tokenizer_2").model_max_length or T5_LENGTH, T5_LENGTH))

    def schedule_options(self) -> dict[str, float]:
        """The scheduler's shift, as `flow.schedule.sigmas` takes it."""
        found = self._read(SchedulerConfig)
        return {
            "base_tokens": found.base_image_seq_len, "max_tokens": found.max_image_seq_len,
            "base_shift": found.base_shift, "max_shift": found.max_shift,
        }  # fmt: skip

    def tokenizers(self) -> Tokenizers:
        """Both tokenizers, of which the text encoders know every id."""
        found = load_tokenizers(self.path)
        clip, t5 = self.config("text_encoder"), self.config("text_encoder_2")
        for part, tokenizer, config in (("tokenizer", found.clip, clip), ("tokenizer_2", found.t5, t5)):
            if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
                raise UserError(
                    f"{self.path}/{part}: token {last}; {config.file} has vocab_size {config.vocab_size}.",
                    f"Copy the {part} folder of the model's release.",
                )
        if clip.eos_token_id not in (found.clip.eos_token_id, LEGACY_EOS):
            raise UserError(
                f"{self.path}/{clip.file}: eos_token_id is {clip.eos_token_id}; {found.clip.eos_token_id} of the "
                "tokenizer was wanted.",
                "Correct it, or copy the tokenizer and text_encoder folders of the model's release.",
            )
        return found

    def fingerprint(self, name: str) -> str:
        """A hash of a network's config and weights; a conversion without a cast keeps it."""
        if name.startswith("tokenizer"):
            files = sorted(file for file in (self.path / name).iterdir() if file.is_file())
            return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
        if not self.converted:
            return fingerprint(read_object(self.path / name / "config.json", COPY_AGAIN), TensorFiles(self.path / name))
        fingerprints = self._read(Manifest).fingerprints
        if name not in fingerprints:
            raise UserError(f"{self.path}/{MANIFEST}: no fingerprint of {name}.", "Run `rcgrpo convert` again.")
        return fingerprints[name]

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
            UserError: With a line for every tensor that does not fit or is not finite; if memory cannot hold them all.
        """
        params = abstract_params(name, self.config(name))
        check_memory(
            f"{self.path}/{name} with {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters",
            _least_bytes(params, dtype, quantization),
            "Correct config.json if it is of another model; else ask for --dtype bfloat16, quantise, or add memory.",
        )
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


def _least_bytes(params: dict, dtype: Any, quantization: str) -> int:
    """What a network's parameters take at least; the files' dtype, for None, has two bytes or more."""
    bits = {path: 8 * jnp.dtype(dtype or jnp.bfloat16).itemsize for path in flatten_dict(params)}
    few = {"int8": 8, "nf4": 4}
    bits |= {path: few[quantization] for path in bits if is_quantized(path, quantization)}
    return sum(leaf.size * bits[path] for path, leaf in flatten_dict(params).items()) // 8


def fingerprint(config: dict, files: TensorFiles) -> str:
    """A hash of a network's `config.json` and weights."""
    return hashlib.sha256((json.dumps(config, sort_keys=True) + files.sha256()).encode()).hexdigest()


def _quantize(path: keymap.Path, kernel: jax.Array, quantization: str, sharding_of: ShardingOf) -> QuantizedKernel:
    """A kernel in few bits, on the devices that its rule gives codes and scales."""
    shapes = jax.eval_shape(partial(quantize, quantization=quantization), kernel)
    shardings = jax.tree.map(lambda x: place_of(sharding_of, path, x.shape), shapes)
    return jax.jit(quantize, static_argnums=1, out_shardings=shardings)(kernel, quantization)


def _load_converted(path: Path, params: dict, dtype: Any, sharding_of: ShardingOf, quantization: str) -> dict:
    from rcgrpo_jax.orbax import ocp

    path = path.absolute()
    with _damage(path):
        saved = flatten_dict(ocp.metadata(path).metadata)
    wanted: dict[keymap.Path, jax.ShapeDtypeStruct] = {}
    bad: list[str] = []  # leaves that are not finite
    if unknown := sorted("/".join(p) for p in saved.keys() - flatten_dict(params).keys()):
        raise UserError(
            f"{path}: holds {unknown[0]}, which its config.json does not want.", "Run `rcgrpo convert` again."
        )
    for leaf_path, shape in flatten_dict(params).items():
        if leaf_path not in saved or tuple(saved[leaf_path].shape) != tuple(shape.shape):
            found = list(saved[leaf_path].shape) if leaf_path in saved else "nothing"
            raise UserError(
                f"{path}: {'/'.join(leaf_path)} is {found}, wanted {list(shape.shape)}.", "Run `rcgrpo convert` again."
            )
        cast = None if is_quantized(leaf_path, quantization) else dtype
        sharding = place_of(sharding_of, leaf_path, shape.shape)
        wanted[leaf_path] = jax.ShapeDtypeStruct(shape.shape, cast or saved[leaf_path].dtype, sharding=sharding)

    def read(chosen: set[keymap.Path]) -> dict[keymap.Path, jax.Array]:
        asked = {p: leaf if p in chosen else ocp.PLACEHOLDER for p, leaf in wanted.items()}
        with _damage(path):
            found = flatten_dict(ocp.load(path, unflatten_dict(asked)))
        bad.extend("/".join(p) for p in chosen if not _is_finite(found[p]))
        return {p: found[p] for p in chosen}

    kernels = {p for p in wanted if is_quantized(p, quantization)}
    loaded: dict[keymap.Path, jax.Array | QuantizedKernel] = read(wanted.keys() - kernels)
    for p in sorted(kernels):  # in one order in all processes
        loaded[p] = _quantize(p, read({p})[p], quantization, sharding_of)
    if bad:  # said last: a process that saw none of it must not wait for this one's part of a read
        raise UserError(f"{path}: NaN or inf in {', '.join(sorted(bad))}.", "Run `rcgrpo convert` again.")
    return unflatten_dict(loaded)


def _is_finite(array: jax.Array) -> bool:
    """Whether this process' part of an array is finite; looked at on the host, a program a shape would take longer."""
    first = (shard for shard in array.addressable_shards if shard.replica_id == 0)
    copies = (jax.device_put(shard.data, shard.device, may_alias=False) for shard in first)  # keeps no host copy alive
    return all(np.isfinite(np.asarray(copy)).all() for copy in copies)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns any failure to read a converted network into a `UserError`; there are as many as it has files."""
    from rcgrpo_jax.orbax import is_of_files

    try:
        yield
    except Exception as error:
        if not is_of_files(error):
            raise
        raise UserError(
            f"{path}: not a complete Orbax checkpoint ({reason(error)}).", "Run `rcgrpo convert` again."
        ) from None
