"""A configuration that cannot run is refused as a whole, with every mistake named, before anything is loaded."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax import rewards
from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.flow.solvers import SOLVERS
from rcgrpo_jax.models.attention import IMPLEMENTATIONS
from rcgrpo_jax.models.mmdit import REMAT_POLICIES
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rl.config import MAY_DIFFER, default_config, validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.recipes import as_in_paper
from rcgrpo_jax.rl.setup import make_rewards
from rcgrpo_jax.sft import config as sft_config

FOLDER = Path(__file__).parents[1] / "configs"
MACHINES = {
    "kontext_512": {
        "default": 8, "v5e_16": 16, "v5e_4": 4, "v6e_8": 8, "v5p_8": 4, "v5p_64": 32, "h100": 1, "8xh100": 8, "24gb": 1,
    },
    "kontext_1024": {"v5e_64": 64, "v5p_128": 64},
}  # fmt: skip
CONFIGS = {file.name: 64 if file.stem == "kontext_1024" else 8 for file in sorted(FOLDER.glob("*.py"))} | {
    f"{stem}.py:{name}": count for stem, machines in MACHINES.items() for name, count in machines.items()
}


def make(**changes) -> ConfigDict:
    """A configuration that is valid on one device, but for the changes (`__` for dots)."""
    config = default_config()
    config.model.path = config.data.path = "somewhere"
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            config[group][field] = value
        else:
            config[group] = value
    return config


def problems(config: ConfigDict, num_devices: int = 1) -> list[str]:
    """The lines of the refusal; none if there is none."""
    try:
        validate(config, num_devices)
    except UsageError as error:
        return error.problem.removeprefix("config: ").split("\n        ")
    return []


def test_the_defaults_are_valid():
    assert problems(make()) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_that_come_with_the_package_are_valid(name):
    config = load_config(FOLDER / name, "")
    config.model.path = config.data.path = "somewhere"
    (sft_config.validate if "stage" in config else validate)(config, CONFIGS[name])


@pytest.mark.parametrize("stem", MACHINES)
def test_a_file_with_several_machines_has_those_and_its_header_a_row_each(stem):
    file = runpy.run_path(str(FOLDER / f"{stem}.py"))
    assert [*file["MACHINES"]] == [*MACHINES[stem]]
    rows = re.findall(r"^\| (\w+) +\|", file["__doc__"], re.MULTILINE)
    assert rows == ["name", *(name for name in MACHINES[stem] if name != "default")]


@pytest.mark.parametrize("name", ["kontext_512_editscore.py:8xh100", "kontext_512_paper.py"])
def test_the_papers_rewards_are_editscore_and_acd(name):
    config = load_config(FOLDER / name, "")
    assert config.rewards.to_dict() == {"editscore": 1.0}
    assert config.acd.weight == 1.0
    assert config.reward_options.editscore.model == "editscore"


def test_the_papers_settings_do_not_follow_the_defaults():
    other = make(
        explore__kind="mixed", explore__mask_threshold=0.5, explore__mask_dilation=2, surrogate__distance="l2",
        surrogate__tau_edit=0.5, surrogate__tau_base=2.0, surrogate__anchor_mode="replay", surrogate__steps="random",
        surrogate__weighting="policy", objective__quasi_norm=0.8, objective__kl_weight=0.1, acd__weight=0.0,
        acd__reference_keys=True, acd__text="instruction",
    )  # fmt: skip
    assert as_in_paper(other) == as_in_paper(make())


@pytest.mark.parametrize("value", [None, "0.3"])
def test_what_is_no_number_is_refused(value):
    config = make()
    with config.ignore_type():
        config.acd.weight = value
    assert problems(config) == [f"acd.weight: {value!r} found; 0 to 1e+09 was wanted"]


def test_a_quantised_base_is_not_kept_dequantised():
    assert problems(make(model__quantization="nf4")) == []
    (problem,) = problems(make(model__quantization="nf4", model__remat="none"))
    assert problem.startswith("model.remat: none with model.quantization=nf4")


@pytest.mark.parametrize(("kind", "perturbed"), [("region", 11), ("mixed", 11), ("global", 12)])
def test_any_candidate_with_a_perturbed_noise_can_be_an_anchor(kind, perturbed):
    assert problems(make(explore__kind=kind, surrogate__anchors=perturbed)) == []
    assert problems(make(explore__kind=kind, surrogate__anchors=perturbed + 1)) == [
        f"surrogate.anchors: {perturbed + 1} of {perturbed} perturbed candidates; rollout.group_size is 12, "
        f"explore.kind {kind}"
    ]


def test_the_source_counts_in_the_entropy_that_a_policy_can_have():
    fields = {"surrogate__weighting": "policy", "surrogate__target_entropy": 2.5}  # log 12 = 2.485, log 13 = 2.565
    assert problems(make(**fields, objective__source_advantage=1.0)) == []
    assert problems(make(**fields)) == ["surrogate.target_entropy: 2.5 nats; 12 candidates allow 0 to 2.485"]


def test_updates_after_the_end_of_the_decay_are_refused():
    """They would be taken at a learning rate of 0."""
    fields = {"optimizer__warmup_steps": 4, "optimizer__decay_steps": 16, "objective__updates": 2}
    assert problems(make(train__num_steps=10, **fields)) == []
    assert problems(make(train__num_steps=11, **fields)) == [
        "optimizer.decay_steps: 16 ends the learning at update 20 of 22; at least 18, or 0 for no decay, was wanted"
    ]


@pytest.mark.parametrize("weight", [None, "1"])
def test_a_weight_that_is_no_number_is_refused(weight):
    assert problems(make(rewards=ConfigDict({"preservation": weight}))) == [
        f"rewards.preservation: {weight!r} found; a number from -1e+09 to 1e+09 was wanted"
    ]


def test_every_problem_is_listed_at_once():
    found = problems(
        make(
            model__dtype="float8", explore__alpha_edit=1.5, rollout__group_size=1, surrogate__distance="l3",
            train__keep=0, data__path="", rewards__colour=float("nan"), explore__alpha_edti=0.3,
        )
    )  # fmt: skip
    assert [line.split(":")[0] for line in found] == [
        "explore.alpha_edti", "model.dtype", "surrogate.distance", "train.keep", "explore.alpha_edit",
        "rollout.group_size", "data.path", "rewards.colour",
    ]  # fmt: skip


def test_every_problem_of_sizes_is_listed_at_once():
    found = problems(
        make(
            surrogate__anchors=12, surrogate__steps="random", surrogate__num_random_steps=9,
            surrogate__weighting="policy", surrogate__target_entropy=3.0, data__size=(512, 500),
            rollout__micro_batch=5, objective__kl_weight=0.1,
        )
    )  # fmt: skip
    fields = (
        "surrogate.anchors", "surrogate.num_random_steps", "surrogate.target_entropy", "objective.kl_weight",
        "data.size", "rollout.micro_batch", "rollout",
    )  # fmt: skip
    assert [line.split(":")[0] for line in found] == list(fields)


@pytest.mark.parametrize(("polarity", "value", "problem"), [
    ("white", "red", "data.mask_value: 'red' found; numbers from 0 to 65535 or colours such as #800000"),
    ("black", "15", "data.polarity: black found beside data.mask_value = 15; one of them was wanted"),
])  # fmt: skip
def test_what_marks_the_region_is_checked(polarity, value, problem):
    (found,) = problems(make(data__polarity=polarity, data__mask_value=value))
    assert found.startswith(problem)
    assert not problems(make(data__mask_value="2, #800000"))


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("model.dtype", ["bfloat16", "float32"]),
        ("model.attention", ["auto", *IMPLEMENTATIONS]),
        ("model.remat", list(REMAT_POLICIES)),
        ("data.polarity", ["white", "black"]),
        ("explore.kind", ["region", "global", "mixed"]),
        ("rollout.solver", [*SOLVERS]),
        ("surrogate.distance", ["region", "tau", "l2", "mean"]),
        ("surrogate.anchor_mode", ["replay", "integrate"]),
        ("surrogate.steps", ["all", "early", "random"]),
        ("surrogate.weighting", ["uniform", "policy"]),
        ("acd.text", ["all", "instruction"]),
    ],
)
def test_choices(field, choices):
    name = field.replace(".", "__")
    for choice in choices:
        assert problems(make(**{name: choice})) == []
    (line,) = problems(make(**{name: "other"}))
    assert line == f"{field}: 'other' found; one of {', '.join(choices)} was wanted"


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("model.max_text_tokens", [0, 512], [-1, 513]),
        ("model.guidance", [0.0, 10.0], [-1.0, float("nan")]),
        ("lora.rank", [1], [0]),
        ("lora.alpha", [1.0], [0.0]),
        ("explore.alpha_edit", [0.0, 1.0], [-0.1, 1.1, float("nan")]),
        ("explore.alpha_base", [0.0, 1.0], [-0.1, 1.1]),
        ("explore.sigma", [0.0, 1.0], [-0.1, 1.1]),
        ("explore.mask_threshold", [0.0, 1.0], [-0.1, 1.1]),
        ("explore.mask_dilation", [0, 3], [-1]),
        ("rollout.prompts", [1], [0]),
        ("rollout.group_size", [5], [1]),
        ("rollout.num_steps", [1], [0]),
        ("rollout.micro_batch", [0, 12], [-1]),
        ("rollout.decode_micro_batch", [0, 12], [-1]),
        ("surrogate.tau_edit", [0.1], [0.0]),
        ("surrogate.tau_base", [0.1], [0.0]),
        ("surrogate.anchors", [1, 11], [0]),
        ("surrogate.num_random_steps", [1], [0]),
        ("surrogate.micro_batch", [0, 16], [-1]),
        ("objective.clip", [1e-4], [0.0]),
        ("objective.advantage_clip", [1.0], [0.0]),
        ("objective.quasi_norm", [0.0, 0.8], [-0.1]),
        ("objective.kl_weight", [0.0], [-0.1]),
        ("objective.updates", [1, 4], [0]),
        ("acd.weight", [0.0, 2.0], [-1.0]),
        ("acd.layers", [1], [0]),
        ("optimizer.learning_rate", [0.0], [-1e-4]),
        ("optimizer.warmup_steps", [0, 10], [-1]),
        ("optimizer.weight_decay", [0.0], [-0.1]),
        ("optimizer.b1", [0.0, 0.9], [-0.1, 1.0]),
        ("optimizer.b2", [0.0, 0.999], [-0.1, 1.0]),
        ("optimizer.eps", [1e-15, 1e-8], [0.0, -1e-8, float("inf")]),
        ("optimizer.max_grad_norm", [1.0], [0.0]),
        ("optimizer.ema_decay", [0.0, 0.99], [-0.1, 1.1]),
        ("train.num_steps", [1], [0]),
        ("train.save_every", [1], [0]),
        ("train.keep", [1], [0]),
        ("train.image_every", [1], [0]),
        ("train.profile_steps", [0, 3], [-1]),
    ],
)
def test_ranges(field, good, bad):
    name = field.replace(".", "__")
    for value in good:
        assert problems(make(**{name: value})) == [], value
    for value in bad:
        (line,) = problems(make(**{name: value}))
        assert line.startswith(f"{field}: {value!r} found; "), value


@pytest.mark.parametrize("size", [(512,), (512, 512, 3), (512, 500), (0, 512), (-16, 16), ("a", "b"), (16.0, 16.0)])
def test_sizes_that_are_no_sizes(size):
    (line,) = problems(make(data__size=size))
    assert line == f"data.size: {size}; two multiples of 16 pixels were wanted, 65536 at most"


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        ({"rollout__prompts": 3, "rollout__group_size": 5}, 8, ["P x G = 3 x 5 = 15", "8 x 1 = 8 devices"]),
        ({"mesh__fsdp": 2, "mesh__tensor": 2, "rollout__prompts": 1, "rollout__group_size": 7, "surrogate__anchors": 4},
         16, ["P x G = 1 x 7 = 7", "data x fsdp = 4 x 2 = 8 devices"]),
        ({"rollout__micro_batch": 12}, 8, ["P x G = 4 x 12 = 48 in micro-batches of 12", "8 devices"]),
        ({"rollout__decode_micro_batch": 20}, 1, ["micro-batches of 20"]),
        ({"rollout__micro_batch": 6}, 1, ["rollout.micro_batch: 6", "rollout.prompts = 4"]),
        ({"surrogate__micro_batch": 24}, 1, ["units to differentiate = 64 in micro-batches of 24"]),
        ({"surrogate__micro_batch": 32, "surrogate__anchor_mode": "integrate"}, 1, ["= 16 in micro-batches of 32"]),
        ({"surrogate__steps": "all", "surrogate__micro_batch": 256}, 1, ["= 128 in micro-batches of 256"]),
    ],
)  # fmt: skip
def test_what_does_not_divide_over_the_mesh_names_the_numbers(changes, devices, words):
    line = "; ".join(problems(make(**changes), devices))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("mesh", [{"mesh__data": 3}, {"mesh__data": -1, "mesh__fsdp": -1}, {"mesh__tensor": 0}])
def test_a_mesh_that_is_not_the_devices(mesh):
    with pytest.raises(UsageError, match="mesh: data="):
        validate(make(**mesh), 8)


def test_a_run_without_any_reward_is_refused():
    assert problems(make(rewards=ConfigDict())) == []  # ACD is one
    (line,) = problems(make(rewards=ConfigDict(), acd__weight=0.0))
    assert line.startswith("rewards: none")


def test_the_options_of_rewards_are_listed_with_their_defaults():
    options = default_config().reward_options.to_dict()
    assert options["colour"] == {"scale": 40.0, "lightness": 0.5}
    assert options["lpips"] == {}
    assert "editscore" not in options  # a judge's model has no default
    known = {name: rewards.factories()[name] for name in options}
    for name, options in rewards.default_options(known).items():
        assert rewards.option_problems(name, options, known) == []


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"colour": {"scale": 30, "lightness": 0.2}}, []),
        ({"colour": {}}, []),
        ({"color": {"scale": 3.0}}, ["color: no such reward; did you mean colour?"]),
        ({"zzz": {}},
         [f"zzz: no such reward; one of {', '.join(sorted(rewards.factories()))} was wanted"]),
        ({"oracle": {"nois": 0.1}}, ["oracle.nois: no such option; did you mean noise?"]),
        ({"oracle": {"zzz": 0.1}}, ["oracle.zzz: no such option; one of noise, num_pass, seed was wanted"]),
        ({"oracle": {"noise": "much", "seed": 0.5}},
         ["oracle.noise: 'much' found; float was wanted", "oracle.seed: 0.5 found; int was wanted"]),
        ({"oracle": {"noise": True}}, ["oracle.noise: True found; float was wanted"]),
        ({"oracle": 0.1}, ["oracle: 0.1 found; a group of options was wanted"]),
    ],
)  # fmt: skip
def test_options_that_a_reward_does_not_take(options, lines):
    assert problems(make(reward_options=ConfigDict(options))) == [f"reward_options.{line}" for line in lines]


def test_a_reward_of_ones_own_may_have_any_options(monkeypatch):
    monkeypatch.setattr(rewards.base, "_FACTORIES", dict(rewards.base._FACTORIES))
    register("mine")(lambda server, retries=3, **more: None)
    options = {"mine": {"server": "http://judge", "retries": 5, "timeout": 2.0}}
    assert problems(make(reward_options=ConfigDict(options))) == []
    options["mine"]["retries"] = "often"
    (line,) = problems(make(reward_options=ConfigDict(options)))
    assert line == "reward_options.mine.retries: 'often' found; int was wanted"


def test_misspelt_and_missing_fields_in_a_file_are_named():
    config = make(explore__alpha_edti=0.5, xyzzy=1)
    assert problems(config) == [
        "explore.alpha_edti: no such field; did you mean explore.alpha_edit?",
        "xyzzy: no such field",
    ]
    config = make()
    del config.explore.sigma
    del config.train
    assert problems(config)[0] == "explore.sigma: missing"
    assert "train.num_steps: missing" in problems(config)


def test_fields_that_may_differ_on_resume_exist():
    config = default_config()
    for name in MAY_DIFFER:
        value = config
        for part in name.split("."):
            value = value[part]


# The same from the command line


def run_train(capsys, *argv: str) -> tuple[int, list[str]]:
    code, out, err = small_run.run_command(capsys, "train", *argv)
    assert out == ""
    assert "Traceback" not in err
    return code, err.splitlines()


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from rcgrpo_jax.rl.config import default_config\n\n\ndef get_config():\n    return default_config()\n"
    )
    return file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explore.alpha_edti=1", "--config.explore.alpha_edti: there is no such field. "
                                 "Did you mean --config.explore.alpha_edit?"),
        ("exploer.alpha_edit=1", "--config.exploer.alpha_edit: there is no such field. "
                                 "Did you mean --config.explore.alpha_edit?"),
        ("zzzzz=1", "--config.zzzzz: there is no such field."),
        ("explore.alpha_edit=much", "flag --config.explore.alpha_edit=much: could not convert string to float"),
        ("rollout.prompts=1.5", "flag --config.rollout.prompts=1.5: invalid literal for int() with base 10"),
        ("acd.reference_keys=perhaps", "flag --config.acd.reference_keys=perhaps: ('Non-boolean argument"),
        ("reward_options.oracle.nois=1", "--config.reward_options.oracle.nois: there is no such field. "
                                         "Did you mean --config.reward_options.oracle.noise?"),
    ],
    ids=["field", "group", "nothing-near", "float", "int", "bool", "option"],
)  # fmt: skip
def test_overrides_that_do_not_fit(capsys, config_file, tmp_path, override, message):
    code, lines = run_train(capsys, f"--config={config_file}", f"--workdir={tmp_path / 'w'}", f"--config.{override}")
    assert code == 2
    assert lines[0].startswith(f"rcgrpo train: error: {message}")
    assert len(lines) == 2
    assert not (tmp_path / "w").exists()


def test_the_fields_of_a_group_are_told(capsys, config_file, tmp_path):
    code, lines = run_train(capsys, f"--config={config_file}", f"--workdir={tmp_path / 'w'}", "--config.lora.path=a")
    assert code == 2
    assert lines[1].endswith("lists the fields; those of lora are alpha, init, rank, targets.")


def test_overrides_reach_the_check(capsys, config_file, tmp_path):
    code, lines = run_train(
        capsys, "--config", str(config_file), f"--workdir={tmp_path}", "--config.explore.alpha_edit", "2",
        "--config.model.path=m", "--config.data.size=(64,64)", "--config.acd.reference_keys",
    )  # fmt: skip
    assert code == 2
    assert lines[0].endswith("explore.alpha_edit: 2.0 found; 0 to 1 was wanted")
    assert lines[1].strip() == "data.path: empty; a path was wanted"
    assert len(lines) == 3


def test_options_reach_the_rewards(capsys, config_file, tmp_path, monkeypatch):
    seen = []

    def train(config, workdir):
        seen.append(config)
        return SimpleNamespace(step=config.train.num_steps), True

    monkeypatch.setattr("rcgrpo_jax.cli.train.post_train", train)
    code, _, err = small_run.run_command(
        capsys, "train", f"--config={config_file}", f"--workdir={tmp_path}", "--config.reward_options.colour.scale=30",
        "--config.rewards.preservation=0",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert make_rewards(read_options(Options, seen[0])) == {"colour": rewards.as_reward(rewards.Colour(scale=30.0))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("x = 1", "KeyError: get_config."),
        ("def get_config(: pass", ", line 1: SyntaxError: invalid syntax."),
        ("def get_config():\n    return {'seed': 1}", "TypeError: get_config() gave a dict; a ConfigDict was wanted."),
        ("def get_config():\n    return 1 / 0", ", line 2: ZeroDivisionError: division by zero."),
        ("import nothing_of_the_name", ", line 1: ModuleNotFoundError: No module named 'nothing_of_the_name'."),
        ("from rcgrpo_jax.rl.config import default_config\ndef get_config():\n    c = default_config()\n"
         "    c.explorer.sigma = 1\n    return c", ", line 4: AttributeError: "),
    ],
    ids=["missing", "no-get_config", "syntax", "not-a-ConfigDict", "failing", "import", "group"],
)  # fmt: skip
def test_config_files_that_do_not_work(capsys, tmp_path, text, message):
    file = tmp_path / "config.py"
    if text is not None:
        file.write_text(text)
    code, lines = run_train(capsys, f"--config={file}", f"--workdir={tmp_path / 'w'}")
    assert code == 1
    assert lines[0].startswith(f"rcgrpo train: error: --config: {file}")
    assert message in lines[0]
    assert len(lines) == 2
