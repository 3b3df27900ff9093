"""Each form of stored masks marks the same region."""

import data_sets
import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.data.mask_forms import MASK_FORMS, decode_runs, fit_mask
from rcgrpo_jax.data.prepare.row import change_inside
from rcgrpo_jax.errors import UserError

STORED = {
    "white": data_sets.white,
    "black": data_sets.black,
    "transparent": data_sets.transparent,
    "pure-black": data_sets.painted,
}
assert {*STORED} == {*MASK_FORMS}


@pytest.mark.parametrize("form", STORED)
def test_each_form_marks_the_region(form):
    source, _ = data_sets.pictures(0)
    mask = fit_mask(Image.fromarray(STORED[form](source)), source.shape[1::-1])
    found = MASK_FORMS[form](mask, source, "mask")
    np.testing.assert_array_equal(found, data_sets.region())
    assert found.dtype == np.float32


@pytest.mark.parametrize("cell", ["2 3 9 9", "[2, 3, 9, 9]", [2, 3, 9, 9]])
def test_runs_are_pairs_of_start_and_length(cell):
    assert decode_runs(cell, (4, 3)).tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    "cell", ["", "1 2 3", "12 1", "-1 3", "a b", {"counts": 3}, [None, 1], [0.5, 2], [0, np.inf], 7]
)
def test_what_is_no_runs_is_named(cell):
    with pytest.raises(UserError, match="pairs of start and length, starts below 12"):
        decode_runs(cell, (4, 3))


def test_black_things_of_the_source_are_no_region_unless_they_touch_it():
    source, _ = data_sets.pictures(0)
    source[18:22, 2:8] = (3, 0, 5)  # apart from the region
    source[10:14, 10:12] = 0  # reaches into it
    found = MASK_FORMS["pure-black"](
        Image.fromarray(np.where(source > 16, data_sets.painted(source), 0)), source, "mask"
    )
    wanted = data_sets.region()
    wanted[10:14, 10:12] = 1
    np.testing.assert_array_equal(found, wanted)


def test_a_mask_without_transparency_is_refused_where_it_marks_the_region():
    with pytest.raises(UserError, match="a picture of mode RGB without transparency"):
        MASK_FORMS["transparent"](Image.new("RGB", (16, 16)), np.zeros((16, 16, 3), np.uint8), "mask")


@pytest.mark.parametrize(("size", "wanted"), [((48, 24), (96, 48)), ((97, 48), (96, 48)), ((48, 48), (48, 48))])
def test_masks_are_resized_to_pictures_of_their_shape(size, wanted):
    assert fit_mask(Image.new("L", size), (96, 48)).size == wanted


def test_resizing_makes_no_new_values():
    mask = Image.fromarray(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (31, 47)))
    assert {*np.unique(np.asarray(fit_mask(mask, (94, 62))))} == {0, 255}


def test_the_share_of_the_change_inside_is_that_of_changed_pixels():
    source, target = data_sets.pictures(0)
    assert change_inside(source, target, data_sets.region()) == 1
    target[0, :24] += 100  # 24 pixels outside, beside the 96 inside
    assert change_inside(source, target, data_sets.region()) == pytest.approx(96 / 120)
    assert change_inside(source, source, data_sets.region()) is None
    assert change_inside(source, None, data_sets.region()) is None
