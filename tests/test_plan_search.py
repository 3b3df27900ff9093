"""`rcgrpo plan`: it finds settings that fit, says what would, and prints what the compiler says."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax.parallel.mesh import AXES
from rcgrpo_jax.plan.chips import TPUS
from rcgrpo_jax.plan.cost import Cost
from rcgrpo_jax.plan.programs import NAMES, Memory, Plan, Workload, open_flux
from rcgrpo_jax.plan.search import MICRO_BATCH, Search
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.config import validate

GIB = 2**30


# Search, with a compiler that follows a formula


@pytest.fixture
def compiler(monkeypatch):
    """Replaces the compiler: `compiler(base, per_sample)` bytes, a third under dots, a tenth under full remat."""
    compiled = []

    def make(base: int, per_sample: int, memory: int):
        def compile(self, name):
            share = {"none": 1.0, "dots": 1 / 3, "full": 0.1}[self.options.model.remat] if name == "update" else 0.1
            spread = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            micro = self.micro_batches[name]
            needed = int(base / self.mesh.shape["fsdp"] + share * per_sample * micro / spread)
            compiled.append((name, dict(self.mesh.shape), micro, self.options.model.remat))
            memory_of = Memory(needed, 0, 0, 0) if needed <= memory else None
            return Plan(
                name, micro, needed, memory, 1.0, memory_of, Cost(flops=self.analytic[name]) if memory_of else None
            )

        monkeypatch.setattr(Workload, "compile", compile)
        return Topology("imagined", tuple(jax.devices()[:4]), TPUS["v5e"], memory)

    make.compiled = compiled
    return make


def search(where: Topology, limit: int = 100, **changes) -> Search:
    options = small_run.make_options(**changes)
    return Search(options, open_flux(options.model.path), where, limit)


def changed_config(changes: Mapping[str, Any], **given) -> ConfigDict:
    """The configuration of `search`, as a fix changes it."""
    return small_run.make_config(**given | {field.replace(".", "__"): value for field, value in changes.items()})


MIB = 2**20


def test_what_a_search_finds_fits_and_is_ranked(compiler):
    where = compiler(4 * MIB, 4 * MIB, 6 * MIB)
    found = search(where).run()
    assert found
    assert [item.seconds for item in found] == sorted(item.seconds for item in found)
    for item in found:
        assert [plan.name for plan in item.plans] == list(NAMES)
        assert all(plan.fits for plan in item.plans)
        validate(changed_config(item.changes), 4)  # and can be run
        assert set(MICRO_BATCH.values()) <= set(item.changes)
    assert len({tuple(item.changes[f"mesh.{axis}"] for axis in AXES) for item in found}) == len(found) > 1
    tried = [entry for entry in compiler.compiled if entry[0] == "update"]
    assert all(len({entry[i] for entry in tried}) > 1 for i in (2, 3))  # micro-batches, remat policies
    assert len(tried) == len({(str(shape), micro, remat) for _, shape, micro, remat in tried})  # none twice


def test_a_search_minds_no_micro_batch_of_the_file(compiler):
    where = compiler(4 * MIB, 4 * MIB, 6 * MIB)
    free, fixed = (search(where, rollout__micro_batch=m, rollout__decode_micro_batch=m).run() for m in (0, 2))
    assert [item.changes for item in fixed] == [item.changes for item in free] != []


def test_a_fix_of_the_rollout_can_be_run(compiler):
    """A smaller rollout is decoded in parts that divide it, and that is compiled too."""
    where = compiler(4 * MIB, 8 * MIB, 3 * MIB)
    config = {"mesh__data": 1, "mesh__fsdp": 4, "rollout__group_size": 12, "rollout__decode_micro_batch": 12}
    changes, plans = search(where, **config).nearest([Plan("rollout", 24, 8 * MIB, 3 * MIB, 1.0)], (1, 4, 1))
    assert changes == {"rollout.micro_batch": 8, "rollout.decode_micro_batch": 4}
    assert [(plan.name, plan.micro_batch) for plan in plans] == [("rollout", 8), ("decode", 4)]
    validate(changed_config(changes, **config), 4)


def test_a_search_keeps_to_its_limit_and_skips_the_hopeless(compiler):
    where = compiler(4 * MIB, 4000 * MIB, 6 * MIB)
    assert search(where, limit=3).run() == []
    assert len(compiler.compiled) == 3
    compiler.compiled.clear()
    search(where).run()
    sizes = {}
    for name, shape, micro, remat in compiler.compiled:
        sizes.setdefault((name, str(shape), remat), []).append(micro)
    assert all(micros == sorted(micros, reverse=True) or len(micros) == 1 for micros in sizes.values())


def test_the_nearest_fix_is_the_largest_smaller_micro_batch(compiler):
    where = compiler(4 * MIB, 8 * MIB, 6 * MIB)
    finder = search(where, mesh__data=1, mesh__fsdp=4, model__remat="full", surrogate__micro_batch=0)
    failed = [Plan("update", 16, 8 * MIB, 6 * MIB, 1.0)]
    changes, plans = finder.nearest(failed, (1, 4, 1))
    assert changes == {"surrogate.micro_batch": 8}
    assert plans[0].fits


def test_where_no_micro_batch_helps_the_fix_is_remat(compiler):
    where = compiler(4 * MIB, 20 * MIB, 6 * MIB)
    finder = search(where, mesh__data=1, mesh__fsdp=4, model__remat="dots")
    changes, _ = finder.nearest([Plan("update", 4, 8 * MIB, 6 * MIB, 1.0)], (1, 4, 1))
    assert changes == {"surrogate.micro_batch": 4, "model.remat": "full"}


def test_nothing_fits_where_the_weights_do_not(compiler):
    assert search(compiler(4 * MIB, 8 * MIB, 1000)).run() == []
    assert compiler.compiled == []


# The command


def plan(capsys, path, *argv: str) -> tuple[int, str, str]:
    return small_run.run_command(capsys, "plan", f"--config={small_run.config_file(path / 'config.py')}", *argv)


# 256 tokens: whole tiles of the kernel.
ON_TPU = {"mesh.data": 2, "mesh.fsdp": 2, "model.max_text_tokens": 128, "data.size": (128, 128)}


@pytest.mark.slow
def test_a_plan_for_a_tpu_that_is_not_there(capsys, tmp_path):
    pytest.importorskip("libtpu")
    report = tmp_path / "plan.json"
    fields = (f"--config.{field}={value}" for field, value in ON_TPU.items())
    argv = ("--topology=v5e:2x2", "--price=1.2", f"--json={report}", *fields)
    code, out, _ = plan(capsys, tmp_path, *argv)
    assert code == 0
    found = json.loads(report.read_text())
    assert found["fits"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    rollout, decode, update = found["programs"]
    assert "attention splash" in out
    assert all(program["cost"]["uncounted"] == {} for program in found["programs"])
    assert rollout["cost"]["flops"] / rollout["analytic"] == pytest.approx(1, rel=0.05)
    assert update["cost"]["flops"] / update["analytic"] == pytest.approx(1, rel=0.05)
    assert rollout["cost"]["collectives"]["all-gather"]["ici"] > 0  # the weights are spread over fsdp
    assert decode["cost"]["collectives"] == {}
    step = found["step"]
    assert step["seconds"] == pytest.approx(2 * step["roofline_seconds"])
    assert step["cost_per_hour"] == pytest.approx(4 * 1.2)
    assert step["cost_per_1000_samples"] == pytest.approx(1000 * 4.8 / step["samples_per_hour"])
    for word in ("rollout", "decode", "update", "15.75 GiB a device", "all-gather", "samples an hour", "4.80 an hour"):
        assert word in out


def test_what_does_not_fit_exits_with_a_fix(capsys, tmp_path, monkeypatch, compiler):
    where = compiler(4 * MIB, 8 * MIB, 6 * MIB)
    monkeypatch.setattr("rcgrpo_jax.cli.plan.open_topology", lambda name: where)
    argv = ("--topology=local", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.model.remat=dots")
    report = tmp_path / "plan.json"
    code, out, err = plan(capsys, tmp_path, *argv, f"--json={report}")
    assert code == 1
    assert "too much" in out
    problem, remedy = err.splitlines()[-2:]
    assert problem.startswith("rcgrpo plan: error: imagined: update needs")
    assert remedy == "  This fits, by the compiler: --config.surrogate.micro_batch=4"
    assert json.loads(report.read_text())["fix"] == {"surrogate.micro_batch": 4}
    assert plan(capsys, tmp_path, *argv, *re.findall(r"--config\S+", remedy))[0] == 0


@pytest.mark.parametrize(("quantization", "told"), [("none", True), ("int8", False)])
def test_where_nothing_fits_a_base_in_fewer_bits_is_named(capsys, tmp_path, monkeypatch, compiler, quantization, told):
    monkeypatch.setattr("rcgrpo_jax.cli.plan.open_topology", lambda name: compiler(4 * MIB, 8 * MIB, 1000))
    argv = ("--topology=local", "--config.mesh.data=1", "--config.mesh.fsdp=4")
    code, _, err = plan(capsys, tmp_path, *argv, f"--config.model.quantization={quantization}")
    assert code == 1
    remedy = err.splitlines()[-1]
    assert remedy.startswith("  Take more chips or chips with more memory")
    assert ("set model.quantization=int8 or nf4" in remedy) == told


def test_a_search_prints_a_ranking(capsys, tmp_path, monkeypatch, compiler):
    where = compiler(4 * MIB, 8 * MIB, 6 * MIB)
    monkeypatch.setattr("rcgrpo_jax.cli.plan.open_topology", lambda name: where)
    report = tmp_path / "plan.json"
    code, out, _ = plan(capsys, tmp_path, "--topology=local", "--search", f"--json={report}")
    assert code == 0
    first = json.loads(report.read_text())["found"][0]
    flags = " ".join(f"--config.{field}={value}" for field, value in first["changes"].items())
    assert next(line for line in out.splitlines() if line.startswith("1 ")).endswith(flags)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--topology=v5e:4"], 2, "--topology: 'v5e:4' has 1 sides"),
        (["--topology=local", "--config.mesh.fsdp=3"], 2, "mesh"),
        (["--topology=local", "--config.mesh.data=8", "--config.model.path=/nowhere"], 1, "/nowhere is not a folder"),
        (["--topology=local", "--efficiency=2"], 2, "--efficiency"),
        (["--topology=local", "--json=/dev/null/plan.json"], 1, "--json: /dev/null/plan.json cannot be written"),
        ([], 2, "missing --topology"),
    ],
)
def test_mistakes_are_two_lines(capsys, tmp_path, argv, code, words):
    found, out, err = plan(capsys, tmp_path, *argv)
    assert (found, out) == (code, "")
    assert words in err
    assert "not foreseen" not in err


def test_plans_are_plain_data():
    entry = dataclasses.asdict(Plan("update", 4, 8, 6, 1.0, Memory(1, 2, 3, 4), Cost(flops=1.0)))
    assert json.loads(json.dumps(entry)) == entry
