"""The mask on the token grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.method.region import token_region


def mask_with(shape, *rectangles):
    """A binary mask that is 1 in each (top, left, bottom, right), ends excluded."""
    mask = np.zeros(shape, np.float32)
    for top, left, bottom, right in rectangles:
        mask[top:bottom, left:right] = 1
    return jnp.asarray(mask)


def test_one_touched_pixel_takes_the_token_in_row_major_order():
    mask = mask_with((32, 48), (17, 31, 18, 33))  # row 1, columns 1 and 2 of a 2 x 3 grid of 16-pixel cells
    tokens = token_region(mask, (2, 3))
    assert tokens.dtype == jnp.float32
    np.testing.assert_array_equal(tokens, [0, 0, 0, 0, 1, 1])


def test_cells_need_not_be_square():
    np.testing.assert_array_equal(token_region(mask_with((8, 6), (4, 0, 5, 1)), (2, 3)), [0, 0, 0, 1, 0, 0])


def test_threshold_is_a_share_of_the_tokens_area():
    mask = mask_with((4, 8), (0, 0, 2, 4), (0, 4, 1, 8))  # half of the left token, a quarter of the right one
    np.testing.assert_array_equal(token_region(mask, (1, 2), threshold=0.5), [1, 0])
    np.testing.assert_array_equal(token_region(mask, (1, 2), threshold=0.25), [1, 1])


def test_a_threshold_that_no_token_reaches_leaves_the_fullest():
    mask = mask_with((4, 8), (0, 0, 2, 4), (0, 4, 1, 8))
    np.testing.assert_array_equal(token_region(mask, (1, 2), threshold=0.51), [1, 0])
    np.testing.assert_array_equal(token_region(jnp.zeros((4, 8)), (1, 2), threshold=0.51), [0, 0])


def test_soft_masks_stay_soft_unless_thresholded():
    mask = jnp.zeros((4, 8)).at[1, 2].set(0.25).at[3, 3].set(0.125).at[0, 7].set(0.75)
    np.testing.assert_array_equal(token_region(mask, (1, 2)), [0.25, 0.75])
    np.testing.assert_array_equal(token_region(mask, (1, 2), threshold=0.04), [0, 1])  # shares .023 and .047


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_dilation_is_a_square_of_that_radius_cut_at_the_border(radius):
    expected = mask_with((7, 9), (max(1 - radius, 0), 5 - radius, 2 + radius, 6 + radius))
    dilated = token_region(mask_with((14, 18), (2, 10, 3, 11)), (7, 9), dilation=radius)
    np.testing.assert_array_equal(dilated.reshape(7, 9), expected)


def test_dilation_keeps_the_larger_soft_value():
    np.testing.assert_array_equal(
        token_region(jnp.array([[0.25, 0, 0, 0.75]]), (1, 4), dilation=2), [0.25, 0.75, 0.75, 0.75]
    )


def test_a_grid_that_does_not_divide_the_mask_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"512 x 500 pixels .* 32 x 32 tokens"):
        token_region(jnp.zeros((512, 500)), (32, 32))


def test_jit_and_vmap_agree_with_a_loop():
    masks = np.random.default_rng(0).random((3, 8, 12), np.float32)
    for options in ({}, {"threshold": 0.5}, {"dilation": 1}):
        tokens = jax.jit(jax.vmap(lambda m, o=options: token_region(m, (4, 6), **o)))(masks)
        np.testing.assert_array_equal(tokens, [token_region(m, (4, 6), **options) for m in masks])
