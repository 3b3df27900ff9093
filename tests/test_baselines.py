"""Baselines: rows of one table at one budget of model evaluations, with fields of other policies at their defaults."""

import json
from pathlib import Path

import jax
import pytest

from rcgrpo_jax.cli.ablate import read_rates
from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.cli.main import main
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.experiments.ablation import EvaluationSettings as Protocol
from rcgrpo_jax.experiments.ablation import Variant, check_variants, configure
from rcgrpo_jax.experiments.baselines import METHODS, at_equal_evaluations, baselines, with_learning_rates
from rcgrpo_jax.experiments.cost import Cost, cost_table, evaluations_of_step
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.recipes import small_editor

FILES = sorted((Path(__file__).parents[1] / "configs" / "baselines").glob("*.py"))


def options_of(variant: Variant) -> Options:
    return read_options(Options, configure(small_editor(), variant, 0))


@pytest.mark.parametrize(
    ("changes", "evaluations"),
    [
        # P G K = 12 x 8 x 4 of the rollout; then 3 P B T, 3 P G w, and 5 P G T
        ({}, 384 + 3 * 12 * 2 * 2),
        ({"objective.updates": 2}, 384 + 2 * 3 * 12 * 2 * 2),
        ({"rollout.solver": "heun"}, 12 * 8 * 7 + 3 * 12 * 2 * 2),
        ({"policy": "gaussian"}, 384 + 3 * 12 * 8 * 3),
        ({"policy": "gaussian", "sde.window": 1, "objective.kl_weight": 0.1}, 384 + 4 * 12 * 8),
        ({"policy": "nft"}, 384 + 5 * 12 * 8 * 3),
    ],
)
def test_a_step_costs_its_rollouts_and_what_it_differentiates(changes, evaluations):
    assert evaluations_of_step(options_of(Variant("one", changes))) == evaluations


def test_all_methods_have_the_same_budget_and_are_valid():
    config = small_editor()
    wanted = 80 * evaluations_of_step(read_options(Options, config))
    rows = baselines(config)
    assert [row.name for row in rows] == list(METHODS)
    for row in rows:
        changed = configure(config, row, 0)
        validate(changed, 1)
        options = read_options(Options, changed)
        step = evaluations_of_step(options)
        assert abs(options.train.num_steps * step - wanted) <= step / 2, row.name
        assert options.optimizer.decay_steps == options.train.num_steps
    assert rows[0].changes == {"train.num_steps": 80, "optimizer.decay_steps": 80}
    check_variants(config, rows, Protocol("scenes:heldout:2", 2), 1, 0, jax.devices()[:1])


def test_a_constant_learning_rate_stays_constant():
    config = small_editor()
    config.optimizer.decay_steps = 0
    (row,) = at_equal_evaluations(config, [Variant("one", {"rollout.num_steps": 8})])
    assert row.changes == {"rollout.num_steps": 8, "train.num_steps": 80 * 528 // (12 * 8 * 8 + 3 * 12 * 2 * 4)}


def test_every_row_meets_every_learning_rate():
    rows = with_learning_rates([Variant("a", {"seed": 1}), Variant("b", {})], read_rates(["3e-4", "0.001"]))
    assert [row.name for row in rows] == ["a, lr 0.0003", "a, lr 0.001", "b, lr 0.0003", "b, lr 0.001"]
    assert rows[1].changes == {"seed": 1, "optimizer.learning_rate": 0.001}
    for wrong in ("x", "0", "nan", "inf", ""):
        with pytest.raises(UsageError, match="--learning_rates"):
            read_rates(["1e-3", wrong])


def test_costs_are_kept_and_shown(tmp_path):
    workdir, options = tmp_path / "run", options_of(Variant("one", {"train.num_steps": 3}))
    workdir.mkdir()
    lines = [{"step": i, "seconds/rollout": x, "seconds/update": 1.0} for i, x in enumerate((90.0, 2.0, 3.0), 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = Cost.of_run(options, workdir)
    assert cost == Cost(3, 3 * 528, 4.0)
    file = tmp_path / "0.json"
    assert Cost.load(file) is None
    cost.save(file)
    assert Cost.load(file) == cost
    *_, known, unknown = cost_table({"one": [cost, cost], "other": [cost, None]}).lines
    assert known == ["one", "3", "1,584", "4.00", "0.2"]
    assert unknown == ["other", "", "", "", ""]
    for text in ("{", '{"steps": 1}', '{"steps": -1, "evaluations": 1, "seconds_a_step": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"0\.json"):
            Cost.load(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_settings_are_valid_runs_on_the_machines_they_were_planned_for(file):
    config = load_config(file, "")
    config.model.path = config.data.path = "somewhere"
    for devices, tensor in ((8, 1), (16, 2 if file.stem.startswith("flow") else 1)):
        config.mesh.tensor = tensor
        validate(config, devices)
    assert config.acd.weight == 0
    stated = f"{evaluations_of_step(read_options(Options, config)):,} evaluations"
    assert stated in " ".join(file.read_text().split())


def test_a_budget_of_no_variant_is_refused(tmp_path, capsys):
    config = Path(__file__).parents[1] / "configs" / "small_editor.py"
    flags = ["--table=baselines", "--equal_evaluations", f"--config={config}", f"--out={tmp_path / 'out'}"]
    assert main(["ablate", *flags]) == 2
    assert "--equal_evaluations: found without --variant" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
