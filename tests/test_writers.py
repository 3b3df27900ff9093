"""Metrics reach every writer that is named; a new one is a class and a line; W&B goes on with its run, step by step."""

import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax import struct

from rcgrpo_jax.errors import UserError, is_everywhere
from rcgrpo_jax.options import TrainOptions, read_options
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.runs import run
from rcgrpo_jax.runs.metrics import MetricsWriter, read_metrics
from rcgrpo_jax.runs.writers import WRITERS, Writer, writer_names
from rcgrpo_jax.sft import config as sft_config

PICTURE = np.full((4, 4, 3), 7, np.uint8)


class Server:
    """A toy of W&B: runs with their steps, which must not go back."""

    def __init__(self):
        self.steps: dict[str, dict[int, dict]] = {}  # run -> step -> values
        self.calls: list[dict] = []  # of init
        self.open = 0

    def init(self, **options):
        self.calls.append(options)
        known = options["id"] or f"run{len(self.steps)}"
        assert (known in self.steps) == (options["resume"] == "allow")
        steps = self.steps.setdefault(known, {})
        self.open += 1

        def log(values, step):
            assert step >= max(steps, default=0), "W&B takes no step back"
            assert not values.keys() & steps.get(step, {}).keys(), f"step {step} is written twice"
            steps.setdefault(step, {}).update(values)

        def finish():
            self.open -= 1

        return SimpleNamespace(id=known, step=max(steps) + 1 if steps else 0, log=log, finish=finish)


@pytest.fixture
def server(monkeypatch) -> Server:
    """What an installed `wandb` talks to."""
    found = Server()
    module = ModuleType("wandb")
    module.init, module.Image = found.init, lambda picture: ("image", picture)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return found


def write(workdir, steps, resume_step=0, names=("wandb",), config=None, end=True, **extra):
    writer = MetricsWriter(workdir, resume_step=resume_step, names=names, config=config or {})
    for step in steps:
        writer.scalars(step, {"loss": jnp.float32(step / 4), **extra})
    if end:
        writer.close()


def test_wandb_gets_the_configuration_the_metrics_and_the_pictures(server, tmp_path):
    with MetricsWriter(tmp_path, resume_step=0, names=["wandb"], config={"seed": 3}) as writer:
        writer.scalars(1, {"loss": jnp.float32(0.5), "kl": np.nan})
        writer.images(1, {"pictures": PICTURE})
    ((name, steps),) = server.steps.items()
    assert steps[1].pop("pictures") == ("image", PICTURE)
    np.testing.assert_equal(steps, {1: {"loss": 0.5, "kl": np.nan}})
    (call,) = server.calls
    assert call["config"] == {"seed": 3}
    assert (call["project"], call["name"], call["dir"]) == ("rcgrpo", str(tmp_path), str(tmp_path))
    assert (tmp_path / "wandb" / "run_id").read_text() == name
    assert server.open == 0
    assert not (tmp_path / "tensorboard").exists()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.5]


def test_a_resumed_run_goes_on_with_its_wandb_run_and_repeats_no_step(server, tmp_path):
    write(tmp_path, range(1, 8), end=False, start=0)  # killed three steps after its checkpoint
    write(tmp_path, range(5, 10), resume_step=4, start=1)
    write(tmp_path, range(10, 12), resume_step=9, start=2)
    (steps,) = server.steps.values()
    wanted = [(step, 0) for step in range(1, 8)] + [(8, 1), (9, 1), (10, 2), (11, 2)]
    assert [(step, values["start"]) for step, values in steps.items()] == wanted
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 12)]


def test_a_picture_of_a_step_that_wandb_has_is_not_sent_again(server, tmp_path):
    write(tmp_path, [1, 2], end=False)
    with MetricsWriter(tmp_path, resume_step=1, names=["wandb"]) as writer:
        for step in (2, 3):
            writer.scalars(step, {"loss": 0.0})
            writer.images(step, {"pictures": PICTURE})
    (steps,) = server.steps.values()
    assert [step for step, values in steps.items() if "pictures" in values] == [3]


def test_a_run_that_starts_over_is_another_one_of_wandb(server, tmp_path):
    write(tmp_path, [1, 2], end=False)  # killed before its first checkpoint
    write(tmp_path, [1])
    assert [[*steps] for steps in server.steps.values()] == [[1, 2], [1]]
    write(tmp_path, [2], resume_step=1)
    assert [[*steps] for steps in server.steps.values()] == [[1, 2], [1, 2]]


def test_a_run_that_names_wandb_later_gets_a_run_of_it(server, tmp_path):
    write(tmp_path, [1, 2], names=())
    write(tmp_path, [3], resume_step=2)
    assert [[*steps] for steps in server.steps.values()] == [[3]]


def test_the_environment_names_project_and_run(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "kitchen")
    monkeypatch.setenv("WANDB_NAME", "mug")
    write(tmp_path, [1])
    assert (server.calls[0]["project"], server.calls[0]["name"]) == ("kitchen", "mug")


def test_process_0_alone_writes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, [1])
    assert server.calls == []
    assert [*tmp_path.iterdir()] == []


def test_a_wandb_run_that_cannot_be_opened(server, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"train\.writers: wandb: .*api_key not configured") as caught:
        write(tmp_path, [1])
    assert "WANDB_MODE=offline" in caught.value.remedy


@struct.dataclass
class State:
    step: jax.Array


def train(workdir, names, num_steps=2):
    """The loop of a run whose steps compute nothing."""
    config = small_run.make_config(train__num_steps=num_steps, train__image_every=1, train__writers=names)

    def step(state, index, draw):
        return state.replace(step=state.step + 1), {"loss": 0.5}, {run.GRID: PICTURE} if draw else {}

    options, described = read_options(TrainOptions, config.train), config.to_dict()
    with run.open_run(options, described, workdir) as checkpointer:
        state = State(jnp.int32(0))
        run.run_steps(state, step, options, described, workdir, checkpointer, "", 1, lambda metrics: metrics)


def test_without_the_package_a_run_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError) as caught:
        train(tmp_path, "tensorboard,wandb")
    assert is_everywhere(caught.value)
    assert str(caught.value) == (
        "train.writers: wandb needs the package wandb, which cannot be imported.\n"
        "pip install wandb, or leave wandb out of train.writers."
    )
    assert not (tmp_path / "metrics.jsonl").exists()


class Toy(Writer):
    """Keeps what it is told."""

    package = "json"
    told: list

    def __init__(self, folder, resume_step, config):
        self.told.append((folder.name, resume_step, config["train"]["writers"]))

    def scalars(self, step, metrics):
        self.told.append((step, metrics))

    def images(self, step, images):
        self.told.append((step, [*images]))

    def close(self):
        self.told.append("closed")


def test_a_new_writer_is_a_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(WRITERS, "toy", Toy)
    monkeypatch.setattr(Toy, "told", [], raising=False)
    train(tmp_path, "toy")
    steps = [x for step in (1, 2) for x in ((step, {"loss": 0.5}), (step, ["pictures"]))]
    assert Toy.told == [("toy", 0, "toy"), *steps, "closed"]


@pytest.mark.parametrize(
    ("writers", "problem"),
    [
        ("wandbb", "train.writers: 'wandbb' found; did you mean wandb?"),
        ("tensorboard,csv", "train.writers: 'csv' found; names of tensorboard, wandb were wanted"),
        ("wandb, wandb", "train.writers: 'wandb' found 2 times; once was wanted"),
        (3, "train.writers: 3 found; text was wanted"),
        ("", None),
        ("wandb, tensorboard", None),
    ],
)
def test_names_of_writers_are_checked_by_both_kinds_of_training(writers, problem):
    supervised = sft_config.default_config()
    supervised.model.path = supervised.data.path = "here"
    supervised.train.num_steps = 1
    for check, config in ((validate, small_run.make_config()), (sft_config.validate, supervised)):
        with config.ignore_type():
            config.train.writers = writers
        if problem is None:
            check(config, 1)
            continue
        with pytest.raises(UserError) as caught:
            check(config, 1)
        assert caught.value.problem.removeprefix("config: ") == problem


def test_names_stand_between_commas():
    assert writer_names(" tensorboard , wandb") == ["tensorboard", "wandb"]
    assert writer_names("") == []
