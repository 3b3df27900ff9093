"""`rcgrpo edit`: one image, one instruction, as FluxKontextPipeline would edit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.cli.paths import check_file, path_flag
from rcgrpo_jax.data.images import kontext_size, read_image, resize_image, save_image
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.editors.open import check_fits, check_tokens, open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.flow.solvers import SOLVERS, choose_solver
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.parallel.mesh import make_mesh

ABOUT = "Edits one image by an instruction. Target and reference share one size, so nothing is shifted or cropped."


def _flags(values: flags.FlagValues) -> None:
    path_flag("model", "diffusers folder, converted directory, or small-editor", values)
    define_lora(values)
    path_flag("image", "image to edit", values)
    flags.DEFINE_string("instruction", None, "what to change", values)
    path_flag("out", "file to write, PNG", values)
    flags.DEFINE_integer("seed", 0, "seed of the initial noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer("steps", 28, "solver steps", lower_bound=1, flag_values=values)
    define_solver(values)
    flags.DEFINE_float("guidance", 2.5, "guidance scale", flag_values=values)
    flags.DEFINE_string("size", None, "WIDTHxHEIGHT in pixels; nearest of Kontext's 17 sizes by default", values)
    path_flag("noise", ".npy file of packed initial noise, float32 [N_img, C], in place of --seed", values)
    flags.DEFINE_integer("text_tokens", 0, "length of the T5 sequence; 0: the model's", 0, 512, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "compute dtype", values)
    flags.DEFINE_enum("quantization", NONE, QUANTIZATIONS, "of the transformer's kernels", values)


def define_solver(values: flags.FlagValues) -> None:
    """The flag that says which solver takes the steps."""
    about = "how a step is taken: heun evaluates the model twice in all but the last, the others once"
    flags.DEFINE_enum("solver", "euler", [*SOLVERS], about, values)


def read_noise(path: str, shape: tuple[int, int]) -> np.ndarray:
    """Packed initial noise of the given shape, float32.

    Raises:
        UserError: If the file is missing, is no such array, or holds a NaN or infinity.
    """
    try:
        noise = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may claim more than memory holds
    except Exception as error:  # numpy raises many types on damaged headers
        raise UserError(f"--noise: {path} cannot be read as .npy ({error}).", "Save it with numpy.save.") from None
    if not isinstance(noise, np.ndarray):
        raise UserError(f"--noise: {path} is an archive of arrays; one was wanted.", "Save it with numpy.save.")
    if noise.shape != shape or noise.dtype != np.float32 or not np.isfinite(noise).all():
        raise UserError(
            f"--noise: {path} is {noise.dtype} {list(noise.shape)}; finite float32 {list(shape)} was wanted.",
            "Save packed latents [N_img, C] of this image size.",
        )
    return np.array(noise)


def editor_options(values: flags.FlagValues) -> dict[str, Any]:
    """What `--dtype`, `--quantization` and `--text_tokens` ask of `EditorOptions`."""
    return {"dtype": values.dtype, "quantization": values.quantization, "max_text_tokens": values.text_tokens}


def run(argv: list[str]) -> None:
    required = ("model", "image", "instruction", "out")
    values, _ = parse("edit", ABOUT, argv, _flags, required=required)
    check_file("out", Path(values.out), ".png", {"--image": values.image, "--noise": values.noise})
    choose_solver(values.solver, values.steps)
    model = open_model(values.model)
    image = read_image(values.image)
    height, width = parse_size(values.size) if values.size else kontext_size(*image.shape[:2])
    devices = open_devices()
    check_fits(model, (height, width), values.steps, values.dtype)
    check_tokens(model, (height, width))
    lora = read_lora(values, model)
    # One image makes no use of several devices but for their memory: weights are spread, activations are not.
    mesh = make_mesh({"fsdp": -1}, devices)
    editor = model.open(EditorOptions(**editor_options(values), keep_text_encoders=False), mesh)
    shape = (height * width // model.sizes.token_pixels**2, model.sizes.channels)
    noise = read_noise(values.noise, shape) if values.noise else jax.random.normal(jax.random.key(values.seed), shape)
    pixels = resize_image(image, (height, width))
    with jax.set_mesh(mesh):
        how = (values.steps, values.guidance, lora, values.solver)
        edited = editor.edit(pixels[None], [values.instruction], noise[None], *how)[0]
    save_image(values.out, edited)
    print(f"edited image: {values.out} ({width} x {height})")
