"""A family in one file: pictures' patches as latents, bytes as text, and true guidance by two passes.

Its folder has `model_index.json`, which names the class `ToyPipeline`, and `toy.safetensors`. One line registers it:
`FAMILIES["Toy"] = Toy`.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from rcgrpo_jax.editors import model
from rcgrpo_jax.editors.base import Masses
from rcgrpo_jax.editors.model import Sizes, to_unit
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.flow import matching, schedule
from rcgrpo_jax.models.lora import Linear
from rcgrpo_jax.parallel.sharding import replicated

SIDE, CHANNELS, WIDTH, TEXT = 8, 192, 16, 12  # a token is 8 x 8 pixels in three colours
FILE = "toy.safetensors"


class Condition(NamedTuple):
    text: jax.Array  # [*b, N_txt, WIDTH]
    reference: jax.Array  # [*b, N, CHANNELS]
    guidance: jax.Array  # [*b]


class Attention(nn.Module):
    """Text tokens look at the picture, and the picture at the text tokens."""

    @nn.compact
    def __call__(self, image, text):
        q, k, v = (Linear(WIDTH, name=name)(x) for name, x in (("to_q", text), ("to_k", image), ("to_v", text)))
        scores = q @ k.swapaxes(-1, -2) / WIDTH**0.5
        return jax.nn.softmax(scores, -2).swapaxes(-1, -2) @ v, jax.nn.softmax(scores, -1)  # [*b, N_txt, N]


class Network(nn.Module):
    """`(v, A)`, the velocity and the text's attention."""

    @nn.compact
    def __call__(self, x, sigma, text, reference):
        image = Linear(WIDTH, name="proj_in")(x, reference)
        seen, attention = Attention(name="attn")(image, text)
        out = Linear(CHANNELS, name="proj_out")(jnp.tanh(image + seen))
        return x - reference + sigma * out, attention


@dataclass(frozen=True)
class ToyNetworks:
    maps: bool = False

    def grid(self, height, width):
        return height // SIDE, width // SIDE

    def sigmas(self, num_steps, num_image_tokens):
        return schedule.sigmas(num_steps, num_image_tokens)

    def sample_sigma(self, key, num_image_tokens, extra_shift):
        return matching.sample_sigmas(key, (), num_image_tokens, extra_shift)

    def condition(self, encoded, guidance):
        reference = encoded["latents"]
        return Condition(encoded["bytes"], reference, jnp.full(reference.shape[:-2], guidance, jnp.float32))

    def source(self, condition):
        return condition.reference

    def text_weights(self, encoded):
        return encoded["is_byte"]

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        def predict(text):
            return Network().apply({"params": params, "lora": lora}, x, sigma, text, condition.reference)

        without, _ = predict(jnp.zeros_like(condition.text))
        v, attention = predict(condition.text)
        v = without + condition.guidance[..., None, None] * (v - without)
        if region is None:
            return v, None
        inside, total = (attention @ region[..., None])[..., 0], attention.sum(-1)
        return v, Masses(inside[None], total[None], attention.sum(-2)[None] if self.maps else None)  # of one block

    def encode_image(self, params, pictures):
        *batch, height, width, _ = pictures.shape
        patches = pictures.reshape(*batch, height // SIDE, SIDE, width // SIDE, SIDE, 3).swapaxes(-4, -3)
        return patches.reshape(*batch, -1, CHANNELS)

    def decode(self, params, tokens, grid):
        rows, columns = grid
        patches = tokens.reshape(*tokens.shape[:-2], rows, columns, SIDE, SIDE, 3)
        return patches.swapaxes(-4, -3).reshape(*tokens.shape[:-2], rows * SIDE, columns * SIDE, 3)

    def with_maps(self):
        return replace(self, maps=True)


def shapes() -> dict:
    token, text = jnp.zeros((1, CHANNELS)), jnp.zeros((1, WIDTH))
    return jax.eval_shape(lambda: Network().init(jax.random.key(0), token, 1.0, text, token))["params"]


class Toy:
    """A folder of the family: an `editors.model.Model`."""

    sizes = Sizes(token_pixels=SIDE, channels=CHANNELS, num_blocks=1, num_heads=1, decoder_channels=3)

    def __init__(self, path: Path):
        self.path = path
        if not (path / FILE).is_file():
            raise UserError(f"model: {path} holds no {FILE}.", "Copy the folder again.")

    @property
    def param_shapes(self):
        return shapes()

    def trained_fingerprint(self):
        return hashlib.sha256((self.path / FILE).read_bytes()).hexdigest()

    whole_fingerprint = trained_fingerprint  # all is in one file

    def open(self, options, mesh=None):
        if options.quantization != "none":
            raise UsageError(f"quantization: {options.quantization} found; none was wanted.", "Leave it out.")
        return ToyEditor(self, options, mesh)


class ToyEditor(model.Editor):
    networks = ToyNetworks()

    def __init__(self, folder, options, mesh=None):
        super().__init__(folder, replace(options, max_text_tokens=options.max_text_tokens or TEXT))
        self.mesh = mesh

    @cached_property
    def _tensors(self):
        tensors = load_file(self.model.path / FILE)
        return jax.device_put(tensors, None if self.mesh is None else replicated(self.mesh))

    @property
    def params(self):
        return unflatten_dict({name: x for name, x in self._tensors.items() if name != "bytes"}, sep="/")

    @property
    def image_params(self):
        return {}  # pictures are cut into patches

    decoder_params = image_params

    @property
    def encoding_key(self):
        return "toy", self.model.whole_fingerprint(), self.options.max_text_tokens

    def load_encoders(self):
        _ = self._tensors

    def encode(self, pixels, instructions):
        length = self.options.max_text_tokens
        texts = [text.encode()[:length] for text in instructions]
        tokens = jnp.asarray([[*text, *[0] * (length - len(text))] for text in texts])
        return {
            "latents": self.networks.encode_image(self.image_params, to_unit(pixels)),
            "bytes": self._tensors["bytes"][tokens],
            "is_byte": (tokens > 0).astype(jnp.float32),
        }


def write_toy(folder: Path, seed: int = 0) -> Path:
    """A folder of the family with random weights."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sizes = {name: x.shape for name, x in flatten_dict(shapes(), sep="/").items()} | {"bytes": (256, WIDTH)}
    save_file({name: 0.3 * rng.standard_normal(size, np.float32) for name, size in sizes.items()}, folder / FILE)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    return folder
