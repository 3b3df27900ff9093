"""Files of evaluations that are damaged or hold other types are refused in words, and no NaN becomes a picture."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax import borders
from rcgrpo_jax.editors.model import to_pixels
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.runs.grid import candidate_pixels

SETTINGS = {
    "steps": 2, "guidance": 2.5, "seed": 7, "size": [8, 8], "acd_layers": 2, "text_tokens": 16, "dtype": "float32",
    "quantization": "none", "model": "abc",
}  # fmt: skip
DESCRIBED = {"names": ["a", "b"], "settings": SETTINGS, "origin": {"lora": "def"}}
ARRAYS = {"images": np.zeros((2, 8, 8, 3), np.uint8), "measures/psnr": np.float32([20, np.nan])}


def write(file, described=DESCRIBED, **arrays) -> None:
    text = described if isinstance(described, str) else json.dumps(described)
    kept = {name: x for name, x in (ARRAYS | arrays).items() if x is not None}
    np.savez(file, described=np.array(text), **kept)


def test_a_value_that_could_not_be_measured_is_kept(tmp_path):
    write(tmp_path / "a.npz")
    read = Evaluation.load(tmp_path / "a.npz")
    assert read.settings == {"solver": "euler"} | SETTINGS  # what evaluations were made with that do not say so
    np.testing.assert_array_equal(read.measures["psnr"], np.float32([20, np.nan]))


def changed(**changes) -> dict:
    return DESCRIBED | {"settings": SETTINGS | changes}


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        ("null", "the whole: None found"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
        ([DESCRIBED], "the whole"),
        ({"names": ["a", "b"]}, "settings"),
        (DESCRIBED | {"names": "ab"}, "names: 'ab' found"),
        (DESCRIBED | {"names": ["a", 2]}, "names.1: 2 found"),
        (DESCRIBED | {"settings": []}, "settings: "),
        (DESCRIBED | {"origin": {"lora": ["def"]}}, "origin.lora: "),
        (DESCRIBED | {"origin": None}, "origin: None found"),
        (changed(steps="2"), "settings.steps: '2' found"),
        (changed(steps=True), "settings.steps: True found"),
        (changed(size=[8]), "settings.size.1"),
        (changed(size=8.0), "settings.size: 8.0 found"),
        (changed(guidance=float("nan")), "settings.guidance: nan found"),
        (changed(dtype="float8"), "settings.dtype: 'float8' found"),
        (changed(model=None), "settings.model: None found"),
        (changed(solver="hein"), "settings.solver: 'hein' found"),
    ],
)
def test_what_is_described_has_its_types(tmp_path, described, problem):
    write(tmp_path / "a.npz", described)
    with pytest.raises(UserError, match="not an evaluation") as error:
        Evaluation.load(tmp_path / "a.npz")
    assert problem in error.value.problem


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": None},
        {"images": np.zeros((3, 8, 8, 3), np.uint8)},
        {"images": np.zeros((2, 8, 8, 3), np.float32)},
        {"images": np.zeros((2, 3), np.uint8)},
        {"images": np.array("text")},
        {"measures/psnr": np.array(["20", "21"])},
        {"measures/psnr": np.float32([20])},
        {"measures/psnr": np.float32([20, np.inf])},
        {"measures/psnr": np.array([{}, {}], object)},
    ],
)
def test_arrays_have_their_types(tmp_path, arrays):
    write(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match="not an evaluation"):
        Evaluation.load(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\x01\x00\x02\x00{\n"])
def test_other_files_are_no_evaluations(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="not an evaluation"):
        Evaluation.load(tmp_path / "a.npz")


def test_any_damage_is_told_in_words(tmp_path):
    file, rng = tmp_path / "a.npz", np.random.default_rng(0)
    write(file)
    whole, refused = np.frombuffer(file.read_bytes(), np.uint8), 0
    for _ in range(200):
        damaged = whole.copy()
        damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4, np.uint8)
        file.write_bytes(damaged.tobytes()[: rng.integers(1, 2 * len(damaged))])
        try:
            Evaluation.load(file)
        except UserError:
            refused += 1
    assert refused > 100


def test_arrays_that_no_memory_holds_are_not_read(tmp_path, monkeypatch):
    write(tmp_path / "a.npz")
    monkeypatch.setattr(borders, "memory_bytes", lambda: 100)
    with pytest.raises(UserError, match=r"a.npz takes .* GiB at least"):
        Evaluation.load(tmp_path / "a.npz")


# Pictures

IMAGES = np.zeros((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_no_picture(value):
    images = IMAGES.copy()
    images[1, 2, 3, 0] = value
    with pytest.raises(UserError, match="1 of 2 edited images are not finite"):
        to_pixels(jnp.asarray(images))
    assert (to_pixels(jnp.asarray(IMAGES)) == 128).all()


def test_a_candidate_that_is_not_finite_is_marked_and_the_others_are_drawn():
    images = IMAGES + 0.5
    images[1, 2, 3, 0] = np.nan
    pixels = candidate_pixels(images)
    assert (pixels[0] == 128).all()
    assert (pixels[1] == (255, 0, 255)).all()
    assert candidate_pixels(np.full((1, 1, 3), 1.5)).max() == 255
