"""Where the text looks: the attention that each token of the edited picture receives, and how much of it in the region.

Training needs two sums of this map (`method.concentration.masses`); people want to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from rcgrpo_jax.data.images import for_display, outline
from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.flow import rollout
from rcgrpo_jax.flow.solvers import choose_solver
from rcgrpo_jax.method import concentration, region

COLOURS = matplotlib.colormaps["viridis"]  # perceptually uniform, in order without colours too
_OPACITY = 0.6  # of the map over the picture


class AttentionMaps(NamedTuple):
    """The attention of some rollouts."""

    maps: Float[np.ndarray, "P N_img"]  # a(u), mean over steps and selected layers; sums to N_txt
    acd: Float[np.ndarray, " P"]  # R_acd
    edited: UInt8[np.ndarray, "P H W 3"]  # the edits that the rollouts end in

    def relative(self) -> Float[np.ndarray, "P N_img"]:
        """The maps in units of what each token would receive if attention were spread evenly."""
        return self.maps / self.maps.mean(axis=-1, keepdims=True)


def attention_maps(
    editor: Editor,
    images: UInt8[np.ndarray, "P H W 3"],
    instructions: Sequence[str],
    masks: Float[np.ndarray, "P H W"],
    noise: Float[Array, "P N C"],
    num_steps: int = 28,
    guidance: float = 2.5,
    lora: dict | None = None,
    solver: str = "euler",
) -> AttentionMaps:
    """Edits as `Editor.edit` does, and keeps a(u) = sum_v A(v, u) of every step and selected layer (Eq. 16).

    All text tokens count and the target's keys alone, the layers are the last `acd_layers` of the editor's
    options. Because each a(u) of a step and layer sums to N_txt, R_acd (Eq. 18) is the density (Eq. 17) of
    the mean map.

    Args:
        editor: The model.
        images: Sources.
        instructions: One for each image.
        masks: Edit regions in pixels, in [0, 1].
        noise: Packed initial noise, float32.
        num_steps: K.
        guidance: Guidance scale.
        lora: Adapter with its scale folded in; None is the base.
        solver: A name of `flow.solvers.SOLVERS`.

    Returns:
        Maps, R_acd and edits.
    """
    grid = editor.grid(*images.shape[1:3])
    condition = editor.networks.condition(editor.encode(images, instructions), guidance)
    regions = jax.vmap(partial(region.token_region, grid=grid))(jnp.asarray(masks))
    tokens, maps = _latents_and_maps(
        editor.networks.with_maps(), editor.params, lora or {}, jnp.asarray(noise), condition, regions,
        grid, num_steps, solver,
    )  # fmt: skip
    acd = jax.vmap(concentration.density)(maps, regions)
    return AttentionMaps(np.asarray(maps), np.asarray(acd), editor.decode(tokens, grid))


@partial(jax.jit, static_argnums=(0, 6, 7, 8))
def _latents_and_maps(
    networks: Networks, params: dict, lora: dict, noise: Array, condition: Any, regions: Array,
    grid: tuple[int, int], num_steps: int, solver: str,
) -> tuple[Float[Array, "P N C"], Float[Array, "P N_img"]]:  # fmt: skip
    """The last states of the rollouts, and their mean maps."""

    def velocity_and_maps(x: Array, sigma: Array) -> tuple[Array, Array]:
        v, masses = networks.velocity(params, lora, x, sigma, condition, grid, regions)
        return v, masses.map.mean(0)

    sigmas = networks.sigmas(num_steps, grid[0] * grid[1])
    states, maps = rollout.integrate_with_aux(velocity_and_maps, noise, sigmas, choose_solver(solver, num_steps))
    return states[-1], maps.mean(0)


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    relative: Float[np.ndarray, " N_img"],
    grid: tuple[int, int],
    mask: Float[np.ndarray, "H W"],
    top: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """Lays a map over a picture in grey, with the region outlined; enlarged for display.

    Args:
        image: The picture.
        relative: The map, in units of even attention.
        grid: Its rows and columns of tokens.
        mask: Edit region in pixels.
        top: What the brightest colour stands for, and all above; 0 is the darkest.
    """
    picture = for_display(image)
    cells = Image.fromarray(np.float32(relative / top).reshape(grid))
    levels = np.asarray(cells.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))
    grey = picture @ np.float32([0.299, 0.587, 0.114])
    blend = _OPACITY * 255 * COLOURS(levels.clip(0, 1))[..., :3] + (1 - _OPACITY) * grey[..., None]
    return outline(np.round(blend).astype(np.uint8), mask)


def colour_scale() -> UInt8[np.ndarray, "1 256 3"]:
    """The colours from 0 to `top`, as a picture."""
    return np.round(255 * COLOURS(np.arange(256))[None, :, :3]).astype(np.uint8)
