"""The libraries that tests compare with, each loaded when a test first uses it: most need none of them."""

import importlib
from typing import Any


class Reference:
    """A module by its name."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch, diffusers, transformers, peft, onnx = map(Reference, ("torch", "diffusers", "transformers", "peft", "onnx"))
transformer_flux = Reference("diffusers.models.transformers.transformer_flux")
