"""What a judge gets to see: whole pictures or their region, as PNG in a data URL, within a text."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

SHORTEST = 56  # pixels of a side of a crop: vision-language models have a least size

_PLACE = re.compile(r"\{(instruction|source|edited)\}")


def data_url(picture: Float[np.ndarray, "H W 3"]) -> str:
    """A picture in [0, 1], rounded to 8 bits, as the data URL of a PNG."""
    file = io.BytesIO()
    levels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(levels).save(file, "PNG", compress_level=1)  # of a speed with the network; the pixels are the same
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def region_box(mask: Float[np.ndarray, "H W"], margin: float) -> tuple[slice, slice]:
    """Rows and columns of the region with a margin around it, within the picture.

    Args:
        mask: In [0, 1]; the region is where it is 0.5 or more.
        margin: In longer sides of the region's bounding box.

    Returns:
        Slices of at least `SHORTEST` pixels, or of all there are; the whole picture where there is no region.
    """
    inside = mask >= 0.5
    spans = [np.flatnonzero(inside.any(axis)) for axis in (1, 0)]
    if not inside.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    border = round(margin * max(np.ptp(span) + 1 for span in spans))
    return tuple(
        _widened(span[0] - border, span[-1] + 1 + border, side) for span, side in zip(spans, mask.shape, strict=True)
    )


def _widened(start: int, stop: int, side: int) -> slice:
    """The part of `start:stop` within `0:side`, moved and widened to `SHORTEST` where it is shorter."""
    start, stop = max(start, 0), min(stop, side)
    lacking = max(0, min(SHORTEST, side) - (stop - start))
    start = min(max(start - lacking // 2, 0), side - (stop - start) - lacking)
    return slice(int(start), int(stop if not lacking else start + min(SHORTEST, side)))


def content_parts(template: str, instruction: str, source: str, edited: str) -> list[dict[str, Any]]:
    """A message of text and pictures, as the chat protocol has it.

    Args:
        template: Text with the place-holders `{instruction}`, `{source}` and `{edited}`. Other braces are text.
        instruction: Put in as it is, whatever stands in it.
        source: URL of a picture.
        edited: That of the other.
    """
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_PLACE.split(template)):  # text and names by turns
        if i % 2 and piece != "instruction":
            url = {"source": source, "edited": edited}[piece]
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif text := instruction if i % 2 else piece:
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += text
            else:
                parts.append({"type": "text", "text": text})
    return parts
