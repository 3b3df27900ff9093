"""The kind of a file by its first bytes, for messages about files of the wrong kind."""

from __future__ import annotations

import re
from pathlib import Path

LFS_POINTER = "a Git LFS pointer"
LFS_REMEDY = "Run `git lfs install` and `git lfs pull` in its repository, or download the file itself."

_HEAD = 4096  # bytes that are looked at

# (offset, magic bytes, what the file is). The first row that fits counts.
_MAGIC = (
    (0, b"version https://git-lfs.github.com/spec/", LFS_POINTER),
    (0, b"/annex/objects/", "a git-annex pointer"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyp", "an MP4 video"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "an ArrayRecord file"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (16, b"\xde\xc0\xef\xbe", "an LMDB database"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (0, b"GGUF", "a GGUF file"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ\0", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
)


def describe(path: str | Path) -> str | None:
    """Names the kind of a file by its content, whatever its suffix: `"a Git LFS pointer"`, `"a Parquet file"`.

    Args:
        path: A file.

    Returns:
        The kind with its article, to be put into a sentence; None where it is not known or the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
    except OSError:
        return None
    return _describe(head, size)


def _describe(head: bytes, size: int) -> str | None:
    """The kind of a file of `size` bytes that begins with `head`."""
    if not size:
        return "an empty file"
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    if head.startswith(b"RIFF") and head.startswith(b"WEBP", 8):
        return "a WebP picture"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(head)
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a Python pickle"
    if re.match(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html)", head, re.IGNORECASE | re.DOTALL):
        return "an HTML page"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(\?xml|svg)", head, re.IGNORECASE):
        return "an XML document"
    return _records(head, size)


def _zip(head: bytes) -> str:
    """The kind of a zip file by the name of its first member, which follows 30 bytes of header."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return "a NumPy archive (.npz)"
    if name.endswith((b"/data.pkl", b"/.format_version", b"/.data/serialization_id")):
        return "a PyTorch checkpoint, which is a pickle"
    return "a zip archive"


def _records(head: bytes, size: int) -> str | None:
    """Kinds without magic bytes: they begin with the length of what follows, and then with a known byte."""
    length = int.from_bytes(head[:8], "little")
    if 8 + length <= size and head[8:9] == b"{":
        return "a safetensors file"
    if 16 + length <= size and length and head[12:13] == b"\n":  # a protobuf whose first field is the features
        return "a TFRecord file"
    if head.startswith(b"\xff\xff\xff\xff") and 8 + int.from_bytes(head[4:8], "little") <= size:
        return "an Arrow stream"
    return None
