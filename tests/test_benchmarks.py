"""The benchmark times two implementations of one step, and only if they compute the same."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from references import Reference, torch

from benchmarks import jax_step, presets, report, step
from benchmarks.presets import PRESETS, Preset, inputs, pseudorandom, seed_of
from rcgrpo_jax.errors import UsageError, UserError

pytestmark = pytest.mark.usefixtures("full_optimization")

torch_step = Reference("benchmarks.torch_step")
TINY = Preset(
    "tiny",
    small_run.TINY["transformer"],
    {
        "model.dtype": "float32", "model.remat": "none", "model.max_text_tokens": 8, "data.size": (64, 64),
        "lora.rank": 4, "acd.layers": 2, "rollout.prompts": 2, "rollout.group_size": 4, "rollout.num_steps": 4,
        "rollout.micro_batch": 4, "surrogate.anchors": 2, "surrogate.micro_batch": 4,
    },
    tolerance=1e-4,
    rounds=2,
)  # fmt: skip


@functools.cache
def results(framework: str) -> dict[str, np.ndarray]:
    return {"jax": jax_step, "torch": torch_step}[framework].Step(TINY).results()


def about(samples: int = 8, units: int = 8) -> dict:
    return {
        "platform": "cpu", "device": "cpu", "software": "some", "stated_peak": None, "tokens": 40,
        "samples": {"rollout": samples, "update": units}, "flops": {"rollout": 4e9, "update": 12e9, "decode": 1e9},
    }  # fmt: skip


class Recorder:
    """Stands in for the processes: answers from `found`, and takes `seconds[framework]` for any program."""

    def __init__(self, found: dict, seconds: dict[str, float]):
        self.found, self.seconds, self.asked = found, seconds, []

    def __call__(self, framework: str, command: str):
        self.asked.append((framework, command))
        answers = {"results": self.found[framework], "about": about(), "peak": 1e11}
        return answers.get(command), self.seconds[framework]


@pytest.mark.slow
def test_both_implementations_compute_the_same_step():
    differences = step.differences(results("jax"), results("torch"))
    assert set(differences) == {"velocity", "sample", "acd", "log_policy", "loss", "gradient"}
    assert max(differences.values()) < 3e-5, differences
    ratio = np.exp(results("torch")["log_policy"] - inputs(TINY)["log_old"][:, 0])
    clipped = np.abs(ratio - 1) > TINY.config.objective.clip
    assert 0 < clipped.mean() < 1  # both sides of the objective's minimum are compared
    assert results("torch")["gradient"].any()


def scale_a_weight(other: torch_step.Step) -> None:
    other.transformer.proj_out.weight.mul_(1.001)


def move_the_mask(other: torch_step.Step) -> None:
    other.region = other.region.roll(1, -1)


def widen_the_clip(other: torch_step.Step) -> None:
    other.config = other.config.copy_and_resolve_references()
    other.config.objective.clip = 0.1


def drop_a_unit(other: torch_step.Step) -> None:
    other.advantages[0, 0] = 0


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (scale_a_weight, {"velocity", "sample", "gradient"}),
        (move_the_mask, {"acd"}),
        pytest.param(widen_the_clip, {"loss", "gradient"}, marks=pytest.mark.slow),
        pytest.param(drop_a_unit, {"loss", "gradient"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_difference_is_refused_before_anything_is_timed(change, differs):
    other = torch_step.Step(TINY)
    with torch.no_grad():
        change(other)
    found = {"jax": results("jax"), "torch": other.results()}
    ask = Recorder(found, {"jax": 1.0, "torch": 1.0})
    with pytest.raises(UserError, match="parity: ") as refused:
        step.run(TINY, ask)
    assert {name for name in found["jax"] if f"{name} " in refused.value.problem.partition("relative")[0]} == differs
    assert not {command for _, command in ask.asked} & set(report.PROGRAMS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_agreement(value):
    a = {"loss": np.array([value], np.float32)}
    with pytest.raises(UserError, match="loss inf"):
        step.check(step.differences(a, a), 1e-4)


def test_the_frameworks_take_turns_and_one_that_runs_goes_on():
    found = {name: {"loss": np.ones(1)} for name in report.FRAMEWORKS}
    ask = Recorder(found, {"jax": 2.0, "torch": 3.0})
    measured = step.run(dataclasses.replace(TINY, repeats=2, rounds=2), ask)
    turns = [framework for framework, command in ask.asked if command == "rollout"]
    assert turns == ["torch", "torch", "jax", "jax", "jax", "jax", "torch", "torch"]
    assert [name for name, _ in ask.asked[:6]] == ["jax"] * 3 + ["torch"] * 3
    assert measured["seconds"] == {name: dict.fromkeys(report.PROGRAMS, [x] * 4) for name, x in ask.seconds.items()}


def test_rates_are_work_over_time():
    found = {name: {"loss": np.ones(1)} for name in report.FRAMEWORKS}
    measured = step.run(TINY, Recorder(found, {"jax": 2.0, "torch": 3.0}))
    measured["seconds"]["torch"]["update"] = [3.0, 5.0]
    got = report.summary(measured)
    assert got["rollout"]["jax"] == {
        "seconds": [2.0, 2.0, 2.0], "samples_per_second": 4.0, "flops_per_second": 2e9, "mfu": 0.02
    }  # fmt: skip
    assert got["update"]["torch"]["seconds"] == [4.0, 3.0, 5.0]
    assert got["update"]["ratio"] == [2.0, 1.5, 2.5]
    assert got["step"]["jax"]["seconds"] == [4.0] * 3
    assert got["step"]["torch"]["mfu"] == pytest.approx(16e9 / 7 / 1e11)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    for name, value in small_run.environment().items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "report.json"
    code = step.main(["--preset", "tiny", "--repeats", "1", "--set", "seed=3", "--json", str(file)])
    shown, progress = capfd.readouterr()
    assert code == 0, progress
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines if line][:5] == ["preset", "device", "jax", "torch", "parity"]
    assert "40 tokens a sample, P 2, G 4, K 4, B 2, 8 units, float32, remat none" in shown
    assert shown.count("; at a time: 4 candidates, 4 units") == 2
    rows = {line.split()[0]: line.split() for line in lines[-4:-1]}
    assert set(rows) == {"rollout", "update", "step"}
    assert all(row.count("to") == 3 and sum(cell.endswith("%") for cell in row) == 2 for row in rows.values())
    written = json.loads(file.read_text())
    assert written["config"]["seed"] == 3
    assert max(written["parity"].values()) < written["tolerance"]
    assert written["peak"] == max(written["matmul"].values())
    assert {len(times) for one in written["seconds"].values() for times in one.values()} == {2}
    assert written["summary"] == report.summary(written)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("surrogate.distance=l2", "surrogate.distance: 'l2' found; torch's step knows region"),
        ("surrogate.anchors=9", "surrogate.anchors: 9 of 3"),
        ("lora.rnak=3", "lora.rnak"),
        ("model.path=/x", "model.path found; a preset has its own model"),
        ("acd.reference_keys=True", "acd.reference_keys: True found; torch's step knows False"),
        ("acd.weight=0.0", "acd: weight 0.0, layers"),
        ("acd.layers=99", "layers 99 found"),
        ("model.max_text_tokens=0", "model.max_text_tokens: 0 found"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(capsys, flag, message):
    assert step.main(["--preset", "small", "--set", flag]) == UsageError.exit_code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--rounds=0", "--repeats=-1", "--repeats=two"])
def test_turns_are_positive(capsys, flag):
    with pytest.raises(SystemExit):
        step.main([flag])
    assert "a positive whole number was wanted" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_still_printed(monkeypatch, capsys, tmp_path):
    found = {name: {"loss": np.ones(1)} for name in report.FRAMEWORKS}
    recorder = Recorder(found, {"jax": 2.0, "torch": 3.0})
    monkeypatch.setattr(step, "run", lambda preset, ask, run=step.run: run(TINY, recorder))
    assert step.main(["--json", str(tmp_path / "nowhere" / "report.json")]) == 1
    shown, progress = capsys.readouterr()
    assert "rollout" in shown
    assert "error: --json: " in progress


def test_each_framework_has_micro_batches_of_its_own_until_they_are_set():
    def of_both(*flags: str) -> list[tuple[int, int]]:
        preset = step.chosen(step.arguments(["--preset", "wide", *flags]))
        return [(c.rollout.micro_batch, c.surrogate.micro_batch) for c in (preset.config, preset.torch_config)]

    assert of_both() == [(0, 4), (0, 0)]
    assert of_both("--set", "surrogate.micro_batch=2") == [(0, 2), (0, 2)]


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="there is a GPU")
def test_the_full_model_asks_for_a_gpu():
    with pytest.raises(UserError, match="kontext-1024 needs a GPU"):
        jax_step.Step(PRESETS["kontext-1024"])


def test_weights_are_the_same_bits_in_every_framework():
    seed = seed_of("transformer_blocks.0.attn.to_q.weight")
    of_numpy, of_torch = (
        pseudorandom(index, seed)
        for index in (np.arange(10**5, dtype=np.int32), torch.arange(10**5, dtype=torch.int32))
    )
    of_jax = jax.jit(pseudorandom)(jnp.arange(10**5, dtype=jnp.int32), jnp.int32(seed))
    assert np.array_equal(of_jax, of_numpy)
    assert np.array_equal(of_torch.numpy(), of_numpy)
    uniform = of_numpy * 2.0**-23
    assert uniform.mean() == pytest.approx(0, abs=0.01)
    assert (uniform**2).mean() == pytest.approx(1 / 3, abs=0.01)
    assert abs((uniform[1:] * uniform[:-1]).mean()) < 0.005
    assert presets.seed_of("a.weight") != presets.seed_of("b.weight")
