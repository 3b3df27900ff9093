"""The ways of finding masks, by name. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from rcgrpo_jax.masking.difference import difference_method
from rcgrpo_jax.masking.editor import editor_method
from rcgrpo_jax.masking.method import Method, MethodOptions
from rcgrpo_jax.masking.segmenter import segmenter_method

METHODS: dict[str, Callable[[MethodOptions], Method]] = {
    "difference": lambda options: difference_method(),
    "segment": lambda options: segmenter_method(options.segmenter, options.normalisation),
    "editor": editor_method,
}
