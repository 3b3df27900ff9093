"""Short runs of the experiments of docs/findings.md: a change of the code that loses what they found fails here."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_run

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.statistics import paired_interval
from rcgrpo_jax.experiments import ablation
from rcgrpo_jax.experiments.ablation import COMPONENTS, group_statistics
from rcgrpo_jax.rl.recipes import small_editor, small_editor_balanced

pytestmark = pytest.mark.usefixtures("full_optimization", "one_device")

SEEDS = 8  # of the recipe, kept in docs/evaluations


@pytest.fixture(scope="module")
def folder() -> Path:
    return small_run.workspace() / "experiment"


@pytest.mark.slow
def test_what_is_rewarded_rises_on_edits_never_seen_and_the_source_holds_the_background(folder):
    """A sixth of the candidates of a run in the findings, at twice the learning rate."""
    changes = {
        "data.path": "scenes:train:80", "rollout.prompts": 8, "rewards.preservation": 0.0, "acd.weight": 0.0,
        "optimizer.learning_rate": 4e-3, "optimizer.decay_steps": 10, "train.num_steps": 10,
        "rollout.micro_batch": 8, "rollout.decode_micro_batch": 4, "surrogate.micro_batch": 4,
    }  # fmt: skip
    config = small_run.ROOT / "configs" / "small_editor_balanced.py"
    arguments = [f"--config={config}", f"--out={folder}", "--data=scenes:validation:48", "--steps=8", "--seeds=1"]
    fields = [f"--config.{field}={value}" for field, value in changes.items()]
    variants = ["--variant=RDP: explore.kind=region", "--variant=source: objective.source_advantage=1.0"]
    assert main(["ablate", *arguments, *fields, *variants]) == 0
    base, free, held = (
        Evaluation.load(folder / "evaluations" / file).measures for file in ("base.npz", "rdp/0.npz", "source/0.npz")
    )
    assert paired_interval(free["success"][None], base["success"][None]).low > 0
    assert paired_interval(held["psnr"][None], free["psnr"][None]).low > 0
    assert paired_interval(held["success"][None], base["success"][None]).mean > 0  # and does not stop the editing


@pytest.mark.slow
def test_a_perturbation_of_the_region_keeps_backgrounds_and_rewards_closer(folder):
    """Fig. 5, at equal strength, in pairs of groups with equal prompts and references: rewards differ by prompt.

    `test_ablation` has the same of the backgrounds in one batch of an untrained model.
    """
    config = small_editor_balanced()
    config.data.path, config.data.cache, config.rollout.prompts = "scenes:train:80", str(folder / "cache"), 8
    assert config.explore.alpha_edit == config.explore.sigma
    everywhere, inside = (group_statistics(config, variant, 0, folder, num_batches=4) for variant in COMPONENTS[:2])
    assert ratio(inside.drift, everywhere.drift) < 0.7
    assert ratio(inside.reward_std["preservation"], everywhere.reward_std["preservation"]) < 0.7
    assert ratio(inside.reward_std["oracle"], everywhere.reward_std["oracle"]) < 0.95


def ratio(values: np.ndarray, other: np.ndarray) -> float:
    """The geometric mean over pairs."""
    return float(np.exp(np.mean(np.log(values / other))))


RDP, ACD = "--variant=GRPO + RDP: explore.kind=region acd.weight=0.0", "--variant=RDP + ACD: explore.kind=region"
HALF = (
    "--variant=half: explore.kind=region optimizer.learning_rate=0.002 optimizer.decay_steps=40 train.num_steps=40 "
    "optimizer.ema_decay=0.9"
)
QUANTIZED = [f"--variant={name}: model.quantization={name.lower()}" for name in ("int8", "NF4")]
ASKED = "reward_options.oracle.num_pass=4 rollout.prompts=3"
NOISE = [
    "--config.train.num_steps=40", "--config.optimizer.decay_steps=40", "--data=scenes:heldout:300",
    "--variant=noise 0: reward_options.oracle.noise=0.0",
    "--variant=noise 0, 3 prompts: reward_options.oracle.noise=0.0 rollout.prompts=3",
    *(
        f"--variant=noise {noise}{name}: reward_options.oracle.noise={noise} {more}"
        for noise in (0.05, 0.1, 0.2, 0.4)
        for name, more in (("", ""), (", 4 answers, 3 prompts", ASKED))
    ),
]  # fmt: skip
COIN = "--variant=coin: acd.weight=0.0 reward_options.oracle.noise=1e6"


@pytest.mark.parametrize(
    ("name", "config", "seeds", "arguments", "count"),
    [
        ("recipe", "small_editor", SEEDS, [ACD], 1),
        ("acd", "small_editor", 5, [RDP, ACD], 2),
        ("coin", "small_editor", 1, [COIN], 1),
        ("balanced", "small_editor_balanced", 3, [RDP, ACD], 2),
        ("paper", "small_editor_paper", 5, ["--table=components"], 3),
        ("taus", "small_editor_paper", 5, ["--table=taus"], 4),
        ("half", "small_editor", 5, [HALF], 1),
        ("judge-noise", "small_editor", 1, NOISE, 10),
        ("quantized", "small_editor", 1, ["--variant=float32: model.quantization=none", *QUANTIZED], 3),
    ],
    ids=["recipe", "acd", "coin", "balanced", "paper", "taus", "half", "judge-noise", "quantized"],
)
def test_the_tables_of_the_findings_are_those_of_the_kept_evaluations(
    tmp_path, monkeypatch, name, config, seeds, arguments, count
):
    """Of the shipped model and the configurations as they are now: whoever changes these runs the experiment again."""
    docs = small_run.ROOT / "docs"
    kept = shutil.copytree(docs / "evaluations" / name, tmp_path / name)
    before = (kept / "table.md").read_text()
    monkeypatch.setattr(ablation, "train_to_end", lambda *_, **__: pytest.fail("trained"))
    file = small_run.ROOT / "configs" / f"{config}.py"
    assert main(["ablate", f"--config={file}", f"--out={kept}", f"--seeds={seeds}", *arguments]) == 0
    table = (kept / "table.md").read_text()
    assert table == before
    findings = (docs / "findings.md").read_text()
    rows = differences(table, "from base")
    assert len(rows) == count
    assert all(row in findings for row in rows)
    if count > 1:  # what the last variant adds
        assert differences(table, "from the row above")[-1] in findings


def differences(table: str, what: str) -> list[str]:
    """The cells of each row of one of the tables of differences, without the name."""
    lines = table.split(f"**Difference {what}")[1].split("\n\n")[1].splitlines()[2:]
    return [line.split(" | ", 1)[1] for line in lines]


def test_the_medians_of_the_findings_are_those_that_are_kept():
    docs = small_run.ROOT / "docs"
    kept = (docs / "evaluations" / "exploration" / "groups.md").read_text()
    medians = re.findall(r"\| GRPO \(global\) \| (\S+) \|", kept)
    others = re.findall(r"\| GRPO \+ RDP \| (.+) \|", kept)  # a median, and the difference from the row above
    assert len(medians) == len(others) == 3
    findings = (docs / "findings.md").read_text()
    assert all(f"| {median} | {other} |" in findings for median, other in zip(medians, others, strict=True))


@pytest.mark.slow
def test_the_base_measures_today_what_is_kept_of_it(tmp_path):
    """Scenes, noise, solver and measures are still those that the findings were made with."""
    found = ablation.run_base(small_editor(), ablation.EvaluationSettings("scenes:heldout:2", 28, 0), tmp_path)
    kept = Evaluation.load(small_run.ROOT / "docs" / "evaluations" / "recipe" / "evaluations" / "base.npz")
    assert found.names == kept.names[:2]
    assert found.measures.keys() == kept.measures.keys()
    for name, values in kept.measures.items():
        np.testing.assert_allclose(found.measures[name], values[:2], rtol=1e-3, atol=1e-3, err_msg=name)
