"""Masks from the editor itself: where its predictions with and without the instruction differ (after DiffEdit)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import kontext_size, resize_image
from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.editors.model import Editor, EditorOptions
from rcgrpo_jax.editors.open import check_fits, check_tokens, open_model
from rcgrpo_jax.flow.matching import interpolate
from rcgrpo_jax.masking.method import Method, MethodOptions, Scores, resize_scores
from rcgrpo_jax.parallel.mesh import make_mesh

NOISES = 4  # draws that are averaged
SAME = 1e-5  # of a velocity: two rows of equal input differ by less in float32
SIGMAS = (0.95, 0.9, 0.8)  # times that are averaged, 1 at the noise: what is where is decided early


def disagreement(
    networks: Networks,
    params: dict,
    condition: Any,
    noises: Float[Array, "S N C"],
    sigmas: Float[Array, " L"],
    grid: tuple[int, int],
) -> Float[Array, " N"]:
    """How far the edit's end is from the source's, by token: the mean over noises and times of

        sigma |v(x_sigma, sigma, c) - v(x_sigma, sigma, c_0)|_2,   x_sigma = (1 - sigma) x_src + sigma eps.

    `sigma v` takes `x_sigma` to the predicted picture, so that this is the distance of two predicted pictures: the
    instruction's and that of no instruction. DiffEdit (Couairon et al. 2022) has it for noise predictions. Velocities
    that differ by less than `SAME` of their norm count as equal.

    Args:
        networks: The networks.
        params: Of the network that predicts velocities.
        condition: Two rows, with the instruction and without one; the source is the same.
        noises: S draws.
        sigmas: L times in (0, 1].
        grid: The token grid.

    Returns:
        `[N]` float32, >= 0.
    """
    source = networks.source(condition)

    def one(drawn: tuple[Array, Array]) -> Float[Array, " N"]:
        noise, sigma = drawn
        x, _ = interpolate(source, jnp.broadcast_to(noise, source.shape), jnp.broadcast_to(sigma, source.shape[:1]))
        v, _ = networks.velocity(params, {}, x, sigma, condition, grid)
        distance = jnp.linalg.norm(v[0] - v[1], axis=-1)
        return sigma * jnp.where(distance > SAME * jnp.linalg.norm(v[0], axis=-1), distance, 0)

    count = len(noises), len(sigmas)
    pairs = (jnp.repeat(noises, count[1], axis=0), jnp.tile(sigmas, count[0]))
    return jax.lax.map(one, pairs).mean(axis=0)


def editor_method(options: MethodOptions) -> Method:
    """The method `editor`: opens a model, whose networks are loaded when the first mask is made.

    Raises:
        UserError: There is no such model, or no memory here holds pictures of that size.
        UsageError: The size is not a whole number of tokens.
    """
    model, devices = open_model(options.model), jax.devices()
    if options.size is not None:
        check_fits(model, options.size, 1, options.dtype)
        check_tokens(model, options.size)
    mesh = make_mesh({"fsdp": -1}, devices)  # as for `rcgrpo edit`: one picture at a time
    asked = EditorOptions(options.dtype, options.max_text_tokens, options.quantization)
    editor = model.open(asked, mesh)
    settings = {
        "model": model.whole_fingerprint(), "size": options.size, "seed": options.seed, "guidance": options.guidance,
        "dtype": options.dtype, "quantization": options.quantization, "text_tokens": editor.options.max_text_tokens,
        "noises": NOISES, "sigmas": SIGMAS,
    }  # fmt: skip
    return Method(partial(_scores, editor=editor, options=options, mesh=mesh), settings)


def _scores(example: EditExample, editor: Editor, options: MethodOptions, mesh: Mesh) -> Scores:
    size = options.size or kontext_size(*example.image.shape[:2])
    pixels = resize_image(example.image, size)
    grid = editor.grid(*size)
    with jax.set_mesh(mesh):
        encoded = editor.encode(np.stack([pixels, pixels]), [example.instruction, ""])
        condition = editor.networks.condition(encoded, options.guidance)
        shape = editor.networks.source(condition).shape[1:]
        noises = jax.random.normal(jax.random.key(options.seed), (NOISES, *shape))
        found = _disagreement(editor.networks, editor.params, condition, noises, jnp.array(SIGMAS), grid)
    return resize_scores(normalised(np.asarray(found).reshape(grid)), example.image.shape[:2])


def normalised(distances: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Distances between their median, which is the background's, at 0 and their largest at 1; 0 if they are equal."""
    low, high = np.median(distances), distances.max()
    return ((distances - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(distances)


# Compiled by networks, as the programs of `editors.model`.
_disagreement = partial(jax.jit, static_argnums=(0, 5))(disagreement)
