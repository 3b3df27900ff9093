"""ICC profiles of version 2 written from their definition, and what they mean in sRGB, with numpy alone."""

import struct

import numpy as np

D50, D65 = np.array([0.9642, 1.0, 0.8249]), np.array([0.95047, 1.0, 1.08883])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_ADAPTED = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ D50) / (_BRADFORD @ D65)) @ _BRADFORD  # D65 -> D50

SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def srgb_decode(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def srgb_encode(x):
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


def gamma_2_2(x):
    return x ** (563 / 256)


def to_xyz(primaries) -> np.ndarray:
    """The matrix from linear RGB with a D65 white to XYZ under D50."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return _ADAPTED @ (columns * np.linalg.solve(columns, D65))


def in_srgb(pixels: np.ndarray, primaries, decode) -> np.ndarray:
    """8-bit samples of a space as 8-bit sRGB, clipped."""
    linear = decode(pixels / 255) @ to_xyz(primaries).T @ np.linalg.inv(to_xyz(SRGB)).T
    return np.rint(255 * srgb_encode(linear.clip(0, 1)))


def _fixed(*numbers) -> bytes:
    return b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)


def _curve(decode) -> bytes:
    table = np.rint(65535 * decode(np.linspace(0, 1, 4096))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()


def _text(kind: bytes) -> bytes:
    text = b"a test\0"
    if kind == b"cprt":
        return b"text\0\0\0\0" + text
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)


def _profile(space: bytes, tags: dict[bytes, bytes], device: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    tags = {b"desc": _text(b"desc"), b"cprt": _text(b"cprt"), b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"test", 0x02400000, device, space, pcs, bytes(12), b"acsp"
    )
    head = head.ljust(68, b"\0") + _fixed(*D50)
    return head.ljust(128, b"\0") + table + body


def rgb_profile(primaries, decode) -> bytes:
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz(primaries).T, strict=True)
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(decode))
    return _profile(b"RGB ", {name: b"XYZ \0\0\0\0" + _fixed(*column) for name, column in columns} | curves)


def grey_profile(decode) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _curve(decode)})


def cmyk_profile(lab) -> bytes:
    """A table of 2 x 2 x 2 x 2 corners; `lab(c, m, y, k)` is L in 0..100, a and b in -128..127 for inks of 0 or 1."""
    corners = [lab(*(i >> shift & 1 for shift in (3, 2, 1, 0))) for i in range(16)]
    grid = bytes(round(x) for lightness, a, b in corners for x in (lightness * 2.55, a + 128, b + 128))
    tables = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + tables * 4 + grid + tables * 3
    return _profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, b"prtr", b"Lab ")
