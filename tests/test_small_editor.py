"""The editor that ships with the package is a Kontext model to diffusers, and one that edits its scenes."""

import jax
import numpy as np
import pytest
from PIL import Image
from references import diffusers, torch

from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions, to_pixels, to_unit
from rcgrpo_jax.evaluation.evaluate import evaluate
from rcgrpo_jax.weights.load import SMALL_EDITOR

SIDE, STEPS = 128, 8
MEGABYTES = 24


@pytest.fixture(scope="module")
def editor() -> FluxKontextEditor:
    return FluxKontextEditor(FluxKontext("small-editor"), EditorOptions(attention="xla"))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("heldout", 32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the first axis, dB of 8 bits."""
    errors = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-6))))


def test_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in SMALL_EDITOR.rglob("*") if file.is_file()) <= MEGABYTES * 1e6


def test_pads_text_as_it_was_trained(editor):
    assert editor.options.max_text_tokens == 24


@pytest.mark.slow
def test_autoencoder_keeps_held_out_scenes(editor, scenes):
    images = np.stack([scenes[i].image for i in range(32)])
    decode = jax.jit(lambda params, x: editor.vae.apply({"params": params}, x))
    assert psnr(images, to_pixels(decode(editor.image_params, to_unit(images)))) >= 30


def test_diffusers_makes_the_same_edit(editor, scenes):
    example = scenes[2]
    noise = np.array(jax.random.normal(jax.random.key(0), (1, (SIDE // 16) ** 2, 64)))
    ours = editor.edit(example.image[None], [example.instruction], noise, STEPS)
    pipe = diffusers.FluxKontextPipeline.from_pretrained(SMALL_EDITOR, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=Image.fromarray(example.image), prompt=example.instruction, latents=torch.from_numpy(noise),
        height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=2.5,
        max_sequence_length=editor.options.max_text_tokens, max_area=SIDE * SIDE, _auto_resize=False, output_type="np",
    ).images  # fmt: skip
    assert psnr(ours, np.round(theirs * 255)) >= 55


@pytest.mark.slow
def test_edits_scenes_of_objects_it_never_saw(editor, scenes):
    """It does what it is asked, not perfectly, and keeps the background; a picture left alone has a success of 0."""
    found = evaluate(editor, scenes, range(30), num_steps=STEPS, batch=30)
    success = found.measures["success"]
    for kind, low, high in (("add", 0.12, 0.6), ("remove", 0.5, 0.95), ("replace", 0.3, 0.8)):
        assert low < np.mean([x for x, other in zip(success, found.kinds, strict=True) if other == kind]) < high
    assert found.measures["caption"].mean() > 0.2
    assert 24 < found.measures["psnr"].mean() < 30
