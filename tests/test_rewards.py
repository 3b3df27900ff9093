"""Rewards measure what they say: the background by PSNR and SSIM, the region by its colour; NaN stays NaN."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from ml_collections import ConfigDict
from skimage import color, data, metrics

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.measures import MeasureInputs
from rcgrpo_jax.evaluation.measures.lpips import background_lpips
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rewards import base
from rcgrpo_jax.rewards.colour import lab_from_srgb, named_colour
from rcgrpo_jax.rewards.preservation import PSNR_CAP, masked_psnr, masked_ssim
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import make_rewards
from rcgrpo_jax.weights.lpips import load_lpips


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A 64 x 96 crop of a real photograph, in [0, 1]."""
    return (data.coffee()[100:164, 200:296] / 255).astype(np.float32)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    region = np.zeros((64, 96), np.float32)
    region[20:40, 30:60] = 1
    return region


def inputs(source, edited, mask, instruction="Paint it red") -> rewards.RewardInputs:
    """One prompt, with a candidate for each picture of `edited` `[G, H, W, 3]`."""
    return rewards.RewardInputs(source[None], np.asarray(edited, np.float32)[None], mask[None], (instruction,))


# Preservation


def test_psnr_of_a_uniform_error_has_its_closed_form(mask):
    a, b = jnp.full((64, 96, 3), 0.5), jnp.full((64, 96, 3), 0.6)
    np.testing.assert_allclose(masked_psnr(a, b, mask), 20, rtol=1e-5)


def test_psnr_is_that_of_the_background_pixels_alone(photo, mask):
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 0.1, photo.shape), 0, 1).astype(np.float32)
    outside = mask == 0
    wanted = metrics.peak_signal_noise_ratio(photo[outside], noisy[outside], data_range=1)
    np.testing.assert_allclose(masked_psnr(photo, noisy, mask), wanted, rtol=1e-5)


def test_ssim_without_a_region_is_that_of_skimage(photo):
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 0.1, photo.shape), 0, 1).astype(np.float32)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wanted = metrics.structural_similarity(photo, noisy, data_range=1, channel_axis=-1, **settings)
    assert 0.2 < wanted < 0.95
    np.testing.assert_allclose(masked_ssim(photo, noisy, jnp.zeros((64, 96))), wanted, atol=1e-5)


def test_ssim_counts_exactly_the_windows_outside_the_region(photo, mask):
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 0.1, photo.shape), 0, 1).astype(np.float32)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, whole = metrics.structural_similarity(photo, noisy, data_range=1, channel_axis=-1, full=True, **settings)
    outside = np.ones((64, 96), bool)
    outside[20 - 5 : 40 + 5, 30 - 5 : 60 + 5] = False  # centres less than half a window, 5 pixels, from the region
    inner = whole[5:-5, 5:-5].mean(-1)[outside[5:-5, 5:-5]]
    np.testing.assert_allclose(masked_ssim(photo, noisy, mask), inner.mean(), atol=1e-5)


def test_changes_in_the_region_do_not_count(photo, mask):
    drift = np.clip(photo + 0.05, 0, 1)
    repainted = np.where(mask[..., None] == 1, np.float32([1, 0, 1]), drift)
    scores = np.asarray(rewards.make("preservation")(inputs(photo, [drift, repainted], mask)))
    assert scores.shape == (1, 2)
    assert scores[0, 0] == scores[0, 1] < 1


@pytest.mark.parametrize("region", ["none", "some", "all"])
def test_an_identical_picture_gets_the_maximum(photo, mask, region):
    mask = {"none": np.zeros_like(mask), "some": mask, "all": np.ones_like(mask)}[region]
    assert masked_psnr(photo, photo, mask) == PSNR_CAP
    np.testing.assert_allclose(rewards.make("preservation")(inputs(photo, [photo], mask)), [[1]], rtol=1e-6)


def test_without_background_everything_is_preserved(photo):
    everything = np.ones((64, 96), np.float32)
    np.testing.assert_allclose(rewards.make("preservation")(inputs(photo, [1 - photo], everything)), [[1]], rtol=1e-6)


def test_preservation_falls_as_the_background_drifts(photo, mask):
    noise = np.random.default_rng(0).normal(0, 1, photo.shape)
    drifts = [np.clip(photo + s * noise, 0, 1) for s in (0, 0.02, 0.05, 0.1, 0.3)]
    scores = np.asarray(rewards.make("preservation")(inputs(photo, drifts, mask)))
    assert (np.diff(scores[0]) < -0.01).all()


def test_the_psnr_cap_is_an_option(photo, mask):
    drift = np.clip(photo * 0.9, 0, 1)
    psnr, ssim = masked_psnr(photo, drift, mask), masked_ssim(photo, drift, mask)
    scores = rewards.make("preservation", cap=40.0)(inputs(photo, [drift], mask))
    np.testing.assert_allclose(scores, (psnr / 40 + ssim)[None, None] / 2, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 20), (1, 1)])
def test_ssim_of_pictures_smaller_than_its_window(photo, size):
    small = photo[: size[0], : size[1]]
    empty = jnp.zeros(size)
    np.testing.assert_allclose(masked_ssim(small, small, empty), 1, rtol=1e-6)
    assert masked_ssim(small, 1 - small, empty) < 0.9


def test_candidates_are_scored_apart(photo, mask):
    rng = np.random.default_rng(0)
    edited = np.clip(photo + rng.normal(0, 0.1, (2, 3, *photo.shape)), 0, 1).astype(np.float32)
    sources, masks = np.stack([photo, photo[::-1]]), np.stack([mask, 1 - mask])
    batch = rewards.RewardInputs(sources, edited, masks, ("make it blue", "make it red"))
    for reward in (rewards.make("preservation"), rewards.make("colour")):
        together = np.asarray(reward(batch))
        for p in range(2):
            for g in range(3):
                alone = reward(inputs(sources[p], edited[p, g : g + 1], masks[p], batch.instructions[p]))
                np.testing.assert_allclose(together[p, g], np.asarray(alone)[0, 0], rtol=1e-5)


# Colour


def test_lab_is_that_of_skimage():
    levels = np.linspace(0, 1, 9, dtype=np.float32)
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    np.testing.assert_allclose(lab_from_srgb(rgb), color.rgb2lab(rgb), atol=1e-3)


@pytest.mark.parametrize(("instruction", "colour"), [
    ("Paint the cup red", "red"),
    ("turn the ball into a blue cube.", "blue"),
    ("Make it LIGHT GREEN!", "lightgreen"),
    ("make it light-green", "lightgreen"),
    ("make it lightgreen", "lightgreen"),
    ("a pale violet red sofa", "palevioletred"),
    ("turn the red ball blue", "blue"),
    ("pink, orange, red", "red"),
    ("colour it orange red", "orangered"),
    ("把杯子 red", "red"),
    ("the tired reddish bluebird", None),
    ("remove the dog", None),
    ("", None),
])  # fmt: skip
def test_the_colour_an_instruction_names(instruction, colour):
    assert named_colour(instruction) == colour


def test_an_instruction_without_a_colour_is_refused():
    reward = rewards.make("colour")
    reward.validate("Paint it navy")
    with pytest.raises(UserError, match="'remove the dog': no colour is named") as caught:
        reward.validate("remove the dog")
    assert "CSS colour" in caught.value.remedy


@pytest.mark.parametrize(("name", "rgb"), [("red", (1, 0, 0)), ("dark blue", (0, 0, 139 / 255)), ("white", (1, 1, 1))])
def test_blending_the_region_to_the_colour_raises_the_score_to_1(photo, mask, name, rgb):
    blends = [photo + t * mask[..., None] * (np.float32(rgb) - photo) for t in np.linspace(0, 1, 9)]
    scores = np.asarray(rewards.make("colour")(inputs(photo, blends, mask, f"Paint it {name}")))[0]
    assert scores.dtype == np.float32
    assert 0 < scores[0] < 0.5
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(scores[-1], 1, atol=1e-4)


def test_colour_does_not_see_the_outside(photo, mask):
    outside_red = np.where(mask[..., None] == 0, np.float32([1, 0, 0]), photo)
    scores = np.asarray(rewards.make("colour")(inputs(photo, [photo, outside_red], mask)))
    assert scores[0, 0] == scores[0, 1]


def test_colour_score_of_a_flat_region_has_its_closed_form(photo, mask):
    flat = np.broadcast_to(np.float32([0.5, 0.5, 0.5]), photo.shape)
    grey, red = color.rgb2lab([0.5, 0.5, 0.5]), color.rgb2lab([1.0, 0, 0])
    distance = np.linalg.norm((grey - red) * [0.25, 1, 1])
    scores = rewards.make("colour", scale=50.0, lightness=0.25)(inputs(photo, [flat], mask))
    np.testing.assert_allclose(scores, [[np.exp(-distance / 50)]], rtol=1e-4)


# Change


def test_a_picture_that_is_left_as_it_was_has_changed_by_nothing(photo, mask):
    outside = np.where(mask[..., None] == 0, 1 - photo, photo)
    scores = np.asarray(rewards.make("change")(inputs(photo, [photo, outside], mask)))
    np.testing.assert_array_equal(scores, [[0, 0]])


def test_change_grows_with_the_difference_and_stays_below_1(photo, mask):
    blends = [photo + t * mask[..., None] * (np.float32([1, 0, 1]) - photo) for t in (0, 0.02, 0.1, 0.3, 1)]
    scores = np.asarray(rewards.make("change")(inputs(photo, blends, mask)))[0]
    assert (np.diff(scores) > 0).all()
    assert scores[1] < 0.1  # hardly seen
    assert 0.9 < scores[-1] <= 1


def test_change_of_a_flat_region_has_its_closed_form(mask):
    grey, lighter = np.full((2, 64, 96, 3), 0.5, np.float32) + np.float32([0, 0.05]).reshape(2, 1, 1, 1)
    difference = np.linalg.norm(color.rgb2lab(grey[0, 0]) - color.rgb2lab(lighter[0, 0]), axis=-1)
    scores = rewards.make("change", scale=5.0)(inputs(grey, [lighter], mask))
    np.testing.assert_allclose(scores, [[1 - np.exp(-((difference / 5) ** 2))]], rtol=1e-4)


# LPIPS


def test_lpips_is_minus_the_measure_of_the_background(photo, mask):
    noise = np.random.default_rng(0).normal(0, 1, photo.shape).astype(np.float32)
    drifts = [np.clip(photo + s * noise, 0, 1) for s in (0.05, 0.2)]
    repainted = np.where(mask[..., None] == 1, np.float32([1, 0, 1]), photo)
    batch = inputs(photo, [photo, repainted, *drifts], mask)
    scores = np.asarray(rewards.make("lpips")(batch))
    np.testing.assert_allclose(scores[0, :2], 0, atol=1e-6)
    measured = [background_lpips(MeasureInputs(photo[None], x[None], mask[None]), load_lpips())[0] for x in drifts]
    np.testing.assert_allclose(scores[0, 2:], -np.array(measured), rtol=1e-4)
    assert scores[0, 3] < scores[0, 2] < -0.01


def test_lpips_without_its_weights_or_of_small_pictures_is_refused(photo, mask, monkeypatch):
    small = rewards.RewardInputs(photo[None, :30], photo[None, None, :30], mask[None, :30], ("",))
    with pytest.raises(UserError, match="96 x 30 pixels; sides of 31 or more were wanted"):
        rewards.make("lpips")(small)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="reward 'lpips': its weights are not installed"):
        rewards.make("lpips")


# Registry and scoring


def test_unknown_rewards_and_options_name_the_nearest():
    with pytest.raises(UsageError, match=r"'color' found; one of .*oracle, preservation, .* was wanted") as caught:
        rewards.make("color")
    assert caught.value.remedy == "Did you mean 'colour'?"
    with pytest.raises(UsageError, match="'scal'; the options scale, lightness were wanted"):
        rewards.make("colour", scal=3)


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(base, "_FACTORIES", {})
    rewards.register("mine")(Fixed)
    assert rewards.make("mine", scores=3).function.scores == 3
    with pytest.raises(ValueError, match="twice"):
        rewards.register("mine")(Fixed)


def score(by_name, *parts):
    """Scores of the parts, all of which are started first."""
    return rewards.take_all([rewards.start_all(by_name, part) for part in parts])


class Fixed:
    """Returns the given scores, or raises the given error."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, inputs):
        if isinstance(self.scores, BaseException):
            raise self.scores
        return self.scores


def test_nan_passes_through(photo, mask):
    broken = photo.copy()
    broken[30, 45] = np.nan  # in the region
    batch = inputs(photo, [photo, broken, photo], mask)
    by_name = {
        "fixed": rewards.as_reward(Fixed(np.array([[np.nan, 2.0, 3.0]]))),
        "p": rewards.make("preservation"),
        "c": rewards.make("colour"),
    }
    scores, failures = score(by_name, batch)
    assert failures == {}
    assert {name: np.isnan(value).tolist() for name, value in scores.items()} == {
        "fixed": [[True, True, False]], "p": [[False, True, False]], "c": [[False, True, False]],
    }  # fmt: skip
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in scores.values())


@pytest.mark.parametrize(("scores", "problem", "remedy"), [
    (np.zeros((2, 1)), r"reward 'mine': scores of shape \(2, 1\); .* = \(1, 2\) was wanted", "one score"),
    (KeyError("x"), "reward 'mine' failed: KeyError: 'x'", "--debug"),
    (SystemExit(3), "reward 'mine' failed: SystemExit: 3", "--debug"),
    (UserError("the server is down.", "Start it."), r"reward 'mine': the server is down\.", "Start it."),
])  # fmt: skip
def test_a_failing_reward_is_named(photo, mask, scores, problem, remedy):
    with pytest.raises(UserError, match=problem) as caught:
        score({"mine": rewards.as_reward(Fixed(scores))}, inputs(photo, [photo, photo], mask))
    assert remedy in caught.value.remedy


def test_a_function_is_a_reward_with_what_it_says_of_itself():
    plain = rewards.as_reward(lambda inputs: inputs)
    assert not plain.needs_target
    plain.validate("anything")
    assert rewards.make("oracle").needs_target
    with pytest.raises(UserError, match="no colour is named"):
        rewards.make("colour").validate("remove the dog")
    assert rewards.as_reward(plain) is plain


# Rewards that ask a server


class Judge(rewards.Reward):
    """A toy of a server: it scores each candidate by its mean, in a thread, once `gate` is open.

    Args:
        down: Calls that fail as wholes: of the first, the second, ...
        at: Where a call fails, "start" or "result".
        lost: Indices (p, g) of candidates without an answer.
        gate: Waited for by every answer.
    """

    def __init__(self, down=(), at="result", lost=(), gate=None):
        self.down, self.at, self.lost, self.gate, self.calls = down, at, lost, gate, 0
        self.pool = ThreadPoolExecutor(4)

    def start(self, inputs):
        self.calls += 1
        if self.calls in self.down and self.at == "start":
            raise rewards.Unscored(f"call {self.calls} was refused")
        return self.pool.submit(self.ask, np.asarray(inputs.edited), self.calls)

    def ask(self, edited, call):
        if self.gate is not None:
            assert self.gate.wait(60)
        if call in self.down:
            raise rewards.Unscored(f"call {call} was cut off")
        scores = edited.mean((2, 3, 4))
        for index in self.lost:
            scores[index] = np.nan
        return scores


def test_a_server_is_a_reward_by_its_name(monkeypatch):
    monkeypatch.setattr(base, "_FACTORIES", {**base._FACTORIES})
    rewards.register("judge")(Judge)
    config = small_run.make_config(rewards=ConfigDict({"judge": 1.0}))
    config.reward_options.judge = ConfigDict({"at": "start"})
    validate(config, 1)
    made = make_rewards(read_options(Options, config))
    assert [(name, type(reward), reward.at) for name, reward in made.items()] == [("judge", Judge, "start")]
    assert not made["judge"].needs_target
    made["judge"].validate("anything")
    config.reward_options.judge = ConfigDict({"at": 3})
    with pytest.raises(UsageError, match=r"reward_options\.judge\.at: 3 found; str was wanted"):
        validate(config, 1)


def flat(*levels):
    """One prompt with a candidate of each level."""
    edited = np.broadcast_to(np.float32(levels)[:, None, None, None], (len(levels), 4, 4, 3))
    return inputs(edited[0], edited, np.ones((4, 4), np.float32))


def test_all_parts_of_all_rewards_are_started_before_a_server_answers():
    gate, order = threading.Event(), []

    def local(batch):
        order.append(judge.calls)  # a local reward, which may hold the host, comes after the server's
        if judge.calls == other.calls == 2:
            gate.set()  # an answer that was waited for any earlier would never come
        return batch.edited.mean((2, 3, 4))

    judge, other = Judge(gate=gate), Judge(gate=gate)
    by_name = {"local": rewards.as_reward(local), "judge": judge, "other": other}
    scores, failures = score(by_name, flat(0.25, 0.5), flat(0.75, 1.0))
    assert order == [1, 2]
    assert failures == {}
    assert list(scores) == ["local", "judge", "other"]
    for found in scores.values():
        np.testing.assert_array_equal(found, [[0.25, 0.5, 0.75, 1.0]])


def test_a_candidate_without_an_answer_leaves_the_others_theirs():
    scores, failures = score({"judge": Judge(lost=[(0, 1)])}, flat(0.25, 0.5), flat(0.75, 1.0))
    np.testing.assert_array_equal(scores["judge"], [[0.25, np.nan, 0.75, np.nan]])
    assert failures == {}


@pytest.mark.parametrize(("at", "cause"), [("start", "call 2 was refused"), ("result", "call 2 was cut off")])
def test_a_call_that_fails_costs_its_part_alone(at, cause):
    by_name = {"judge": Judge(down=(2, 3), at=at), "other": Judge()}
    scores, failures = score(by_name, flat(0.25), flat(0.5), flat(0.75), flat(1.0))
    np.testing.assert_array_equal(scores["judge"], np.float32([[0.25, np.nan, np.nan, 1.0]]))
    np.testing.assert_array_equal(scores["other"], np.float32([[0.25, 0.5, 0.75, 1.0]]))
    assert failures == {"judge": cause}


def test_another_error_of_a_server_ends_the_run_by_name():
    judge = Judge()
    judge.ask = lambda edited, call: {}["score"]  # an answer in another form
    with pytest.raises(UserError, match="reward 'judge' failed: KeyError: 'score'"):
        score({"judge": judge}, flat(0.5))
