"""Which family a model folder is of, and the check that the largest arrays of an edit fit memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from rcgrpo_jax.borders import check_memory, read_object, shorten
from rcgrpo_jax.editors.flux_kontext import FluxKontext
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.weights.folder_json import ModelIndex
from rcgrpo_jax.weights.load import COPY_AGAIN, MANIFEST, find_folder

# How the class of a pipeline begins (`_class_name` in model_index.json) -> what opens its folder.
FAMILIES: dict[str, Callable[[Path], Model]] = {"Flux": FluxKontext}
CONVERTED = "Flux"  # `rcgrpo convert` knows no other, nor does a folder that names no class


def open_model(path: str | Path) -> Model:
    """The model of a folder, which may be a diffusers folder or a converted directory; no weight is read.

    Raises:
        UserError: If it is neither, of no family that is known, or damaged.
    """
    folder = find_folder(path)
    name = CONVERTED
    if not (folder / MANIFEST).is_file():
        name = str(read_object(folder / ModelIndex.file, COPY_AGAIN).get("_class_name", CONVERTED))
    known = [beginning for beginning in FAMILIES if name.startswith(beginning)]
    if not known:
        raise UserError(
            f"{folder}/{ModelIndex.file}: _class_name is {shorten(name)}; one that begins with "
            f"{' or '.join(FAMILIES)} was wanted.",
            "Give the folder of a model of such a family; CONTRIBUTING.md says how to add one.",
        )
    return FAMILIES[max(known, key=len)](folder)


def check_tokens(model: Model, size: tuple[int, int]) -> None:
    """Raises a UsageError unless `--size`, (height, width) in pixels, is whole tokens."""
    side, (height, width) = model.sizes.token_pixels, size
    if height % side or width % side:
        raise UsageError(
            f"--size: {width}x{height} found; multiples of {side} pixels were wanted.",
            f"For example --size {max(width // side, 1) * side}x{max(height // side, 1) * side}.",
        )


def check_fits(
    model: Model, size: tuple[int, int], steps: int, dtype: str, count: int = 1, field: str = "--size"
) -> None:
    """Refuses pictures or solver steps of which no memory here holds the largest arrays.

    They are the decoder's last features, `[count, H, W, C]`, and the solver's states, float32 `[count, K+1, N, C]`.

    Args:
        model: The model.
        size: (height, width) in pixels.
        steps: K.
        dtype: Of the features.
        count: Pictures at a time.
        field: That the size is from.

    Raises:
        UserError: With the size or the number of steps.
    """
    (height, width), sizes = size, model.sizes
    features = height * width * sizes.decoder_channels * jnp.dtype(dtype).itemsize
    check_memory(f"{field}: {width}x{height}", count * features, "Edit smaller pictures, or fewer at a time.")
    states = (steps + 1) * (height * width // sizes.token_pixels**2) * sizes.channels * 4
    check_memory(f"--steps: {steps}", count * states, "Take fewer steps: 28 are FLUX's own.")
