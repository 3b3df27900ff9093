"""What a step explores: the noise, anchors and solver steps that `Programs.explore` draws."""

from typing import Any

import jax
import numpy as np
import pytest
import small_run


def noises(**changes) -> tuple[Any, np.ndarray]:
    trainer = small_run.make_trainer(**changes)
    programs = trainer.programs
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(trainer))
        keys = jax.random.split(jax.random.key(3), 32)
        return prompts, np.stack([programs.explore(key, prompts, 0).noise for key in keys])  # [32, P, G, N, C]


def test_regional_noise_moves_the_background_by_alpha_base_and_keeps_the_reference():
    alpha = {"explore__alpha_edit": 0.6, "explore__alpha_base": 0.1}
    prompts, noise = noises(**alpha)
    reference = noise[:, :, :1]
    explored = np.asarray(prompts.explored)
    assert set(np.unique(explored)) >= {0.0, 1.0}
    for value, strength in ((1.0, 0.6), (0.0, 0.1)):
        delta = (noise - np.sqrt(1 - strength**2) * reference)[:, :, 1:].swapaxes(2, 3)[:, explored == value]
        assert delta.std() == pytest.approx(strength, rel=0.03)
        assert abs(delta.mean()) < 0.01 * strength + 1e-3
    assert noise.std() == pytest.approx(1, rel=0.02)


def test_global_noise_perturbs_every_candidate_everywhere():
    _, noise = noises(explore__kind="global", explore__sigma=0.6)
    # Two perturbed candidates correlate as 1 - sigma^2, a perturbed one and the reference as sqrt(1 - sigma^2).
    for i in range(1, noise.shape[2]):
        for token in np.split(np.arange(noise.shape[3]), 4):
            pair = noise[:, :, [0, i]][..., token, :].swapaxes(1, 2).reshape(32, 2, -1).swapaxes(0, 1).reshape(2, -1)
            assert np.corrcoef(pair)[0, 1] == pytest.approx(1 - 0.6**2, abs=0.04)


def test_mixed_noise_perturbs_the_background_of_every_other_candidate():
    prompts, noise = noises(explore__kind="mixed", explore__alpha_base=0.01, explore__sigma=0.6)
    background = noise.swapaxes(2, 3)[:, np.asarray(prompts.explored) == 0]  # [32, tokens, G, C]
    moved = np.square(background - background[:, :, :1]).mean((0, 1, 3))
    np.testing.assert_allclose(moved[1::2], 2 - 2 * np.sqrt(1 - 0.01**2), rtol=0.1)
    np.testing.assert_allclose(moved[2::2], 2 - 2 * np.sqrt(1 - 0.6**2), rtol=0.1)


def test_dilation_grows_what_is_explored_and_not_the_region():
    plain, dilated = noises()[0], noises(explore__mask_dilation=1)[0]
    np.testing.assert_array_equal(plain.explored, plain.region)
    np.testing.assert_array_equal(dilated.region, plain.region)
    assert np.all(dilated.explored >= plain.region)
    assert np.any(dilated.explored > plain.region)


def test_anchors_and_steps_are_drawn_from_what_may_be_trained():
    trainer = small_run.make_trainer(surrogate__steps="random", surrogate__num_random_steps=2, surrogate__anchors=3)
    programs = trainer.programs
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(trainer))
        drawn = [programs.explore(jax.random.key(i), prompts, 0) for i in range(20)]
        again = programs.explore(jax.random.key(0), prompts, 0)
    jax.tree.map(np.testing.assert_array_equal, drawn[0], again)
    assert {tuple(sorted(a.tolist())) for d in drawn for a in d.anchors} == {(1, 2, 3)}
    steps = {tuple(d.steps.tolist()) for d in drawn}
    assert steps == {(a, b) for a in range(1, 5) for b in range(a + 1, 5)}


@pytest.mark.parametrize(("kind", "perturbed"), [("region", [1, 2, 3]), ("mixed", [1, 2, 3]), ("global", [0, 1, 2, 3])])
def test_anchors_are_the_candidates_that_are_not_the_reference(kind, perturbed):
    trainer = small_run.make_trainer(explore__kind=kind, surrogate__anchors=len(perturbed))
    programs = trainer.programs
    with jax.set_mesh(programs.mesh):
        exploration = programs.explore(jax.random.key(0), programs.prompts(small_run.make_batch(trainer)), 0)
    references = jax.random.normal(jax.random.split(jax.random.key(0), 4)[0], exploration.noise[:, 0].shape)
    differ = (exploration.noise != references[:, None]).any((2, 3))
    for anchors, differs in zip(np.sort(exploration.anchors), differ, strict=True):
        assert anchors.tolist() == np.flatnonzero(differs).tolist() == perturbed
