"""What stands in a cell of a table, as a picture or a text."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.data.images import open_image
from rcgrpo_jax.data.paths import Finder
from rcgrpo_jax.errors import UserError

_LARGEST = 2**28  # bytes of the file of a picture
_LONGEST_PATH = 1024  # characters; a longer text is a picture in Base64


class Unusable(Exception):
    """A row that no example can be made of.

    Args:
        reason: What it is counted under: the same words for all rows of a kind.
        detail: What was found in this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_content(cell: Any, field: str, folder: Path, find: Finder) -> bytes | None:
    """The content of the picture's file that a cell holds or names; None where there is nothing in it.

    Args:
        cell: The content; a hub's `{"bytes": ..., "path": ...}`; a text with a path, a data URL or Base64.
        field: What the picture is, for messages: `image`, `mask` or `target`.
        folder: That a path is relative to, and must not leave.
        find: Finds a path whatever its normal form of Unicode.

    Raises:
        Unusable: It cannot be had.
    """
    if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if _is_nothing(cell) or (isinstance(cell, (str, bytes)) and not cell.strip()):
        return None
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise Unusable(f"the {field} is no picture", f"{shorten(cell)} found")
    if cell.startswith("data:") or len(cell) > _LONGEST_PATH:
        try:
            return base64.b64decode(cell.partition("base64,")[2] if cell.startswith("data:") else cell, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Unusable(f"the {field} cannot be read", f"no Base64 ({error})") from None
    return _file(cell, field, folder, find)


def decode(content: bytes, field: str) -> Image.Image:
    """The picture in the content of a file (`images.open_image`).

    Raises:
        Unusable: It is no picture, damaged, or claims to be huge.
    """
    try:
        return open_image(io.BytesIO(content), field)
    except UserError as error:
        raise Unusable(f"the {field} cannot be read", error.problem) from None


def _file(name: str, field: str, folder: Path, find: Finder) -> bytes:
    """The content of a file by its path in the folder.

    The path is judged by its words: links that lie in the folder are followed, as the hub's own cache is made of them.
    """
    if re.match("[a-z][a-z0-9+]*://", name, re.IGNORECASE):
        raise Unusable(f"the {field} is not on this machine", shorten(name))
    inside = os.path.normpath(name)
    if "\0" in name or os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
        raise Unusable(f"the path of the {field} leaves the folder", shorten(name))
    try:
        path = find(folder / inside)
        if not path.is_file():
            raise Unusable(f"the file of the {field} is missing", shorten(name))
        if (size := path.stat().st_size) > _LARGEST:
            raise Unusable(f"the {field} cannot be read", f"{shorten(name)} has {size:,} bytes")
        return path.read_bytes()
    except (OSError, UserError) as error:
        found = error.strerror if isinstance(error, OSError) else error.problem
        raise Unusable(f"the {field} cannot be read", f"{shorten(name)}: {found}") from None


def _is_nothing(cell: Any) -> bool:
    """Whether a cell holds no value: None, or NaN, as pandas writes what is missing."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def read_text(cell: Any, field: str) -> str:
    """A cell as text, without blanks at its ends; empty where there is nothing in it. An id may be `true` or `false`.

    Raises:
        Unusable: It is no text.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Unusable(f"the {field} is no text", f"not UTF-8 ({error.reason})") from None
    if _is_nothing(cell):
        return ""
    if isinstance(cell, bool) and field == "id":
        return str(cell).lower()
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)) or cell in (math.inf, -math.inf):
        raise Unusable(f"the {field} is no text", f"{shorten(cell)} found")
    return str(cell).strip()
