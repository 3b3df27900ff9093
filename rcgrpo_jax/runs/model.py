"""The model of a run, as its configuration asks for it."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rcgrpo_jax.editors.flux_kontext import Editor
from rcgrpo_jax.editors.open import open_editor
from rcgrpo_jax.weights.load import ModelFolder


def load_editor(config: ConfigDict, folder: ModelFolder, mesh: Mesh) -> Editor:
    """The model as a run uses it, on the mesh; `acd` is not in the configuration of supervised training."""
    acd = {f"acd_{field}": config.acd[field] for field in ("layers", "reference_keys")} if "acd" in config else {}
    fields = ("dtype", "max_text_tokens", "quantization", "attention", "remat")
    return open_editor(folder, mesh, **{field: config.model[field] for field in fields}, **acd)
