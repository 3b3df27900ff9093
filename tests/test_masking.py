"""Masks that are found: each method against a known edit, and what becomes of scores."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references import onnx
from skimage.filters import threshold_otsu

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import resize_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.masking import editor
from rcgrpo_jax.masking.difference import difference_method, difference_scores, otsu_threshold
from rcgrpo_jax.masking.folder import _is_whole
from rcgrpo_jax.masking.method import HALF, Finish, finish_mask, flaw
from rcgrpo_jax.masking.segmenter import NORMALISATIONS, segmenter_method


def as_jpeg(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def pictures(patch=(96, 40, 200)):
    """A textured picture, the same with a patch of another colour, and where that is."""
    source = Scenes("train", 1, size=192)[0].image
    inside = np.zeros(source.shape[:2], bool)
    inside[60:110, 40:120] = True
    return source, np.where(inside[..., None], np.uint8(patch), source), inside


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def example_of(image, target=None, instruction="Make it red."):
    return EditExample("a", image, np.ones(image.shape[:2], np.float32), instruction, target=target)


# Differences


@pytest.mark.parametrize(("quality", "least"), [(None, 0.9), (90, 0.9), (60, 0.88)])
def test_the_difference_is_where_the_target_was_painted_whatever_jpeg_adds(quality, least):
    source, target, inside = pictures()
    if quality:
        source, target = as_jpeg(source, quality), as_jpeg(target, quality)
    assert overlap(difference_scores(source, target) >= HALF, inside) > least


def test_equal_pictures_have_no_difference_and_neither_has_one_saved_once_more():
    source, _, _ = pictures()
    assert not difference_scores(source, source).any()
    assert flaw(finish_mask(difference_scores(source, as_jpeg(source, 75)), Finish()))


def test_specks_are_no_edit_and_holes_in_it_are():
    source, target, _ = pictures()
    hole = target.copy()
    hole[75:95, 60:80] = source[75:95, 60:80]
    found = difference_scores(source, hole) >= HALF
    alone = source.copy()
    alone[10:12, 150:152] = (255, 0, 0)
    assert not (difference_scores(source, alone) >= HALF).any()
    assert found[75:95, 60:80].all()


def test_soft_differences_are_one_inside_zero_afar_and_between_at_the_rim():
    source, target, _ = pictures()
    faint = target.copy()
    faint[150:180, 150:180] = np.clip(faint[150:180, 150:180].astype(int) + np.array([0, 0, 60]), 0, 255)
    scores = difference_scores(source, faint)
    assert scores[65:105, 45:115].min() > 0.9
    assert not scores[:50].any()
    assert not scores[130:].any()
    rim = scores[58:62, 60:100]
    assert ((rim > 0) & (rim < 1)).any()


def test_the_threshold_is_otsus():
    values = np.random.default_rng(0).gamma(2, 3, 5000)
    values[:700] += 25
    assert otsu_threshold(values) == pytest.approx(threshold_otsu(values), abs=0.2)


def test_a_difference_without_a_target_is_refused():
    with pytest.raises(UserError, match="a: no target image"):
        difference_method().scores(example_of(pictures()[0]))


# Segmenters


def network(path, size=(24, 32), channels=3, factor=1.0, dtype="FLOAT"):
    """An ONNX file whose output is `factor` x the first channel of its input."""
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    shape = [1, channels, *size]
    nodes = [
        helper.make_node("Slice", ["input", "starts", "ends", "axes"], ["first"]),
        helper.make_node("Mul", ["first", "factor"], ["output"]),
    ]
    constants = [
        helper.make_tensor(n, onnx.TensorProto.INT64, [1], [v]) for n, v in (("starts", 0), ("ends", 1), ("axes", 1))
    ]
    constants.append(helper.make_tensor("factor", kind, [1], [factor]))
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", kind, [1, 1, *size])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def test_a_segmenter_sees_the_picture_in_its_size_and_normalisation_and_its_map_fills_the_picture(tmp_path):
    image = np.full((48, 64, 3), 200, np.uint8)
    image[:, :32] = 140
    (mean, _, _), (deviation, _, _) = NORMALISATIONS["imagenet"]
    method = segmenter_method(network(tmp_path / "a.onnx", factor=0.5))
    scores = method.scores(example_of(image))
    red = resize_image(image, (24, 32))[..., 0] / 255
    expected = 0.5 * (red - mean) / deviation
    assert scores.shape == (48, 64)
    np.testing.assert_allclose(scores[::47, ::63], expected[::23, ::31], atol=1e-5)
    half = segmenter_method(network(tmp_path / "a.onnx", factor=0.5), "half").scores(example_of(image))
    np.testing.assert_allclose(half[0, 0], 0.5 * (140 / 255 - 0.5), atol=1e-5)
    assert method.settings != segmenter_method(network(tmp_path / "b.onnx", factor=0.4)).settings


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"channels": 4}, r"\[1, 3, height, width\] was wanted"),
        ({"size": ("h", "w")}, r"\[1, 3, height, width\] was wanted"),
        ({"dtype": "DOUBLE"}, r"tensor\(double\)"),
    ],
)
def test_a_network_of_other_inputs_is_refused(tmp_path, options, problem):
    with pytest.raises(UserError, match=problem):
        segmenter_method(network(tmp_path / "a.onnx", **options))


def test_what_is_no_network_is_refused_with_a_way_to_one(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="cannot be read as ONNX") as found:
        segmenter_method(tmp_path / "a.onnx")
    assert "u2netp.onnx" in found.value.remedy
    with pytest.raises(UserError, match="there is no such file"):
        segmenter_method(tmp_path / "b.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is not installed"):
        segmenter_method(tmp_path / "a.onnx")


def test_an_output_that_is_no_share_is_refused(tmp_path):
    method = segmenter_method(network(tmp_path / "a.onnx", factor=9.0))
    with pytest.raises(UserError, match=r"one map in \[0, 1\] was wanted"):
        method.scores(example_of(np.full((48, 64, 3), 250, np.uint8)))


# The editor


class LinearNetworks:
    """v = c - 2 sigma x: everything in closed form."""

    def source(self, condition):
        return condition["source"]

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        return params["w"] * condition["text"] * x - 2 * sigma, None


def test_the_disagreement_is_the_mean_distance_of_two_predicted_pictures():
    rng = np.random.default_rng(0)
    source, noises = rng.normal(size=(1, 6, 4)), rng.normal(size=(3, 6, 4))
    text = rng.normal(size=(2, 6, 1))
    condition = {"source": jnp.asarray(np.repeat(source, 2, 0), jnp.float32), "text": jnp.asarray(text, jnp.float32)}
    sigmas = np.array([0.9, 0.4])
    expected = np.zeros(6)
    for noise in noises:
        for sigma in sigmas:
            x = (1 - sigma) * source[0] + sigma * noise
            expected += sigma * np.linalg.norm(1.5 * (text[0] - text[1]) * x, axis=-1) / 6
    found = editor.disagreement(
        LinearNetworks(), {"w": 1.5}, condition, jnp.asarray(noises, jnp.float32), jnp.asarray(sigmas), (2, 3)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_distances_are_scaled_from_the_backgrounds_to_the_largest():
    np.testing.assert_allclose(editor.normalised(np.array([[1.0, 1, 1], [0, 2, 3]])), [[0, 0, 0], [0, 0.5, 1]])
    assert not editor.normalised(np.full((2, 2), 3.0)).any()


# Masks of scores


def test_scores_become_masks_by_the_threshold_or_as_they_are():
    scores = np.array([[0.2, 0.5, 0.8]], np.float32)
    np.testing.assert_array_equal(finish_mask(scores, Finish()), [[0, 1, 1]])
    np.testing.assert_array_equal(finish_mask(scores, Finish(0.6)), [[0, 0, 1]])
    np.testing.assert_allclose(finish_mask(scores, Finish(None)), scores, atol=0.5 / 255)


def test_masks_grow_by_squares_and_keep_the_larger_value():
    scores = np.zeros((9, 9), np.float32)
    scores[4, 4], scores[0, 8] = 1, 0.6
    grown = finish_mask(scores, Finish(None, 2))
    assert (grown == 1).sum() == 25
    assert (grown[2:7, 2:7] == 1).all()
    assert grown[1, 7] == pytest.approx(0.6)


def test_an_empty_and_a_full_mask_are_flawed():
    mask = np.zeros((4, 4), np.float32)
    assert "empty" in flaw(mask)
    assert "full" in flaw(mask + 1)
    mask[0, 0] = 1
    assert flaw(mask) is None


def test_a_line_of_the_log_counts_only_with_whole_pictures(tmp_path):
    Image.fromarray(pictures()[0]).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    (tmp_path / "empty.png").touch()
    whole = {"image": "a.png", "mask": "a.png"}
    assert _is_whole(tmp_path, whole)
    for bad in ({"image": 3}, {"mask": "empty.png"}, {"mask": "cut.png"}, {"target": "cut.png"}, {"target": "no.png"}):
        assert not _is_whole(tmp_path, whole | bad)
    assert not _is_whole(tmp_path, {})
