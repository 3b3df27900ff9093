"""A reward of one's own by MODULE:FUNCTION: found, given its options, and tried before anything is trained."""

import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax import rewards
from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.experiments.ablation import Variant, configure
from rcgrpo_jax.options import read_options
from rcgrpo_jax.report.run_record import config_script
from rcgrpo_jax.rl.config import default_config, validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import make_rewards

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards import Reward, Unscored

def lightness(inputs, limit=0.9, power: int = 1):
    return jnp.minimum(inputs.edited.mean((2, 3, 4)) ** power, limit)

class Redness:
    needs_target = True
    def __init__(self, factor: float = 1.0):
        self.factor = factor
    def validate(self, instruction):
        if "red" not in instruction:
            raise UserError(f"{instruction!r}: not red", "Say red.")
    def __call__(self, inputs):
        assert inputs.targets.shape == inputs.source.shape
        return self.factor * np.asarray(inputs.edited)[..., 0].mean((2, 3))

def captioned(inputs):
    return jnp.full(inputs.edited.shape[:2], len(inputs.captions[0]), float)
captioned.needs_caption = True

class Unmade:
    def __init__(self, limit=0.5):
        raise OSError("no such\\nweights")

def broken(inputs):
    return inputs.no_such_field
def exchanged(inputs):
    return inputs.edited.mean((2, 3, 4)).T
def lost(inputs):
    return inputs.edited.mean((2, 3, 4)).at[1, 2].set(jnp.nan)
def listed(inputs):
    return inputs.edited.mean((2, 3, 4)).tolist()
def torched(inputs):
    import torch
    return torch.zeros(inputs.edited.shape[:2])
def complexed(inputs):
    return inputs.edited.mean((2, 3, 4)) * 1j
def failing_later(inputs):
    class Pending:
        def result(self):
            raise OSError("cut off")
    return inputs.edited.mean()
class Gone(Reward):
    incidental = ("url",)
    def __init__(self, url="http://localhost:1"):
        self.url = url
    def check(self):
        raise UserError(f"{self.url}: no server", "Start it.")
    def start(self, inputs):
        raise AssertionError("asked for scores")
def asleep(inputs):
    raise Unscored("the server sleeps")
needless = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch, request) -> str:
    """A module of the working directory, of another name for each test: `sys.modules` keeps them."""
    monkeypatch.chdir(tmp_path)
    module = f"plugin_{abs(hash(request.node.nodeid))}"
    Path(f"{module}.py").write_text(MODULE)
    return module


def make(place: str, function: str, **options) -> ConfigDict:
    config = small_run.make_config(rewards=ConfigDict({"mine": 1.0}))
    config.plugins = ConfigDict({"mine": f"{place}:{function}"})
    if options:
        config.reward_options.mine = ConfigDict(options)
    return config


def made(config: ConfigDict) -> rewards.Reward:
    validate(config, 1)
    return make_rewards(read_options(Options, config))["mine"]


def batch() -> rewards.RewardInputs:
    rng = np.random.default_rng(0)
    source, edited = rng.random((1, 8, 8, 3), np.float32), rng.random((1, 2, 8, 8, 3), np.float32)
    return rewards.RewardInputs(source, edited, np.ones((1, 8, 8), np.float32), ("Paint it red.",), source)


def test_a_function_is_a_reward_with_its_options(place):
    scores = made(make(place, "lightness", limit=0.5, power=2))(batch())
    np.testing.assert_allclose(scores, np.minimum(batch().edited.mean((2, 3, 4)) ** 2, 0.5), rtol=1e-5)
    assert not made(make(place, "lightness")).needs_target
    assert made(make(place, "captioned")).needs_caption


def test_a_class_is_a_reward_with_what_it_says_of_itself(place):
    reward = made(make(place, "Redness", factor=3))
    assert reward.needs_target
    np.testing.assert_allclose(reward(batch()), 3 * batch().edited[..., 0].mean((2, 3)), rtol=1e-5)
    with pytest.raises(UserError, match="not red"):
        reward.validate("Make it blue.")


@pytest.mark.parametrize(("options", "line"), [
    ({"limti": 0.5}, "reward_options.mine.limti: no such option; did you mean limit?"),
    ({"inputs": 0.5}, "reward_options.mine.inputs: no such option"),
    ({"power": 0.5}, "reward_options.mine.power: 0.5 found; int was wanted"),
])  # fmt: skip
def test_options_that_it_does_not_take_are_refused(place, options, line):
    with pytest.raises(UsageError) as refused:
        made(make(place, "lightness", **options))
    assert line in refused.value.problem


@pytest.mark.parametrize(("where", "problem"), [
    ("{}", "plugins.mine: '{}' found; MODULE:FUNCTION was wanted"),
    ("{}:", "MODULE:FUNCTION was wanted"),
    ("./{}.py:lightness", "MODULE:FUNCTION was wanted"),
    ("{}_not:f", "plugins.mine: {}_not cannot be imported from "),
    ("{}:lightnes", "plugins.mine: {} has no function or class lightnes"),
    ("{}:needless", "has no function or class needless"),
    ("builtins:max", "plugins.mine: builtins:max does not say what it takes"),
])  # fmt: skip
def test_a_place_where_nothing_is_is_refused(place, where, problem):
    config = make(place, "lightness")
    config.plugins.mine = where.format(place)
    with pytest.raises(UserError) as refused:
        validate(config, 1)
    assert problem.format(place) in refused.value.problem


def test_a_module_that_cannot_be_imported_is_refused(place):
    Path("damaged_module.py").write_text("import json\nraise ValueError('not today')\n")
    with pytest.raises(UserError, match=r"damaged_module cannot be imported .* \(ValueError: not today\)"):
        validate(make("damaged_module", "f"), 1)


def test_a_script_that_ends_when_it_is_imported_is_refused(place):
    Path("script_without_guard.py").write_text("import sys\nsys.exit(5)\n")
    with pytest.raises(UserError, match=r"script_without_guard cannot be imported .* \(SystemExit: 5\)"):
        validate(make("script_without_guard", "f"), 1)


@pytest.mark.parametrize("name", ["colour", "acd", "total", "my-own"])
def test_names_that_are_taken_or_none_are_refused(place, name):
    config = small_run.make_config()
    config.plugins = ConfigDict({name: f"{place}:lightness"})
    with pytest.raises(UsageError, match=rf"plugins.{name}: a name of its own"):
        validate(config, 1)


@pytest.mark.parametrize(("function", "problem"), [
    ("broken", "reward 'mine' failed: AttributeError: 'RewardInputs' object has no attribute 'no_such_field'"),
    ("exchanged", "reward 'mine': scores of shape (3, 2); (prompts, candidates) = (2, 3) was wanted"),
    ("failing_later", "reward 'mine': scores of shape ()"),
    ("lost", "reward 'mine': 1 of 6 scores are not finite"),
    ("listed", "reward 'mine': scores of type list; a NumPy or JAX array of numbers was wanted"),
    ("torched", "reward 'mine': scores of type torch.Tensor of torch.float32; a NumPy or JAX array"),
    ("complexed", "of complex64; a NumPy or JAX array of numbers was wanted"),
])  # fmt: skip
def test_what_is_wrong_with_its_scores_is_found_before_the_training(place, function, problem):
    with pytest.raises(UserError) as refused:
        made(make(place, function))
    assert refused.value.problem.startswith("on random pictures: reward 'mine'")
    assert problem in refused.value.problem


def test_a_class_that_cannot_be_made_is_named(place):
    with pytest.raises(UserError, match="reward 'mine' failed: OSError: no such weights"):
        made(make(place, "Unmade"))


def test_one_that_has_no_answer_yet_passes(place, caplog):
    with caplog.at_level(logging.WARNING):
        made(make(place, "asleep"))
    assert "reward 'mine' has no scores of random pictures: the server sleeps" in caplog.text


def test_one_without_a_weight_is_not_tried(place):
    config = make(place, "broken")
    config.rewards = ConfigDict({"colour": 1.0})
    validate(config, 1)
    assert list(make_rewards(read_options(Options, config))) == ["colour"]
    config.watch = "mine"
    with pytest.raises(UserError, match="on random pictures"):
        make_rewards(read_options(Options, config))


def test_scores_that_are_no_array_are_refused_of_every_reward():
    reward = rewards.as_reward(lambda inputs: [[0.0, 1.0]])
    with pytest.raises(UserError, match="reward 'mine': scores of type list"):
        rewards.start_all({"mine": reward}, batch()).result()
    half = rewards.as_reward(lambda inputs: jax.numpy.zeros((1, 2), "bfloat16"))
    assert rewards.start_all({"mine": half}, batch()).result().by_reward["mine"].dtype == np.float32


def test_one_that_asks_a_server_is_checked_before_it_scores(place):
    with pytest.raises(UserError, match="reward 'mine': http://localhost:1: no server"):
        made(make(place, "Gone"))


def test_its_incidental_options_may_differ_on_resume(place):
    known = rewards.known_rewards({"mine": f"{place}:Gone"})
    assert "reward_options.mine.url" in rewards.incidental_fields(known)
    assert "reward_options.vlm_digits.urls" in rewards.incidental_fields(known)


# In configurations


def test_flags_name_it_and_set_it(place, capsys, monkeypatch):
    seen = []

    def train(config, workdir):
        seen.append(config)
        return SimpleNamespace(step=config.train.num_steps), True

    monkeypatch.setattr("rcgrpo_jax.cli.train.post_train", train)
    Path("c.py").write_text("from configs.small_editor import get_config\n")
    flags = (
        f"--config.plugins.mine={place}:lightness", "--config.rewards.mine", "2",
        "--config.reward_options.mine.limit=1", "--config.reward_schedules.mine=0:1,50:0",
    )  # fmt: skip
    code, _, err = small_run.run_command(capsys, "train", "--config=c.py", "--workdir=w", *flags)
    assert (code, err) == (0, "")
    (config,) = seen
    assert config.plugins.to_dict() == {"mine": f"{place}:lightness"}
    assert (config.rewards.mine, config.reward_options.mine.limit) == (2.0, 1.0)
    assert config.reward_schedules.mine == "0:1,50:0"
    _, problem, _ = small_run.fail(
        capsys, "train", "--config=c.py", "--workdir=w", flags[0], "--config.reward_options.mine.limti=1"
    )
    assert "there is no such field. Did you mean --config.reward_options.mine.limit?" in problem
    _, problem, _ = small_run.fail(capsys, "train", "--config=c.py", "--workdir=w", "--config.plugins.mine=nowhere:f")
    assert "plugins.mine: nowhere cannot be imported" in problem


def test_a_variant_of_an_ablation_may_have_one(place):
    changes = {"plugins.mine": f"{place}:lightness", "rewards.mine": 1}
    changed = configure(default_config(), Variant("mine", changes), 0)
    assert changed.rewards.mine == 1.0
    assert changed.plugins.mine == f"{place}:lightness"


def test_a_report_gives_its_configuration_again_without_its_module(place, tmp_path):
    config = make(place, "lightness", limit=0.5)
    config.plugins.mine = "no_more.of_this:lightness"
    (tmp_path / "again.py").write_text(config_script(config.to_dict()))
    again = load_config(str(tmp_path / "again.py"), "rcgrpo_jax.rl.config")
    for name in ("plugins", "rewards", "reward_options", "reward_schedules"):
        assert again[name].to_dict() == config[name].to_dict()
