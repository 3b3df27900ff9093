"""The oracle ranks edits as a person would who knows the right result, and errs only as much as it is told to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from rcgrpo_jax import rewards
from rcgrpo_jax.data.scenes.shapes import COLOURS, SHAPES, render, signed_distance
from rcgrpo_jax.data.scenes.source import Scenes, flaws
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.oracle import Oracle, oracle_scores

pytestmark = pytest.mark.usefixtures("full_optimization")
TASKS = 18
GHOSTS, SPILLS, BLURS = (0.1, 0.2, 0.4, 0.7), (0.2, 0.4, 0.6, 0.8), (0.4, 0.7, 1.2)
SUB_SCORES = ("success", "preservation", "naturalness", "artefacts")
scored = jax.jit(oracle_scores)


def candidates(scenes: Scenes, index: int) -> dict[str, np.ndarray]:
    """Edits of a task that are good and bad in known ways; for remove, `wrong ...` leaves something else there."""
    scene, example = scenes.scene(index), scenes[index]
    background = scenes.background(index)
    thing = scene.new or scene.old
    taken = {(scene.old or thing).colour, thing.colour}, {(scene.old or thing).shape, thing.shape}
    colour, shape = (
        [name for name in names if name not in used][index % 6]
        for names, used in zip((COLOURS, SHAPES), taken, strict=True)
    )
    distance = signed_distance(thing, scenes.size)
    mask = example.mask == 1
    target = Image.fromarray(example.target)
    return {
        "truth": example.target,
        "source": example.image,
        "wrong colour": render(replace(scene, new=replace(thing, colour=colour)).after, background),
        "wrong shape": render(replace(scene, new=replace(thing, shape=shape)).after, background),
        "all noise": np.random.default_rng(index).integers(0, 256, example.image.shape, np.uint8),
        **{f"ghost {s}": flaws.ghost(example.image, example.target, mask, s) for s in GHOSTS},
        **{f"spill {s}": flaws.spill(example.target, distance, thing.rgb, s) for s in SPILLS},
        **{f"blur {s}": np.asarray(target.filter(ImageFilter.GaussianBlur(s))) for s in BLURS},
    }


def batch(scenes: Scenes, tasks: int) -> tuple[list[str], tuple[np.ndarray, ...]]:
    """The candidates' names, and source, edited, mask and target as the oracle takes them."""
    examples, edits = [scenes[i] for i in range(tasks)], [candidates(scenes, i) for i in range(tasks)]
    source, target = (np.stack([getattr(e, f) for e in examples]) / np.float32(255) for f in ("image", "target"))
    edited = np.stack([list(edit.values()) for edit in edits]) / np.float32(255)
    return list(edits[0]), (source, edited, np.stack([e.mask for e in examples]), target)


@pytest.fixture(scope="module", params=["train", pytest.param("heldout", marks=pytest.mark.slow), "photo"])
def scores(request) -> dict[str, dict[str, np.ndarray]]:
    """`[sub-score][candidate]` -> one value a task."""
    names, arrays = batch(Scenes(request.param, TASKS), TASKS)
    result = scored(*arrays)
    return {key: dict(zip(names, np.asarray(value).T, strict=True)) for key, value in result.items()}


@pytest.fixture(scope="module")
def small() -> rewards.RewardInputs:
    scenes = Scenes("train", 4, 48)
    _, (source, edited, mask, target) = batch(scenes, 4)
    texts = tuple(scenes[i].instruction for i in range(4))
    return rewards.RewardInputs(source, edited[:, :6], mask, texts, targets=target)


def test_scores_lie_in_their_ranges(scores):
    assert set(scores) == {*SUB_SCORES, "overall"}
    for key, best in [*((key, 25) for key in SUB_SCORES), ("overall", 10)]:
        values = np.stack(list(scores[key].values()))
        assert values.dtype == np.float32
        assert 0 <= values.min() <= values.max() <= best + 1e-4


def test_the_right_result_is_perfect_and_no_edit_is_none(scores):
    for key in SUB_SCORES:
        np.testing.assert_allclose(scores[key]["truth"], 25, rtol=1e-5)
    np.testing.assert_allclose(scores["overall"]["truth"], 10, rtol=1e-5)
    np.testing.assert_allclose(scores["success"]["source"], 0, atol=1e-3)
    np.testing.assert_allclose(scores["overall"]["source"], 0, atol=0.1)
    for key in SUB_SCORES[1:]:  # nothing else is wrong with it
        np.testing.assert_allclose(scores[key]["source"], 25, rtol=1e-5)


def test_overall_is_editscores(scores):
    for name, overall in scores["overall"].items():
        consistency = np.minimum(scores["success"][name], scores["preservation"][name]) / 2.5
        quality = np.minimum(scores["naturalness"][name], scores["artefacts"][name]) / 2.5
        np.testing.assert_allclose(overall, np.sqrt(consistency * quality), rtol=1e-5)


@pytest.mark.parametrize("wrong", ["wrong colour", "wrong shape"])
def test_the_wrong_edit_lies_between_none_and_the_right_one(scores, wrong):
    overall = scores["overall"][wrong]
    assert (overall > scores["overall"]["source"] + 1).all()
    assert (overall < 9).all()
    assert 4 < overall.mean() < 7.5
    assert scores["naturalness"][wrong].mean() > 22  # it is wrong, not ugly


def test_a_wrong_colour_leaves_the_rest_of_the_picture_alone(scores):
    for key in ("preservation", "naturalness"):
        coloured = scores[key]["wrong colour"]
        assert np.median(coloured) > 24.9


def test_ghosts_lower_success_by_their_strength(scores):
    values = np.stack([scores["success"][name] for name in ("truth", *(f"ghost {s}" for s in GHOSTS), "source")])
    assert (np.diff(values, axis=0) < 0).all()
    for key in ("preservation", "naturalness"):  # a ghost is where the object was, and nowhere else
        np.testing.assert_allclose(scores[key]["ghost 0.4"], 25, rtol=1e-4)


@pytest.mark.parametrize("key", ["preservation", "naturalness", "overall"])
def test_spills_lower_what_is_outside_by_their_strength(scores, key):
    values = np.stack([scores[key][name] for name in ("truth", *(f"spill {s}" for s in SPILLS))])
    assert (np.diff(values, axis=0) < 0).all()
    assert (np.diff(values.mean(axis=1)) < -0.5).all()


def test_spills_hardly_touch_success(scores):
    assert scores["success"]["spill 0.8"].mean() > 18


def test_blur_lowers_every_score_mildly(scores):
    for key in (*SUB_SCORES, "overall"):
        values = np.stack([scores[key][name] for name in ("truth", *(f"blur {s}" for s in BLURS))])
        assert (np.diff(values.mean(axis=1)) < 0).all()
    assert scores["overall"]["blur 0.7"].mean() > 7.5
    assert scores["overall"]["blur 0.7"].min() > scores["overall"]["wrong colour"].mean()


def test_noise_is_no_edit(scores):
    assert (scores["overall"]["all noise"] < 2).all()


def test_a_task_is_scored_the_same_in_any_company(small):
    arrays = tuple(jnp.asarray(value) for value in (small.source, small.edited, small.mask, small.targets))
    together = scored(*arrays)
    mapped = jax.jit(jax.vmap(oracle_scores))(*(value[:, None] for value in arrays))
    alone = scored(arrays[0][2:3], arrays[1][2:3, 3:4], arrays[2][2:3], arrays[3][2:3])
    for key, values in together.items():
        np.testing.assert_allclose(values[2, 3], alone[key][0, 0], rtol=1e-4)
        np.testing.assert_allclose(mapped[key][:, 0], values, rtol=1e-4, atol=1e-4)


def test_a_broken_pixel_makes_its_candidate_nan_and_no_other(small):
    edited = small.edited.copy()
    edited[1, 2, 0, 0, 1] = np.nan  # far from the region
    edited[3, 0, 20:30, 20:30] = np.nan
    wanted = np.zeros(edited.shape[:2], bool)
    wanted[1, 2] = wanted[3, 0] = True
    for noise in (0.0, 0.1):
        values = rewards.make("oracle", noise=noise)(small._replace(edited=edited))
        np.testing.assert_array_equal(np.isnan(values), wanted)


def test_a_full_mask_leaves_nothing_to_preserve(small):
    everything = np.ones_like(small.mask)
    values = scored(small.source, small.edited, everything, small.targets)
    for key in ("preservation", "naturalness"):
        np.testing.assert_allclose(values[key], 25, rtol=1e-5)


def test_the_reward_is_a_tenth_of_the_overall_score(small):
    values = Oracle()(small)
    overall = scored(small.source, small.edited, small.mask, small.targets)["overall"]
    np.testing.assert_allclose(values, overall / 10, rtol=1e-5)
    assert values.shape == (4, 6)
    assert values.dtype == jnp.float32


def test_without_targets_there_is_nothing_to_compare_with(small):
    with pytest.raises(UserError, match="no targets") as caught:
        Oracle()(small._replace(targets=None))
    assert "scenes" in caught.value.remedy


def test_noise_depends_on_the_seed_the_pixels_and_the_words_alone(small):
    noisy = np.asarray(Oracle(noise=0.05)(small))
    np.testing.assert_array_equal(noisy, Oracle(noise=0.05)(small))
    assert (noisy != np.asarray(Oracle(noise=0.05, seed=2**32 - 1)(small))).mean() > 0.5

    turned = small._replace(edited=small.edited[:, ::-1])
    np.testing.assert_allclose(np.asarray(Oracle(noise=0.05)(turned))[:, ::-1], noisy, rtol=1e-5)

    wrong = 2  # a candidate in the middle of the range, which no clipping reaches
    clean = np.asarray(Oracle()(small))[:, wrong]
    error = noisy[:, wrong] - clean
    assert len(set(error.tolist())) == 4
    other_words = np.asarray(Oracle(noise=0.05)(small._replace(instructions=("Do it.",) * 4)))[:, wrong] - clean
    assert (np.abs(error - other_words) > 1e-4).all()


def test_noise_is_normal_of_the_stated_width():
    """400 nearly equal candidates of middling worth: their errors have mean 0 and the standard deviation asked for."""
    example = Scenes("train", 3, 32)[0]
    source, target = (picture.astype(np.float32) / 255 for picture in (example.image, example.target))
    edited = np.repeat((source + 0.5 * (target - source))[None, None], 400, axis=1)
    edited[0, :, 0, 0, 0] += np.arange(400, dtype=np.float32) * 1e-6
    inputs = rewards.RewardInputs(source[None], edited, example.mask[None], ("Do it.",), targets=target[None])
    clean, noisy = (np.asarray(Oracle(noise=noise)(inputs))[0] for noise in (0.0, 0.08))
    assert 0.3 < clean.min() <= clean.max() < 0.7
    error = noisy - clean
    assert abs(error.mean()) < 4 * 0.08 / 20
    assert error.std() == pytest.approx(0.08, rel=4 / np.sqrt(2 * 400))
    assert np.abs(error).max() > 2 * 0.08


def test_several_answers_are_averaged(small):
    answers = [np.asarray(Oracle(noise=0.3, seed=5 + i)(small)) for i in range(3)]
    np.testing.assert_allclose(Oracle(noise=0.3, seed=5, num_pass=3)(small), np.mean(answers, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(Oracle(noise=0.3, seed=5)(small), answers[0])


def test_noisy_rewards_stay_in_range(small):
    values = np.asarray(Oracle(noise=1.0)(small))
    assert values.min() == 0
    assert values.max() == 1
