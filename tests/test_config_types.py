"""A value of a configuration is of its field's type and finite, also where a file replaces a whole group."""

import math

import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from test_config import make, problems

from rcgrpo_jax.rl.config import default_config

FIELDS = flatten_dict(default_config().to_dict(), sep=".")
WRONG = {  # type of the default -> values of other types
    int: (True, 4.5, 8.0, "4", None, [4], math.nan),
    float: (True, "0.5", None, [0.5], math.nan, math.inf, -math.inf),
    bool: (1, 0.0, "yes", None),
    str: (1, True, None, ["full"]),
    tuple: (512, "512", None, (512.0, 512), (True, 512), (10**6, 10**6)),
}


def replaced(field: str, value) -> ConfigDict:
    """A configuration in which a group is replaced, which keeps no type of its fields."""
    *groups, name = field.split(".")
    config = make()
    group = config
    for part in groups[:-1]:
        group = group[part]
    if groups:
        group[groups[-1]] = ConfigDict(group[groups[-1]].to_dict() | {name: value})
    else:
        with config.ignore_type():
            config[name] = value
    return config


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_of_another_type_is_refused_by_name(field):
    for value in WRONG[type(FIELDS[field])]:
        (line,) = problems(replaced(field, value))
        assert line.startswith(f"{field}: {value!r}"), line
        assert line.endswith((" wanted", " at most"))


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("rollout.num_steps", 4.5, "rollout.num_steps: 4.5 found; a whole number, 1 to 10000, was wanted"),
        ("rollout.group_size", 8.0, "rollout.group_size: 8.0 found; a whole number, 2 to 1048576, was wanted"),
        ("train.save_every", 2.0, "train.save_every: 2.0 found; a whole number, 1 or more, was wanted"),
        ("acd.reference_keys", "no", "acd.reference_keys: 'no' found; True or False was wanted"),
        ("data.cache", None, "data.cache: None found; text was wanted"),
        ("optimizer.max_grad_norm", math.inf, "optimizer.max_grad_norm: inf found; 1e-09 to 1e+09 was wanted"),
        ("rewards.colour", True, "rewards.colour: True found; a number from -1e+09 to 1e+09 was wanted"),
        ("reward_options.oracle.noise", -0.1, "reward_options.oracle.noise: -0.1 found; 0 to 1e+09 was wanted"),
        ("reward_options.colour.scale", 0, "reward_options.colour.scale: 0 found; 1e-06 to 1e+09 was wanted"),
        ("reward_options.preservation.cap", -1.0,
         "reward_options.preservation.cap: -1.0 found; 1e-06 to 1e+09 was wanted"),
        ("reward_options.oracle.seed", -1,
         "reward_options.oracle.seed: -1 found; a whole number, 0 to 4294967295, was wanted"),
        ("lora.rank", 99999999, "lora.rank: 99999999 found; a whole number, 1 to 65536, was wanted"),
        ("rollout.prompts", 10**9, "rollout.prompts: 1000000000 found; a whole number, 1 to 1048576, was wanted"),
    ],
)  # fmt: skip
def test_the_message_says_what_was_wanted(field, value, line):
    assert problems(replaced(field, value)) == [line]


@pytest.mark.parametrize("value", [1, 2**40])
def test_whole_numbers_are_numbers_and_long_runs_may_be_long(value):
    assert problems(replaced("train.num_steps", value)) == []
    assert problems(replaced("lora.alpha", 1)) == []
    assert problems(replaced("data.size", [64, 64])) == []  # as JSON has a tuple


def test_a_misspelt_reward_is_refused_whatever_its_weight():
    weights = {"preservation": 1.0, "color": 0.0}
    assert problems(make(rewards=ConfigDict(weights))) == ["rewards.color: no such reward; did you mean colour?"]


@pytest.mark.parametrize("group", ["rewards", "reward_options"])
@pytest.mark.parametrize("value", [None, 1.0, "colour"])
def test_a_group_that_is_none_is_refused(group, value):
    config = make()
    with config.ignore_type():
        config[group] = value
    assert problems(config) == [f"{group}: {value!r} found; a group of fields was wanted"]
