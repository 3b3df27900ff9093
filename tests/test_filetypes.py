"""A file is called what its bytes say, whatever it is named."""

import gzip
import json
import pickle
import struct
import tarfile
import zipfile

import pytest
from PIL import Image

from rcgrpo_jax import filetypes

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 23802\n"
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
EXAMPLE = b"\n\x02\n\x00"


def write_zip(path, member):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"a")


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "000000.png")


WRITTEN = {
    "a Git LFS pointer": lambda path: path.write_text(LFS),
    "a git-annex pointer": lambda path: path.write_text("/annex/objects/SHA256E-s31390--f50d7ac4.png\n"),
    "a PNG picture": lambda path: Image.new("L", (2, 2)).save(path, "PNG"),
    "a JPEG picture": lambda path: Image.new("L", (2, 2)).save(path, "JPEG"),
    "a WebP picture": lambda path: Image.new("L", (2, 2)).save(path, "WEBP"),
    "a TIFF picture": lambda path: Image.new("L", (2, 2)).save(path, "TIFF"),
    "a GIF picture": lambda path: Image.new("L", (2, 2)).save(path, "GIF"),
    "a HEIC picture": lambda path: path.write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"),
    "a Parquet file": lambda path: path.write_bytes(b"PAR1" + bytes(range(160, 256)) + b"PAR1"),
    "an Arrow file": lambda path: path.write_bytes(b"ARROW1\0\0" + bytes(16)),
    "an Arrow stream": lambda path: path.write_bytes(b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16)),
    "an ArrayRecord file": lambda path: path.write_bytes(bytes.fromhex("83af70d10d884a3f") + bytes(64)),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(16)),
    "a TFRecord file": lambda path: path.write_bytes(struct.pack("<QI", len(EXAMPLE), 7) + EXAMPLE + b"crc."),
    "a NumPy array (.npy)": lambda path: path.write_bytes(b"\x93NUMPY\x01\0v\0{'descr'"),
    "a NumPy archive (.npz)": lambda path: write_zip(path, "mask.npy"),
    "a zip archive": lambda path: write_zip(path, "a.png"),
    "a PyTorch checkpoint, which is a pickle": lambda path: write_zip(path, "a/data.pkl"),
    "a Python pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "a tar archive": write_tar,
    "a gzip file": lambda path: path.write_bytes(gzip.compress(b"a")),
    "a safetensors file": lambda path: path.write_bytes(struct.pack("<Q", len(HEADER)) + HEADER + bytes(4)),
    "a GGUF file": lambda path: path.write_bytes(b"GGUF\x03\0\0\0"),
    "an HTML page": lambda path: path.write_text("\n<!DOCTYPE html>\n<html><body>404</body></html>"),
    "an XML document": lambda path: path.write_text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    "an empty file": lambda path: path.touch(),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_is_called_what_it_is(tmp_path, kind):
    WRITTEN[kind](path := tmp_path / "whatever.bin")
    assert filetypes.describe(path) == kind


def test_text_and_noise_and_what_is_no_file_have_no_name(tmp_path):
    for content in (b'{"image": "a.png"}\n', b"Make it red.", b"a,b\n1,2\n", bytes(range(255, 0, -1))):
        (tmp_path / "a").write_bytes(content)
        assert filetypes.describe(tmp_path / "a") is None
    assert filetypes.describe(tmp_path) is filetypes.describe(tmp_path / "none") is None
