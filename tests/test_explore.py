"""Neighbourhoods of the initial noise keep its law, and move only what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.method.explore import (
    mixed_noise,
    neighbour_noise,
    perturbation_map,
    region_decoupled_noise,
    sample_anchors,
)

MASK = jnp.array([1.0, 0.0, 0.5, 0.0])
EDIT, BASE = 0.6, 0.1


@functools.cache
def groups(explore):
    """20 000 references [.., N, C] from N(0, I) and the groups [.., G, N, C] around them."""
    references = np.random.default_rng(1).normal(size=(20_000, 4, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 20_000)
    return references, np.asarray(jax.jit(jax.vmap(explore))(keys, references))


def region(key, reference):
    return region_decoupled_noise(key, reference, MASK, 3, EDIT, BASE)


def neighbour(key, reference):
    return neighbour_noise(key, reference, 3, EDIT)


def test_perturbation_map_mixes_the_two_strengths():
    np.testing.assert_allclose(perturbation_map(MASK, EDIT, BASE), [0.6, 0.1, 0.35, 0.1], rtol=1e-6)


@pytest.mark.parametrize(("explore", "alphas"), [(region, [0.6, 0.1, 0.35, 0.1]), (neighbour, [0.6] * 4)])
def test_candidates_are_standard_normal_and_correlate_with_the_reference_as_the_formula_says(explore, alphas):
    references, candidates = groups(explore)
    flat = candidates.reshape(len(candidates), 3, -1)  # [draws, G, N * C]
    for candidate in np.swapaxes(flat, 0, 1):
        np.testing.assert_allclose(candidate.mean(0), 0, atol=0.03)
        np.testing.assert_allclose(np.cov(candidate.T), np.eye(8), atol=0.04)
        np.testing.assert_allclose((candidate**4).mean(0), 3, atol=0.3)  # a mixture of widths would exceed 3
    correlation = (candidates[:, 1:] * references[:, None]).mean((0, 1, 3))
    np.testing.assert_allclose(correlation, np.sqrt(1 - np.square(alphas)), atol=0.02)
    among = (candidates[:, 1] * candidates[:, 2]).mean((0, 2))  # the deltas are independent: only eps* is shared
    np.testing.assert_allclose(among, 1 - np.square(alphas), atol=0.02)


def test_the_inside_moves_by_alpha_edit_and_the_background_by_alpha_base():
    mask = (np.arange(512) < 128).astype(np.float32)
    reference = np.random.default_rng(3).normal(size=(512, 64)).astype(np.float32)
    group = np.asarray(region_decoupled_noise(jax.random.key(4), reference, mask, 5, 0.3, 0.01))
    squares = np.square(group[1:] - reference).mean(-1)
    rms_inside, rms_outside = np.sqrt(squares[:, :128].mean(1)), np.sqrt(squares[:, 128:].mean(1))
    np.testing.assert_allclose(rms_inside, np.sqrt(2 - 2 * np.sqrt(1 - 0.3**2)), rtol=0.03)
    np.testing.assert_allclose(rms_outside, np.sqrt(2 - 2 * np.sqrt(1 - 0.01**2)), rtol=0.03)


def test_a_mixed_group_moves_every_other_candidate_by_region_and_the_rest_everywhere():
    reference = np.random.default_rng(3).normal(size=(4, 4096)).astype(np.float32)
    group = np.asarray(mixed_noise(jax.random.key(4), reference, MASK, 6, EDIT, BASE, 0.3))
    np.testing.assert_array_equal(group[0], reference)
    correlation = (group * reference).mean(-1) / np.square(reference).mean(-1)  # [G, N]
    by_region, everywhere = np.sqrt(1 - np.square([0.6, 0.1, 0.35, 0.1])), np.full(4, np.sqrt(1 - 0.3**2))
    for i in range(1, 6):
        np.testing.assert_allclose(correlation[i], by_region if i % 2 else everywhere, atol=0.05)
    np.testing.assert_allclose(np.square(group).mean(-1), 1, atol=0.1)
    np.testing.assert_array_equal(
        group[1], region_decoupled_noise(jax.random.key(4), reference, MASK, 6, EDIT, BASE)[1]
    )


def test_the_first_candidate_is_the_reference_bit_for_bit_with_rdp_and_perturbed_with_eq_6():
    references, by_region = groups(region)
    np.testing.assert_array_equal(by_region[:, 0], references)
    assert (by_region[:, 1:] != references[:, None]).all()
    _, by_neighbour = groups(neighbour)
    assert (by_neighbour != references[:, None]).all()


def test_without_perturbation_every_candidate_is_the_reference():
    group = region_decoupled_noise(jax.random.key(6), jnp.ones((4, 2)), MASK, 3, 0.0, 0.0)
    np.testing.assert_array_equal(group, np.ones((3, 4, 2)))


def test_the_key_alone_decides_the_group():
    one, same, other = (np.asarray(region(jax.random.key(seed), jnp.ones((4, 2)))) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert (one[1:] != other[1:]).all()


def test_anchors_are_distinct_perturbed_and_uniform():
    keys = jax.random.split(jax.random.key(9), 9_000)
    anchors = np.asarray(jax.jit(jax.vmap(lambda key: sample_anchors(key, 7, 2)))(keys))
    assert anchors.shape == (9_000, 2)
    assert anchors.dtype == np.int32
    pairs, counts = np.unique(anchors, axis=0, return_counts=True)
    ordered_pairs = [[a, b] for a in range(1, 7) for b in range(1, 7) if a != b]  # never 0, never twice
    np.testing.assert_array_equal(pairs, ordered_pairs)
    np.testing.assert_allclose(counts / 9_000, 1 / 30, atol=0.01)


@pytest.mark.parametrize("first", [0, 1])
def test_all_perturbed_candidates_can_be_anchors_and_no_more(first):
    perturbed = [0, 1, 2, 3, 4][first:]
    np.testing.assert_array_equal(np.sort(sample_anchors(jax.random.key(0), 5, len(perturbed), first)), perturbed)
    for count in (len(perturbed) + 1, 0):
        with pytest.raises(ValueError, match=f"{count} anchors of a group of 5: from 1 to {len(perturbed)} can"):
            sample_anchors(jax.random.key(0), 5, count, first)


def test_where_all_are_perturbed_any_is_an_anchor_as_often():
    keys = jax.random.split(jax.random.key(9), 9_000)
    anchors = np.asarray(jax.jit(jax.vmap(lambda key: sample_anchors(key, 4, 2, first=0)))(keys))
    assert (anchors[:, 0] != anchors[:, 1]).all()
    np.testing.assert_allclose(np.bincount(anchors.ravel(), minlength=4) / anchors.size, 1 / 4, atol=0.01)


@pytest.mark.parametrize("explore", [region, neighbour])
def test_jit_and_vmap_agree_with_one_group_at_a_time(explore):
    references, mapped = groups(explore)
    alone = explore(jax.random.split(jax.random.key(2), 20_000)[7], references[7])
    np.testing.assert_allclose(mapped[7], alone, rtol=1e-6, atol=1e-6)
