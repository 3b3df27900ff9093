"""The main job from end to end: photographs in, a LoRA out, and diffusers makes the same picture with it."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from rcgrpo_jax.cli import demo
from rcgrpo_jax.cli.main import main
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.images import read_image, resize_image
from rcgrpo_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A demo of two steps."""
    path = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(path), "--steps", "2"]) == 0
    return path


def test_leaves_what_it_promises(out):
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert [line["step"] for line in read_metrics(out / "run" / "metrics.jsonl")] == [1, 2]
    assert list((out / "run" / "images").glob("*.png"))
    examples = EditFolder(out / "photographs")
    assert len(list((out / "edits").glob("*_lora.png"))) == len(examples) >= 8


def test_says_where_everything_is(out, capsys):
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0  # resumes: nothing left to train
    printed = capsys.readouterr().out
    for path in ("lora/pytorch_lora_weights.safetensors", "run/metrics.jsonl", "run/images", "edits"):
        assert str(out / path) in printed


def test_diffusers_makes_the_same_edit_with_the_exported_lora(out):
    example = EditFolder(out / "photographs")[0]
    size = (128, 128)
    ours = read_image(out / "edits" / f"{example.name}_lora.png").astype(np.float32)
    base = read_image(out / "edits" / f"{example.name}_base.png").astype(np.float32)
    noise = np.array(jax.random.normal(jax.random.key(0), (1, 64, 64)))
    pipe = FluxKontextPipeline.from_pretrained(out / "kontext-small", dtype=torch.float32)
    pipe.load_lora_weights(out / "lora")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=Image.fromarray(resize_image(example.image, size)),
        prompt=example.instruction,
        latents=torch.from_numpy(noise),
        height=size[0],
        width=size[1],
        num_inference_steps=demo.EDIT_STEPS,
        guidance_scale=demo.GUIDANCE,
        max_sequence_length=64,
        max_area=size[0] * size[1],
        _auto_resize=False,
        output_type="np",
    ).images[0]
    theirs = np.round(theirs * 255).astype(np.float32)
    assert psnr(ours, theirs) >= 50
    assert psnr(base, theirs) < psnr(ours, theirs)  # the LoRA did something, and it is in both


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a - b).mean(), 1e-6)))
