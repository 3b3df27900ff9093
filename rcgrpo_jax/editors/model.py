"""A model on disk, and its editor on a mesh: what a family gives beside its networks, for all that goes on above."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.editors.base import Networks, sample
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.flow.solvers import choose_solver
from rcgrpo_jax.models.attention import AUTO
from rcgrpo_jax.models.quantization import NONE


class Sizes(NamedTuple):
    """The sizes of a model that are checked before a weight is read."""

    token_pixels: int  # side of a token
    channels: int  # C of a token
    num_blocks: int  # that can report their attention masses
    num_heads: int  # the mesh's `tensor` axis divides them
    decoder_channels: int  # of the decoder's largest features `[H, W, channels]`
    num_double_blocks: int = 0  # the first blocks, where text and image have weights of their own
    shares_tokens: bool = False  # whether `Networks.velocity` takes a group whose candidates share tokens


@dataclass(frozen=True)
class EditorOptions:
    """How a model is opened. A family refuses what it cannot do."""

    dtype: str = "float32"  # of computation and parameters
    max_text_tokens: int = 0  # length that the text is padded to; 0: the model's own
    quantization: str = NONE  # of the trained network's kernels, a name of `models.quantization.QUANTIZATIONS`
    attention: str = AUTO  # a name of `models.attention.IMPLEMENTATIONS`; auto: the fastest of the mesh's platform
    remat: str = "none"  # a name of `models.mmdit.REMAT_POLICIES`
    acd_layers: int = 1  # L_sel, how many of the last blocks report their attention masses
    acd_reference_keys: bool = False  # whether these count the reference image's keys
    keep_text_encoders: bool = True  # whether they stay in memory after use


class Model(Protocol):
    """A model on disk. It says what can be known before a weight is read, and opens its editor."""

    path: Path

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""

    @property
    def param_shapes(self) -> dict:
        """Shapes of the parameters of the network that is trained; a LoRA adapts its kernels."""

    def trained_fingerprint(self) -> str:
        """A hash of the network that is trained. A run goes on with an equal one only."""

    def whole_fingerprint(self) -> str:
        """A hash of all that an edit depends on. Evaluations of equal ones are compared."""

    def open(self, options: EditorOptions, mesh: Mesh | None = None) -> Editor:
        """The editor on a mesh, or on the default device; its networks load on first use.

        Raises:
            UsageError: If it, or the platform, cannot do what the options ask for.
        """


class Editor(ABC):
    """A model on a mesh, its networks loaded on first use: what a pipeline is to diffusers.

    Args:
        model: The model on disk.
        options: As they are used: what they leave to the model (`max_text_tokens` of 0) is filled in.
    """

    def __init__(self, model: Model, options: EditorOptions):
        self.model, self.options = model, options

    @property
    @abstractmethod
    def networks(self) -> Networks:
        """The networks without their parameters."""

    @property
    @abstractmethod
    def params(self) -> dict:
        """The parameters of the network that is trained."""

    @property
    @abstractmethod
    def image_params(self) -> dict:
        """Those of the network between pictures and latents."""

    @property
    @abstractmethod
    def decoder_params(self) -> dict:
        """Those of them that the way to pictures takes: all that stays in memory while a LoRA is post-trained."""

    @property
    @abstractmethod
    def encoding_key(self) -> tuple[str | int, ...]:
        """What encodings depend on beside what is encoded: fingerprints, dtype, text length. A cache is named by it."""

    @abstractmethod
    def load_encoders(self) -> None:
        """Loads what `encode` uses; all processes read a converted folder at once or none."""

    @abstractmethod
    def encode(self, pixels: UInt8[np.ndarray, "P H W 3"], instructions: Sequence[str]) -> dict[str, Array]:
        """What the networks read of sources and instructions, by name, each with a leading axis P.

        A cache keeps these arrays, and `networks.condition` and `networks.text_weights` read them. The names `pixels`,
        `mask`, `target` and `instruction` are the cache's own.
        """

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height x width` pixels."""
        return self.networks.grid(height, width)

    def sigmas(self, num_steps: int, num_image_tokens: int) -> Float[np.ndarray, " K+1"]:
        """The model's schedule."""
        return self.networks.sigmas(num_steps, num_image_tokens)

    def decode(self, tokens: Float[Array, "P N C"], grid: tuple[int, int]) -> UInt8[np.ndarray, "P H W 3"]:
        """Pixels of packed latents."""
        return to_pixels(_decode(self.networks, self.decoder_params, tokens, grid))

    def edit(
        self,
        images: UInt8[np.ndarray, "P H W 3"],
        instructions: Sequence[str],
        noise: Float[Array, "P N C"],
        num_steps: int = 28,
        guidance: float = 2.5,
        lora: dict | None = None,
        solver: str = "euler",
    ) -> UInt8[np.ndarray, "P H W 3"]:
        """Edits images by deterministic integration from the given noise, as the family's pipeline in diffusers does.

        Args:
            images: Sources; sides are multiples of a token's. The edit has the same size.
            instructions: One for each image.
            noise: Packed initial noise, float32.
            num_steps: K.
            guidance: Guidance scale.
            lora: Adapter with its scale folded in (`models.lora.scale_adapter`).
            solver: A name of `flow.solvers.SOLVERS`; the pipeline's is Euler's.

        Returns:
            The edited images.
        """
        grid = self.grid(*images.shape[1:3])
        condition = self.networks.condition(self.encode(images, instructions), guidance)
        how = (grid, num_steps, solver)
        tokens = _sample(self.networks, self.params, lora or {}, jnp.asarray(noise), condition, *how)
        return self.decode(tokens, grid)


def to_unit(pixels: UInt8[np.ndarray, "*b H W 3"]) -> Float[Array, "*b H W 3"]:
    """Pixels 0..255 to the range [-1, 1] of networks."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0


def to_pixels(images: Float[Array, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """The range [-1, 1] of networks to pixels 0..255, clamped and rounded as diffusers does.

    Raises:
        UserError: There is a NaN or an infinity, which no picture shows.
    """
    finite = np.asarray(jnp.isfinite(images).all(axis=(-3, -2, -1)))
    if not finite.all():
        raise UserError(
            f"{(~finite).sum()} of {finite.size} edited images are not finite; pictures were wanted.",
            "The weights, the LoRA or its scale, or the guidance are likely too large: try without the LoRA, with "
            "guidance 2.5, or with dtype float32.",
        )
    return np.asarray(jnp.round((jnp.clip(images.astype(jnp.float32), -1, 1) / 2 + 0.5) * 255)).astype(np.uint8)


# Compiled by networks and not by editor, so that a program does not keep an editor's parameters alive.


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _sample(
    networks: Networks, params: dict, lora: dict, noise: Array, condition: Any, grid: tuple[int, int], num_steps: int,
    solver: str,
) -> Float[Array, "P N C"]:  # fmt: skip
    sigmas = networks.sigmas(num_steps, grid[0] * grid[1])
    return sample(networks, params, lora, noise, condition, sigmas, grid, choose_solver(solver, num_steps))[-1]


@partial(jax.jit, static_argnums=(0, 3))
def _decode(networks: Networks, params: dict, tokens: Float[Array, "*b N C"], grid: tuple[int, int]) -> Array:
    return networks.decode(params, tokens, grid)
