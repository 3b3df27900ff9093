"""The model of a run, as its options ask for it."""

from __future__ import annotations

from jax.sharding import Mesh

from rcgrpo_jax.editors.model import Editor, EditorOptions, Model
from rcgrpo_jax.options import ModelOptions


def load_editor(
    options: ModelOptions, model: Model, mesh: Mesh, acd_layers: int = 1, acd_reference_keys: bool = False
) -> Editor:
    """The model as a run uses it, on the mesh; of the attention's masses as `EditorOptions` has them."""
    shared = {f: getattr(options, f) for f in ("dtype", "max_text_tokens", "quantization", "attention", "remat")}
    return model.open(EditorOptions(**shared, acd_layers=acd_layers, acd_reference_keys=acd_reference_keys), mesh)
