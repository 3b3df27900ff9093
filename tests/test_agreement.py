"""benchmarks.agreement: the share of the signal in a gradient, from independent batches."""

import numpy as np
import pytest

from benchmarks import agreement


def draw(signal: np.ndarray, share: float, count: int, seed: int) -> np.ndarray:
    """`count` gradients of squared length near 1, `share` of which is along the unit vector `signal`."""
    noise = np.random.default_rng(seed).standard_normal((count, len(signal))) / np.sqrt(len(signal))
    return np.sqrt(share) * signal + np.sqrt(1 - share) * noise


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_the_share_of_the_signal_is_found_within_its_error(share):
    signal = np.eye(4000)[0]
    found = agreement.agreement(*2 * [draw(signal, share, 30, 1)])
    assert abs(found.mean - share) <= 3 * found.error
    assert found.error < 0.01


def test_the_error_is_that_of_repetitions():
    """The jackknife's error against the spread of the mean over 60 repetitions of eight batches; never too small."""
    signal = np.eye(500)[0]
    found = [agreement.agreement(x, x) for x in (draw(signal, 0.1, 8, seed) for seed in range(60))]
    assert 1 < np.mean([x.error for x in found]) / np.std([x.mean for x in found]) < 1.6


def test_rewards_that_oppose_each_other_have_a_negative_one_and_share_no_batch():
    signal = np.eye(500)[0]
    a = draw(signal, 0.3, 10, 1)
    shared = draw(-signal, 0.3, 10, 2)
    found = agreement.agreement(a, shared + 10 * a)  # the noise of a batch is in both
    assert agreement.agreement(a, shared).mean == pytest.approx(-0.3, abs=0.05)
    assert found.mean == pytest.approx(0.3, abs=0.05)  # that of a's signal, far from the 1.0 of i = j


@pytest.mark.slow
def test_measures_each_reward_and_each_pair(capsys):
    small = "data.path=scenes:train:6 rollout.prompts=2 rollout.group_size=4 rollout.num_steps=2 surrogate.anchors=2"
    agreement.main(["--batches", "3", "--variant", f"some name: {small} rewards.preservation=0.5"])
    lines = [line.removeprefix("some name").strip() for line in capsys.readouterr().out.splitlines()[1:]]
    rewards = ["total", "oracle", "preservation", "acd"]
    pairs = ["oracle x preservation", "oracle x acd", "preservation x acd"]
    assert [line.split("  ")[0] for line in lines] == rewards + pairs
    for line in lines:
        cosine, error = float(line.split()[-3]), float(line.split()[-1])
        assert -1 < cosine < 1
        assert error > 0


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--batches", "2"], "2 found"),
        (["--variant", "x"], "x"),
        (["--variant", "x: rollout.prompts=0"], "rollout.prompts"),
    ],
)
def test_says_what_is_wrong(capsys, argv, problem):
    with pytest.raises(SystemExit, match="2"):
        agreement.main(argv)
    assert problem in capsys.readouterr().err
