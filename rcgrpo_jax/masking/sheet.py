"""A picture of the first masks, to look at before anything learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.images import for_display, outline, read_image
from rcgrpo_jax.masking.method import HALF, LEVELS
from rcgrpo_jax.runs.grid import PictureRow, draw_rows

MOST, ACROSS = 16, 4  # examples; in a row


def contact_sheet(folder: Path, lines: Sequence[Mapping[str, Any]], title: str) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the first `MOST` sources with their masks outlined, where these are `HALF` or more.

    Args:
        folder: Holds the pictures.
        lines: Of its metadata.jsonl.
        title: Line above.
    """
    shown = lines[:MOST]
    rows = []
    for start in range(0, len(shown), ACROSS):
        row = shown[start : start + ACROSS]
        numbers = [f"{start + i + 1}" for i in range(len(row))]
        text = "  ".join(f"{number}: {line['instruction']}" for number, line in zip(numbers, row, strict=True))
        rows.append(PictureRow(text, [*zip(numbers, (_outlined(folder, line) for line in row), strict=True)]))
    return draw_rows(rows, title)


def _outlined(folder: Path, line: Mapping[str, Any]) -> UInt8[np.ndarray, "_ _ 3"]:
    mask = read_image(folder / line["mask"])[..., 0] >= HALF * LEVELS
    return outline(for_display(read_image(folder / line["image"])), mask)
