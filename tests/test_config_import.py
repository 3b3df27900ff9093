"""A configuration file may build on those beside it and on the package's, and leaves nothing behind."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.report.run_record import config_script
from rcgrpo_jax.rl import config as rl_config
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.sft import config as sft_config

DEFAULTS = "rcgrpo_jax.rl.config"
MINE = "from common_settings import base\n\ndef get_config():\n    return base()\n"
THEIRS = "from configs.small_editor import get_config\n"


def write_base(folder: Path, seed: int = 0, name: str = "common_settings.py") -> Path:
    """A folder with a configuration that imports its neighbour; the file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(
        "from rcgrpo_jax.rl.config import default_config\n\ndef base():\n    c = default_config()\n"
        f"    c.seed = {seed}\n    return c\n"
    )
    (folder / "mine.py").write_text(MINE)
    return folder / "mine.py"


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    path, modules = list(sys.path), set(sys.modules)
    yield
    assert sys.path == path
    left = {name.partition(".")[0] for name in sys.modules.keys() - modules}
    assert not left & {"common_settings", "configs", "theirs", "mine"}


@pytest.mark.parametrize("name", ["common_settings.py", "common_settings/__init__.py"])
def test_a_file_imports_its_neighbour(tmp_path, name):
    assert load_config(write_base(tmp_path, 3, name), DEFAULTS).seed == 3


def test_a_function_imports_its_neighbour(tmp_path):
    file = write_base(tmp_path, 3)
    file.write_text("def get_config():\n    from common_settings import base\n    return base()\n")
    assert load_config(file, DEFAULTS).seed == 3


def test_neighbours_of_one_name_in_two_folders_are_two(tmp_path):
    one, two = write_base(tmp_path / "one", 1), write_base(tmp_path / "two", 2)
    assert [load_config(file, DEFAULTS).seed for file in (one, two, one)] == [1, 2, 1]
    write_base(tmp_path / "one", 5)  # as long as before, and within a second
    assert load_config(one, DEFAULTS).seed == 5


def test_a_callers_module_of_the_name_is_another(tmp_path, monkeypatch):
    own = ModuleType("common_settings")
    monkeypatch.setitem(sys.modules, "common_settings", own)
    assert load_config(write_base(tmp_path, 4), DEFAULTS).seed == 4
    assert sys.modules["common_settings"] is own
    del sys.modules["common_settings"]


def test_a_neighbour_named_like_a_library_leaves_the_library_loaded(tmp_path):
    (tmp_path / "numpy.py").write_text("raise AssertionError\n")
    numpy = sys.modules["numpy"]
    assert load_config(write_base(tmp_path, 6), DEFAULTS).seed == 6
    assert sys.modules["numpy"] is numpy


def test_the_packages_configurations_are_there_whatever_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()  # a folder of one's own of that name
    (tmp_path / "configs" / "own.py").write_text("SEED = 7\n")
    (tmp_path / "theirs.py").write_text(f"from configs.own import SEED\n{THEIRS}")
    assert load_config("theirs.py", DEFAULTS) == small_editor()


def test_a_mistake_in_a_neighbour_is_named_there(tmp_path):
    file = write_base(tmp_path)
    (tmp_path / "common_settings.py").write_text("def base(:\n    pass\n")
    with pytest.raises(UserError, match=rf"--config: {tmp_path}/common_settings\.py, line 1: SyntaxError"):
        load_config(file, DEFAULTS)


@pytest.mark.parametrize(
    ("command", "reached"),
    [
        (("plan", "--topology=none"), "--topology"),
        (("ablate", "--out=out"), "--table, --variant: none found"),
        (("train", "--workdir=w", "--config.train.keep=0"), "train.keep: 0 found"),
    ],
)
def test_every_command_with_a_configuration_imports_so(capsys, tmp_path, command, reached):
    file = write_base(tmp_path)
    _, problem, _ = small_run.fail(capsys, *command, f"--config={file}")
    assert reached in problem


def test_the_file_of_a_run_imports_nothing_but_the_package(tmp_path):
    config = small_editor()
    (tmp_path / "run.py").write_text(config_script(config.to_dict()))
    assert load_config(tmp_path / "run.py", DEFAULTS).to_dict() == config.to_dict()


def test_a_relative_path_will_do(tmp_path, monkeypatch):
    write_base(tmp_path / "folder", 9)
    monkeypatch.chdir(tmp_path)
    assert load_config("folder/mine.py", DEFAULTS).seed == 9


# Rewards that a file does not name


@pytest.fixture
def given(monkeypatch, tmp_path):
    """The configuration that `train` is called with."""
    seen: list[ConfigDict] = []

    def train(config, workdir):
        seen.append(config)
        return SimpleNamespace(step=config.train.num_steps), True

    monkeypatch.setattr("rcgrpo_jax.cli.train.post_train", train)

    def call(capsys, body: str, *argv: str) -> ConfigDict:
        (tmp_path / "c.py").write_text(body)
        code, _, err = small_run.run_command(
            capsys, "train", *argv, f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path}"
        )
        assert (code, err) == (0, "")
        return seen[-1]

    return call


def test_a_reward_that_the_file_does_not_name_is_given_a_weight(capsys, given):
    config = given(capsys, THEIRS, "--config.rewards.colour=1", "--config.reward_options.colour.scale=30")
    assert config.rewards.to_dict() == {"oracle": 1.0, "preservation": 0.0, "colour": 1.0}
    assert config.reward_options.colour.scale == 30.0


def test_options_that_the_file_has_dropped_are_there_for_flags(capsys, given):
    body = THEIRS.replace("get_config", "get_config as of_file") + (
        "from ml_collections import ConfigDict\n\ndef get_config():\n    c = of_file()\n"
        "    c.reward_options = ConfigDict()\n    c.rewards = ConfigDict({'oracle': 1})\n    return c.lock()\n"
    )
    config = given(capsys, body, "--config.reward_options.oracle.noise", "0.1", "--config.rewards.oracle=0.5")
    assert config.reward_options.to_dict() == {"oracle": {"noise": 0.1}}
    assert config.rewards.to_dict() == {"oracle": 0.5}  # the file has a whole number


def test_other_names_of_rewards_are_still_refused(capsys, tmp_path):
    (tmp_path / "c.py").write_text(THEIRS)
    for flag, near in (("rewards.color=1", "rewards.colour"), ("reward_options.colour.scael=1", "reward_options.col")):
        _, problem, _ = small_run.fail(
            capsys, "train", f"--config={tmp_path / 'c.py'}", "--workdir=w", f"--config.{flag}"
        )
        assert f"there is no such field. Did you mean --config.{near}" in problem


def test_a_variant_of_an_ablation_gives_weights_too():
    from rcgrpo_jax.experiments.ablation import Variant, configure

    changed = configure(small_editor(), Variant("colour", {"rewards.colour": 1}), 0)
    assert changed.rewards.colour == 1.0
    assert "colour" not in small_editor().rewards


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('/nothing/here')", ", line 4: FileNotFoundError: [Errno 2] No such file or directory: '/nothing/here'"),
        ("c.lora.itself = c", ": RecursionError"),
        ("from ml_collections import ConfigDict; c.rewards = ConfigDict({1: 2})", ": TypeError"),
    ],
    ids=["file", "endless", "name"],
)
def test_files_that_give_no_configuration(tmp_path, body, message):
    file = tmp_path / "c.py"
    file.write_text(
        f"from {DEFAULTS} import default_config\ndef get_config():\n    c = default_config()\n    {body}\n"
        "    return c\n"
    )
    with pytest.raises(UserError) as refused:
        load_config(file, DEFAULTS)
    assert refused.value.problem.startswith(f"--config: {file}{message}")


def test_a_frozen_configuration_can_be_changed_by_flags(capsys, given):
    body = THEIRS.replace("get_config", "get_config as of_file") + (
        "from ml_collections import FrozenConfigDict\n\ndef get_config():\n    return FrozenConfigDict(of_file())\n"
    )
    assert given(capsys, body, "--config.seed=5").seed == 5


@pytest.mark.parametrize("path", ["", "/"])
def test_a_folder_is_no_configuration(capsys, path):
    _, problem, _ = small_run.fail(capsys, "train", f"--config={path}", "--workdir=w")
    assert problem == f"--config: {path!r} is a folder; a Python file was wanted."


def test_a_configuration_is_given_once(capsys, tmp_path):
    file = write_base(tmp_path)
    _, problem, _ = small_run.fail(capsys, "train", "--config", str(file), f"--config={file}", "--workdir=w")
    assert problem.startswith("--config: ")


# FILE:NAME

NAMED = "from rcgrpo_jax.rl.config import default_config\nfrom rcgrpo_jax.rl.recipes import choose_row\n\n" + (
    "def get_config(name='one'):\n    c = default_config()\n"
    "    c.seed = choose_row({'one': 1, 'twenty': 20}, name)\n    return c\n"
)


@pytest.fixture
def named(tmp_path) -> Path:
    """A file with two runs."""
    (tmp_path / "named.py").write_text(NAMED)
    return tmp_path / "named.py"


def test_a_name_after_a_colon_chooses_a_run_of_the_file(named):
    assert [load_config(f"{named}{end}", DEFAULTS).seed for end in ("", ":one", ":twenty")] == [1, 1, 20]


@pytest.mark.parametrize("folder", ["a:b", "c:one"])
def test_a_colon_in_the_path_is_no_name(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for name in ("c.py", "c.py:twenty"):  # files of these very names
        (tmp_path / folder / name).write_text(NAMED)
        assert load_config(tmp_path / folder / name, DEFAULTS).seed == 1
    assert load_config(tmp_path / folder / "c.py:twenty:twenty", DEFAULTS).seed == 20
    with pytest.raises(UserError, match=f"{folder}/d.py cannot be read"):
        load_config(tmp_path / folder / "d.py", DEFAULTS)


@pytest.mark.parametrize(
    "command",
    [("train", "--workdir=w"), ("plan", "--topology=v5e:2x2"), ("ablate", "--out=out"), ("sft", "--workdir=w")],
)
def test_every_command_lists_the_names_for_one_that_is_not_there(capsys, named, command):
    code, problem, remedy = small_run.fail(capsys, *command, f"--config={named}:twenti")
    assert code == 2
    assert problem == f"--config: {named}: the name 'twenti' found; one of one, twenty was wanted."
    assert remedy == "Did you mean twenty?"


def test_every_command_takes_a_name(capsys, named):
    for command, reached in (
        (("plan", "--topology=none"), "--topology"),
        (("ablate", "--out=out"), "--table, --variant: none found"),
        (("train", "--workdir=w", "--config.train.keep=0"), "train.keep: 0 found"),
    ):
        assert reached in small_run.fail(capsys, *command, f"--config={named}:twenty")[1]


def test_a_name_for_a_file_with_one_run_is_refused(capsys, tmp_path):
    file = write_base(tmp_path)
    code, problem, remedy = small_run.fail(capsys, "train", f"--config={file}:v5e_16", "--workdir=w")
    assert (code, problem) == (2, f"--config: {file}: the name 'v5e_16' found; the file has one run.")
    assert remedy == f"Write --config {file}."


def test_the_spelling_with_a_colon_is_told_for_a_file_that_is_not_there(capsys, named):
    missing = named.with_name("named_twenty.py")
    _, problem, remedy = small_run.fail(capsys, "train", f"--config={missing}", "--workdir=w")
    assert problem == f"--config: {missing} cannot be read (No such file or directory)."
    assert remedy == f"Did you mean {named}:twenty?"


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("from rcgrpo_jax.training.config import default_config as get_config", rl_config.default_config),
        ("from rcgrpo_jax.training.recipes import small_editor as get_config", small_editor),
        ("from rcgrpo_jax.training import recipes\n\nget_config = recipes.small_editor", small_editor),
        ("from rcgrpo_jax.training.pretrain_config import default_config as get_config", sft_config.default_config),
    ],
    ids=["config", "recipes", "module", "pretrain_config"],
)
def test_a_file_of_before_imports_what_it_did(tmp_path, text, now):
    """Users have such files, and so do the pages that `rcgrpo report` made."""
    (tmp_path / "theirs.py").write_text(text)
    assert load_config(tmp_path / "theirs.py", DEFAULTS) == now()
