"""Ablations: variants change what they say, pieces are made once, and all rows see the same edits."""

from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import small_run

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.experiments import ablation
from rcgrpo_jax.experiments.ablation import COMPONENTS, TAUS, EvaluationSettings, Variant, configure, parse_variant
from rcgrpo_jax.rl import trainer as rl_trainer
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """Two variants, two seeds, two steps each; the directory and what was printed."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "config.py").write_text(
        "from rcgrpo_jax.rl.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"    c.model.update(path={str(small_run.model_folder())!r}, dtype='float32', max_text_tokens=16)\n"
        "    c.data.update(path='scenes:train:4', size=(64, 64))\n"
        "    c.lora.update(rank=2, alpha=4.0)\n"
        "    c.rollout.update(prompts=2, group_size=4, num_steps=2)\n"
        "    c.surrogate.anchors = 2\n    c.acd.layers = 2\n"
        "    c.rewards.update(preservation=1.0, colour=0.0, oracle=0.0)\n"
        "    c.optimizer.learning_rate = 0.01\n    c.train.num_steps = 2\n    return c\n"
    )
    arguments = [
        "ablate", f"--config={folder / 'config.py'}", f"--out={folder / 'out'}", "--seeds=2", "--steps=2",
        "--data=scenes:heldout:3", "--variant=oracle: acd.weight=0 rewards.oracle=1.0",
        "--variant=RDP: acd.weight=0", "--batches=2",
    ]  # fmt: skip
    assert main(arguments) == 0
    return folder / "out", arguments


def test_variants_of_the_paper_are_valid_runs():
    config = small_run.make_config()
    for variant in (*COMPONENTS, *TAUS):
        changed = configure(config, variant, seed=3)
        validate(changed, 1)
        assert changed.seed == 3
        assert changed.surrogate.distance == "region" or variant not in TAUS
        for field, value in variant.changes.items():
            group, name = field.split(".")
            assert changed[group][name] == value
    assert config == small_run.make_config()


def test_a_variant_is_a_name_and_fields():
    found = parse_variant("strong RDP: explore.alpha_edit=0.5 acd.weight=0 explore.kind=region")
    changes = {"explore.alpha_edit": 0.5, "acd.weight": 0, "explore.kind": "region"}
    assert found == Variant("strong RDP", changes)


@pytest.mark.parametrize("text", ["no fields", ": a.b=1", "x: a.b", "x: a.b=1 c"])
def test_another_form_is_refused(text):
    with pytest.raises(UsageError, match="FIELD=VALUE"):
        parse_variant(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"explore.alpha": 0.1},
        {"explore.kind": 3},
        {"nothing": 1},
        {"acd.weight": None},
        {"seed": 3},
        {"model.path": "x"},
    ],
)
def test_a_field_that_is_not_there_or_of_another_type_is_refused(changes):
    with pytest.raises(UsageError, match="variant 'x'"):
        configure(small_run.make_config(), Variant("x", changes), 0)


def test_every_variant_and_seed_is_trained_and_evaluated_on_the_same_edits(run):
    out, _ = run
    files = ["base.npz", *(f"{name}/{seed}.npz" for name in ("oracle", "rdp") for seed in (0, 1))]
    found = {file: Evaluation.load(out / "evaluations" / file) for file in files}
    assert len({evaluation.names for evaluation in found.values()}) == 1
    edits = [evaluation.measures["psnr"] for evaluation in found.values()]
    for i, a in enumerate(edits):
        assert all(np.any(a != b) for b in edits[:i]), "two of the runs made the same edits"
    for name in ("oracle", "rdp"):
        assert len(read_metrics(out / "runs" / name / "0" / "metrics.jsonl")) == 2
    table = (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert all(name in text for name in ("base", "oracle", "RDP") for text in (table, page))
    assert 'section id="distributions"' in page
    assert "rewards.oracle = 1.0" in page
    assert "| oracle | 2 | 56 |" in table  # its steps, and their P (G K + 3 B T) = 2 (4 x 2 + 3 x 2) evaluations


@pytest.mark.slow
def test_global_exploration_moves_the_background_more(run, tmp_path, monkeypatch):
    """Fig. 5b, of an untrained model; candidate 0, which RDP alone leaves as it is, does not count."""
    out, _ = run
    for plot in ("drift", "reward_std_preservation", "reward_std_oracle"):  # that only one of the two has
        assert ElementTree.parse(out / f"{plot}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    sample = ablation.Trainer.sample

    def first_apart(*args):
        found = sample(*args)
        return found._replace(scores={name: np.c_[x[:, :1] + 1e6, x[:, 1:]] for name, x in found.scores.items()})

    monkeypatch.setattr(ablation.Trainer, "sample", first_apart)
    config = small_run.make_config(data__path="scenes:train:4", rewards__colour=0.0)
    everywhere, inside = (
        ablation.group_statistics(config, variant, 0, tmp_path, num_batches=1) for variant in COMPONENTS[:2]
    )
    assert (everywhere.drift > 3 * inside.drift).all()
    stds = [found.reward_std["preservation"] for found in (everywhere, inside)]
    assert (stds[0] < 1).all()
    assert (stds[0] > stds[1]).all()
    assert (stds[1] > 0).all()


def test_exploration_alone_trains_nothing(run, tmp_path, monkeypatch, capsys):
    _, arguments = run
    monkeypatch.setattr(ablation, "train_to_end", lambda *_, **__: pytest.fail("trained"))
    other = "--variant=global: explore.kind=global acd.weight=0"
    arguments = small_run.last_of_each(*again(arguments), f"--out={tmp_path}", "--seeds=0", other)
    assert main(arguments) == 2
    assert "--seeds: 0 found, and no --batches" in capsys.readouterr().err
    assert main([*arguments, "--batches=1"]) == 0
    assert "background drift, 2 groups" in capsys.readouterr().out
    assert "| global | 0." in (tmp_path / "groups.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert 'section id="distributions"' in page
    assert 'section id="results"' not in page


def test_what_is_there_is_not_made_again(run, monkeypatch, capsys):
    _, arguments = run

    def refuse(*_, **__):
        raise AssertionError("trained or evaluated again")

    monkeypatch.setattr(ablation, "train_to_end", refuse)
    monkeypatch.setattr(ablation, "evaluate", refuse)
    assert main([*again(arguments), "--config.train.save_every=1"]) == 0  # of no account
    assert "oracle" in capsys.readouterr().out


def again(arguments: list[str]) -> list[str]:
    return [x for x in arguments if not x.startswith("--batches")]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("--eval_seed=1", "evaluation.protocol.seed: there 0, config 1"),
        ("--steps=3", "evaluation.protocol.num_steps"),
        ("--data=scenes:validation:3", "evaluation.protocol.data"),
        ("--config.train.num_steps=3", "run.train.num_steps"),
        ("--config.explore.alpha_edit=0.2", "run.explore.alpha_edit"),
        ("--config.acd.layers=1", "evaluation.acd.layers"),
    ],
)
def test_what_was_made_otherwise_is_not_taken_for_it(run, change, field, capsys, monkeypatch):
    _, arguments = run
    monkeypatch.setattr(ablation, "train_to_end", lambda *_, **__: pytest.fail("trained"))
    assert main(small_run.last_of_each(*again(arguments), change)) == 1
    said = capsys.readouterr().err
    assert field in said
    assert "another --out" in said


def test_a_run_that_was_stopped_is_not_evaluated(run, tmp_path, monkeypatch, capsys):
    _, arguments = run
    stopped = SimpleNamespace(step=1)
    monkeypatch.setattr(rl_trainer, "post_train", lambda *_, **__: (stopped, False))
    assert main(small_run.last_of_each(*again(arguments), f"--out={tmp_path}")) == 1
    assert "step 1 of 2" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "evaluations").rglob("*.npz")] == ["base.npz"]


def test_rows_are_measured_as_the_common_configuration_says(tmp_path, monkeypatch):
    """By one ruler for ACD, and with its marks of the region in masks, whatever a variant trains with."""
    heard = []

    def measure(editor, *_, **__):
        heard.append(editor.transformer.attention.acd_layers)
        return Evaluation((), {}, np.zeros((0, 1, 1, 3), np.uint8), {})

    monkeypatch.setattr(ablation, "evaluate", measure)
    monkeypatch.setattr(ablation, "open_source", lambda *named, **options: heard.append((*named, options)) or [])
    monkeypatch.setattr(ablation, "train_to_end", lambda *_, **__: SimpleNamespace(averaged={}))
    monkeypatch.setattr(ablation.Cost, "of_run", lambda *_: ablation.Cost(1, 1, 1.0))
    config = small_run.make_config(acd__layers=2, data__polarity="black", data__mask_value="15")
    ablation.run_variant(config, Variant("x", {"acd.layers": 1}), 0, EvaluationSettings("here"), tmp_path)
    assert heard == [("here", "black", {"mask_value": "15"}), 2]


def test_runs_and_evaluations_are_on_the_mesh_of_the_configuration(tmp_path, monkeypatch):
    heard = {}

    def measure(*_, mesh, **__):
        heard["mesh"] = dict(mesh.shape)
        return Evaluation((), {}, np.zeros((0, 1, 1, 3), np.uint8), {})

    def train(config, workdir, devices):
        heard["devices"] = devices
        return SimpleNamespace(averaged={})

    monkeypatch.setattr(ablation, "evaluate", measure)
    monkeypatch.setattr(ablation, "open_source", lambda *_, **__: [])
    monkeypatch.setattr(ablation, "train_to_end", train)
    monkeypatch.setattr(ablation.Cost, "of_run", lambda *_: ablation.Cost(1, 1, 1.0))
    config, devices = small_run.make_config(mesh__fsdp=2), jax.local_devices()[:4]
    ablation.run_variant(config, Variant("x", {}), 0, EvaluationSettings("here"), tmp_path, devices)
    assert heard == {"mesh": {"data": 2, "fsdp": 2, "tensor": 1}, "devices": devices}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--variant=Oracle!: acd.weight=0.5", "names that differ"),
        ("--variant=..: acd.weight=0.5", "names that differ"),
        ("--variant=other: explore.kind=region acd.weight=0", "'RDP' and 'other' are the same run"),
        ("--variant=bad: explore.alpha_edit=2", "explore.alpha_edit"),
        ("--variant=deep: acd.layers=99", "acd.layers: 99; the model has"),
        ("--variant=more: rollout.prompts=4", "'oracle' and 'more' differ in data or rollout.prompts"),
        ("--data=scenes:heldout:0", "scenes"),
        ("--data=scenes:train/add:9", "'oracle' trains on scenes:train:4; other examples were wanted"),
        ("--variant=seen: data.path=scenes:heldout:8", "'seen' trains on scenes:heldout:8"),
    ],
)
def test_mistakes_are_told_before_training(run, change, message, capsys, monkeypatch):
    _, arguments = run
    monkeypatch.setattr(ablation, "train_to_end", lambda *_, **__: pytest.fail("trained"))
    assert main(small_run.last_of_each(*arguments, change)) == 2
    assert message in capsys.readouterr().err
