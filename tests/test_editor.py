"""The editor makes the pictures that diffusers' FluxKontextPipeline makes from the same noise."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from references import diffusers, torch
from skimage.data import astronaut

from rcgrpo_jax.data.images import resize_image
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions, to_pixels, to_unit
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, scale_adapter
from rcgrpo_jax.weights.convert import convert
from rcgrpo_jax.weights.lora import load_lora, save_lora

INSTRUCTIONS = ["Make the suit bright red, please", "a cat"]
STEPS, GUIDANCE = 4, 2.5
LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def editor(folder) -> FluxKontextEditor:
    return FluxKontextEditor(FluxKontext(folder), EditorOptions(max_text_tokens=64, attention="xla"))


@pytest.fixture(scope="module")
def pipeline(folder) -> diffusers.FluxKontextPipeline:
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def lora(tmp_path_factory, editor) -> Path:
    """An exported adapter with a `B` that is nowhere 0."""
    rng = np.random.default_rng(2)
    adapter = flatten_dict(init_adapter(jax.random.key(0), editor.params, LORA))
    adapter = {p: 0.1 * rng.standard_normal(x.shape, np.float32) if p[-1] == "B" else x for p, x in adapter.items()}
    return save_lora(tmp_path_factory.mktemp("lora"), unflatten_dict(adapter), LORA, editor.params, dtype="float32")


def sources(height: int, width: int) -> np.ndarray:
    """Two photographs of a size."""
    photograph = astronaut()
    return np.stack([resize_image(crop, (height, width)) for crop in (photograph, photograph[100:300, 50:400])])


def noise_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, height * width // 256, 64), np.float32)


def ours(editor: FluxKontextEditor, height: int, width: int, lora: Path | None = None, **options) -> np.ndarray:
    if lora is not None:
        adapter, config = load_lora(lora, editor.params)
        options["lora"] = scale_adapter(adapter, config.scale)
    options = {"num_steps": STEPS, "guidance": GUIDANCE} | options
    return editor.edit(sources(height, width), INSTRUCTIONS, noise_of(height, width), **options)


def theirs(pipeline: diffusers.FluxKontextPipeline, height: int, width: int, max_text_tokens: int = 64) -> np.ndarray:
    images = pipeline(
        image=[Image.fromarray(image) for image in sources(height, width)],
        prompt=INSTRUCTIONS,
        latents=torch.from_numpy(noise_of(height, width)),
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=max_text_tokens,
        max_area=height * width,
        _auto_resize=False,
    ).images
    return np.stack([np.asarray(image) for image in images])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; equal images have that of half a grey level in a single sample."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64))
    return float(10 * np.log10(255**2 / max(error.mean(), 0.25 / error.size)))


@pytest.mark.parametrize(
    ("height", "width"),
    [(96, 160), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((128, 128), (176, 96)))],
)
def test_an_edit_is_that_of_diffusers(editor, pipeline, height, width):
    edited = ours(editor, height, width)
    assert edited.shape == (2, height, width, 3)
    assert edited.dtype == np.uint8
    assert edited.std() > 10  # a picture that tells
    assert psnr(edited, theirs(pipeline, height, width)) > 70


def test_an_edit_with_a_lora_is_that_of_diffusers(editor, pipeline, lora):
    pipeline.load_lora_weights(lora)
    try:
        expected = theirs(pipeline, 96, 160)
    finally:
        pipeline.unload_lora_weights()
    assert psnr(ours(editor, 96, 160, lora), expected) > 70
    assert psnr(ours(editor, 96, 160), expected) < 40


@pytest.mark.slow
def test_an_edit_with_flux_text_length_is_that_of_diffusers(monkeypatch, folder, editor, pipeline):
    longest = FluxKontextEditor(FluxKontext(folder), EditorOptions()).options
    assert longest.max_text_tokens == 512
    monkeypatch.setattr(editor, "options", longest)
    edited = ours(editor, 96, 160)
    assert psnr(edited, theirs(pipeline, 96, 160, max_text_tokens=512)) > 70


def test_instructions_guidance_and_noise_change_the_edit(editor):
    edited = ours(editor, 96, 160)
    assert psnr(ours(editor, 96, 160, guidance=4.0), edited) < 50
    other = editor.edit(sources(96, 160), ["a dog", "a cat"], noise_of(96, 160), STEPS, GUIDANCE)
    assert psnr(other[0], edited[0]) < 50
    np.testing.assert_array_equal(other[1], edited[1])  # one image of a batch knows nothing of the other
    np.testing.assert_array_equal(ours(editor, 96, 160), edited)


@pytest.mark.slow
def test_a_converted_directory_makes_the_same_picture_bit_for_bit(tmp_path, folder, editor):
    convert(str(folder), tmp_path / "converted")
    converted = FluxKontextEditor(FluxKontext(tmp_path / "converted"), editor.options)
    np.testing.assert_array_equal(ours(converted, 96, 160), ours(editor, 96, 160))


def test_pixels_survive_the_range_of_the_vae():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(to_pixels(to_unit(levels)), levels)
    assert to_pixels(np.array([[[-3.0, 0.0, 3.0]]])).tolist() == [[[0, 128, 255]]]


def test_sizes_that_do_not_divide_into_tokens_are_refused(editor):
    with pytest.raises(ValueError, match="100 x 128 pixels does not divide into tokens of 16 x 16"):
        ours(editor, 100, 128)


def test_the_schedule_is_the_folders(editor):
    sigmas = editor.sigmas(4, 1024)
    warp = np.exp(0.630)
    np.testing.assert_allclose(sigmas, [1, warp / (warp + 1 / 3), warp / (warp + 1), warp / (warp + 3), 0], rtol=1e-6)
