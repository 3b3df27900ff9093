"""A CLIP model on disk: both towers, the tokenizer, and what its processor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from rcgrpo_jax.borders import check_memory, read_object
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.clip_vision import MEAN, STD
from rcgrpo_jax.models.config import CLIPConfig
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.hub import local_path
from rcgrpo_jax.weights.leaf_reader import LeafReader, on_default_device
from rcgrpo_jax.weights.load import fingerprint
from rcgrpo_jax.weights.networks import abstract_params
from rcgrpo_jax.weights.stored import StoredNetwork
from rcgrpo_jax.weights.tokenizers import load_clip_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_PATTERNS = ("*.json", "*.txt", "*.safetensors")
_REMEDY = "Give the folder of a CLIP model, or its name on the hub, such as openai/clip-vit-large-patch14."


@dataclass(frozen=True, eq=False)
class CLIPFolder:
    """A CLIP model that was read.

    Attributes:
        path: The folder.
        config: Widths and depths.
        params: Parameters of `models.clip_vision.CLIP`, float32, on the host.
        tokenizer: Its tokenizer.
        lock: Held while the tokenizer is called.
        placed: Mesh -> parameters there.
    """

    path: Path
    config: CLIPConfig
    params: dict[str, Any]
    tokenizer: CLIPTokenizer
    lock: Lock = field(default_factory=Lock, repr=False)
    placed: dict[Mesh, dict[str, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of `config.json` and the weights."""
        return fingerprint(read_object(self.path / CLIPConfig.file, _REMEDY), TensorFiles(self.path))

    def params_on(self, mesh: Mesh) -> dict[str, Any]:
        """The parameters on every device of a mesh, or on the default device for an empty one; copied there once."""
        if mesh not in self.placed:
            place = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
            self.placed[mesh] = jax.device_put(self.params, place)
        return self.placed[mesh]

    def tokenize(self, texts: Sequence[str], keep_end: bool = True) -> Int[np.ndarray, "B N"]:
        """Ids of texts, int32; what is longer than the model reads is cut.

        Args:
            texts: The texts.
            keep_end: Whether a text that is cut ends as every text does. Without its end token the model pools another
                state, the same for all such texts: torchmetrics does so.
        """
        length = self.config.text.max_position_embeddings
        with self.lock:
            found = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=keep_end)
        return np.asarray([ids[:length] for ids in found["input_ids"]], np.int32)


@lru_cache(maxsize=1)  # rewards that ask the same model share it; ViT-L/14 takes 1.7 GB
def load_clip(path: str) -> CLIPFolder:
    """Reads a folder as transformers' `CLIPModel` and `CLIPProcessor` save it, safetensors only.

    Args:
        path: The folder, or the model's name on the hub.

    Raises:
        UserError: For a folder of another kind, and weights or a vocabulary that are not those of its `config.json`.
    """
    folder, config = _open(path, _PATTERNS)
    _check_processor(folder)
    tokenizer = load_clip_tokenizer(folder)
    if (last := max(tokenizer.get_vocab().values())) >= config.text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has token {last}; config.json has vocab_size {config.text.vocab_size}.",
            "Copy all files of the model's release again.",
        )
    params = abstract_params("clip", config)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    check_memory(f"{folder} with {size:,} parameters", 4 * size, "Choose a smaller CLIP model, or add memory.")
    reader = LeafReader(StoredNetwork(TensorFiles(folder)), "clip", params)
    if problems := reader.problems():
        first = " ".join(problems[0].split())
        raise UserError(f"{folder}: {len(problems)} tensors do not fit its config.json, the first: {first}.", _REMEDY)
    loaded = {leaf.path: np.asarray(reader.read(leaf, np.float32, on_default_device)) for leaf in reader.leaves}
    reader.check_finite()
    return CLIPFolder(folder, config, unflatten_dict(loaded), tokenizer)


def clip_shapes(path: str) -> dict[str, Any]:
    """Shapes of the parameters, float32, by `config.json` alone; `path` and errors as of `load_clip`."""
    return abstract_params("clip", _open(path, (CLIPConfig.file,))[1])


def _open(path: str, patterns: Sequence[str]) -> tuple[Path, CLIPConfig]:
    """The folder of a CLIP model, with the files that are asked for, and its sizes."""
    folder = local_path(path, patterns)
    if not path or not folder.is_dir():
        raise UserError(f"{path or '(empty)'}: no such folder; that of a CLIP model was wanted.", _REMEDY)
    try:
        return folder, CLIPConfig.from_json(read_object(folder / CLIPConfig.file, _REMEDY))
    except UserError as error:
        raise UserError(f"{folder}: {error.problem.removeprefix(f'{folder}/')}", error.remedy) from None


def _check_processor(folder: Path) -> None:
    """Refuses a folder whose processor normalises pictures in another way."""
    file = folder / "preprocessor_config.json"
    said = read_object(file, _REMEDY) if file.is_file() else {}
    for name, wanted in (("image_mean", MEAN), ("image_std", STD)):
        if name in said and said[name] != list(wanted):
            raise UserError(f"{file}: {name} is {said[name]}; only {list(wanted)} is implemented.", _REMEDY)
