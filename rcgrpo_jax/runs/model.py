"""The model of a run, as its options ask for it."""

from __future__ import annotations

from jax.sharding import Mesh

from rcgrpo_jax.editors.flux_kontext import Editor
from rcgrpo_jax.editors.open import open_editor
from rcgrpo_jax.options import ModelOptions
from rcgrpo_jax.weights.load import ModelFolder


def load_editor(
    model: ModelOptions, folder: ModelFolder, mesh: Mesh, acd_layers: int = 1, acd_reference_keys: bool = False
) -> Editor:
    """The model as a run uses it, on the mesh; of the attention's masses as `open_editor` has them."""
    return open_editor(
        folder, mesh, dtype=model.dtype, max_text_tokens=model.max_text_tokens, quantization=model.quantization,
        attention=model.attention, remat=model.remat, acd_layers=acd_layers, acd_reference_keys=acd_reference_keys,
    )  # fmt: skip
