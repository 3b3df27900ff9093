"""The one place that assembles an editor, and the check that its largest arrays fit memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.editors.flux_kontext import Editor
from rcgrpo_jax.models.attention import AUTO, choose
from rcgrpo_jax.models.mmdit import AttentionOptions
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.weights.load import ModelFolder


def open_editor(
    folder: ModelFolder,
    mesh: Mesh,
    *,
    dtype: Any,
    max_text_tokens: int = 0,
    attention: str = AUTO,
    acd_layers: int = 1,
    acd_reference_keys: bool = False,
    **options: Any,
) -> Editor:
    """The editor of a model folder on a mesh; its networks load on first use.

    Args:
        folder: The model.
        mesh: Weights are spread over it by `parallel.sharding`.
        dtype: Of computation and parameters.
        max_text_tokens: Length that the T5 sequence is padded to; 0: the model's own.
        attention: A name of `models.attention.IMPLEMENTATIONS`; auto: the fastest of the mesh's platform.
        acd_layers: L_sel, how many of the last blocks report their attention masses.
        acd_reference_keys: Whether these count the reference image's keys.
        **options: Of `Editor`: `quantization`, `keep_text_encoders`, `remat`.

    Raises:
        UsageError: If the platform has no such attention.
    """
    implementation = choose(attention, mesh.devices.flat[0].platform, dtype)
    return Editor(
        folder,
        jnp.dtype(dtype),
        max_text_tokens,
        parameter_sharding(mesh),
        attention=AttentionOptions(implementation, acd_layers, acd_reference_keys=acd_reference_keys),
        **options,
    )


def check_fits(
    folder: ModelFolder, size: tuple[int, int], steps: int, dtype: str, count: int = 1, field: str = "--size"
) -> None:
    """Refuses pictures or solver steps of which no memory here holds the largest arrays.

    They are the decoder's last features, `[count, H, W, C]`, and the solver's states, float32 `[count, K+1, N, C]`.

    Args:
        folder: The model.
        size: (height, width) in pixels.
        steps: K.
        dtype: Of the features.
        count: Pictures at a time.
        field: That the size is from.

    Raises:
        UserError: With the size or the number of steps.
    """
    (height, width), vae = size, folder.config("vae")
    features = height * width * vae.block_out_channels[0] * jnp.dtype(dtype).itemsize
    check_memory(f"{field}: {width}x{height}", count * features, "Edit smaller pictures, or fewer at a time.")
    tokens = height * width // (2 * vae.downscale) ** 2
    states = (steps + 1) * tokens * folder.config("transformer").in_channels * 4
    check_memory(f"--steps: {steps}", count * states, "Take fewer steps: 28 are FLUX's own.")
