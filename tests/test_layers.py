"""`rcgrpo diagnose layers`: every block's ACD is that of the rollout, and what tells rollouts apart is found."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.edit import EditOptions, edit_all
from rcgrpo_jax.evaluation.evaluate import evaluate
from rcgrpo_jax.evaluation.pictures import read_lines
from rcgrpo_jax.experiments.layer_rollouts import Success, block_means, roll_out
from rcgrpo_jax.experiments.layers import diagnose
from rcgrpo_jax.experiments.rollout_log import Rollouts
from rcgrpo_jax.report.layer_plot import draw_areas
from rcgrpo_jax.report.layers import layer_tables, verdict
from rcgrpo_jax.rewards import Local, Unscored

pytestmark = pytest.mark.usefixtures("one_device")
NAN = float("nan")
EXAMPLES, SEEDS, BLOCKS, SIZE = 3, 2, 3, 64
EDITING = {"dtype": "float32", "max_text_tokens": 16, "attention": "xla"}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def argv(*more: str) -> list[str]:
    given = [
        "diagnose", "layers", f"--model={small_run.model_folder()}", "--data=scenes:validation:4",
        "--size=64x64", "--out=out",
        f"--examples={EXAMPLES}", f"--seeds={SEEDS}", "--steps=2", "--dtype=float32", "--text_tokens=16", "--batch=2",
    ]  # fmt: skip
    return small_run.last_of_each(*given, *more)


def rows(folder: str = "out") -> list[dict]:
    return [*map(json.loads, Path(folder, "rollouts.jsonl").read_text().splitlines())]


def make(name="mean", function=lambda inputs: inputs.edited.mean((2, 3, 4)), **options) -> Rollouts:
    """Rollouts of scenes in this folder."""
    given = {"examples": EXAMPLES, "seeds": range(SEEDS), "options": EditOptions(2, 2.5, 0), "batch": 2} | options
    model, source = open_model(str(small_run.model_folder())), Scenes("validation", 4, SIZE)
    return roll_out(model, None, source, Success(name, Local(function), {}), Path(), **given, **EDITING)


def drawn(effects=(0, 0, 0), examples=40, seeds=6) -> Rollouts:
    """Rollouts whose score is a part of the ACD of the blocks, beside noise and what makes prompts differ."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((examples, seeds))
    densities = rng.standard_normal((examples, seeds, 3, len(effects))) + rng.standard_normal((examples, 1, 1, 1))
    densities += np.array(effects) * scores[..., None, None]
    names = tuple(map(str, range(examples)))
    return Rollouts(names, tuple(range(seeds)), scores, densities)


# Rollouts


@pytest.mark.slow
def test_the_blocks_of_a_rollout_are_those_of_its_reward():
    """The mean over the last L blocks is R_acd as `rcgrpo evaluate` and training have it, of the same noise."""
    found = make()
    model, source = open_model(str(small_run.model_folder())), Scenes("validation", 4, SIZE)
    for layers in (1, BLOCKS):
        editor = model.open(EditorOptions(acd_layers=layers, **EDITING))
        edit_all(editor, source, range(EXAMPLES), Path(f"last-{layers}"), num_steps=2, seed=1, batch=2)
        wanted = [read_lines(Path(f"last-{layers}"))[name]["acd"] for name in found.names]
        np.testing.assert_allclose(found.densities[:, 1, 0, -layers:].mean(axis=-1), wanted, rtol=1e-6)
    assert len(np.unique(found.densities)) == found.densities.size


def test_the_halves_are_means_of_the_first_steps_and_of_the_last():
    densities = jnp.asarray([[1.0, 10], [2, 20], [6, 60]])
    assert block_means(densities).tolist() == [[3, 30], [1.5, 15], [4, 40]]
    assert block_means(densities[:1]).tolist() == [[1, 10]] * 3


def test_the_instructions_own_tokens_are_counted_alone_on_request():
    every, own = make(examples=2), make(examples=2, instruction_only=False)
    np.testing.assert_array_equal(every.densities, own.densities)  # from the file
    Path("rollouts.jsonl").unlink()
    Path("settings.json").unlink()
    own = make(examples=2, instruction_only=True)
    np.testing.assert_array_equal(own.scores, every.scores)
    assert (np.abs(own.densities / every.densities - 1) > 1e-3).mean() > 0.9


def test_what_has_no_score_is_asked_for_again_and_what_has_one_is_not():
    asked = []

    def score(inputs, fails):
        asked.append(len(inputs.edited))
        if fails and len(asked) == 1:
            raise Unscored("no answer")
        return inputs.edited.mean((2, 3, 4))

    torn = make(function=partial(score, fails=True))
    assert np.isnan(torn.scores).tolist() == [[True, False], [True, False], [False, False]]
    assert torn.causes == ("no answer",)
    assert np.isfinite(torn.densities).all()
    with Path("rollouts.jsonl").open("a") as file:
        file.write('{"name": "torn off')
    asked.clear()
    whole = make(function=partial(score, fails=False))
    assert asked == [2]
    assert np.isfinite(whole.scores).all()
    assert whole.causes == ()
    np.testing.assert_array_equal(whole.scores[2], torn.scores[2])
    make(function=partial(score, fails=False))  # what was torn off is gone
    assert asked == [2]


@pytest.mark.slow
def test_batches_and_devices_change_nothing():
    alone = make()
    Path("rollouts.jsonl").unlink()
    spread = make(batch=3, devices=jax.local_devices()[:2])  # one row is padding
    np.testing.assert_allclose(spread.densities, alone.densities, rtol=1e-4)
    np.testing.assert_allclose(spread.scores, alone.scores, rtol=1e-4)


# What they say


def test_the_blocks_that_tell_rollouts_apart_are_found():
    found = diagnose(drawn((0, 0, 1, 1.5)))
    assert [x.within_direction for x in found.single] == [0, 0, 1, 1]
    assert found.choice.layers == 2
    assert found.choice.block == 3
    assert found.choice.as_good == (2, 3)
    assert found.choice.held_out.low > 0.7
    assert found.choice.gain.high < 0
    assert found.last[0].within == found.single[-1].within
    assert found.counts == (40, 240, 0, 0, 120, 120, 40)
    assert "Recommended: acd.layers=2 of 4." in verdict(found, 1)[1]


def test_a_block_that_tells_the_wrong_way_is_said_to():
    found = diagnose(drawn((-2, 0, 0)))
    assert found.single[0].within_direction == -1
    assert found.single[0].within.high < 0.5
    text = "\n".join(verdict(found, 1))
    assert "No choice of acd.layers orders the rollouts of a prompt better than chance" in text
    assert "The better rollout has the lower ACD, beyond chance, with acd.layers of 3." in text
    assert "it has the lower in double 0." in text
    assert "(below)" in layer_tables(found, 1)[0].lines[1][2]


def test_blocks_without_a_connection_are_seldom_said_to_have_one():
    """Of 40 x 2 x 6 sets of blocks, corrected, no more than a few."""
    rng, said = np.random.default_rng(1), 0
    for _ in range(40):
        noise = drawn((0, 0, 0), 20, 4)
        found = diagnose(replace(noise, scores=rng.standard_normal(noise.scores.shape)))
        said += any(x.within_direction or x.across_direction for x in (*found.single, *found.last))
    assert said <= 8


def test_what_is_missing_is_counted_and_left_out():
    whole = drawn((0, 1, 1))
    scores, densities = whole.scores.copy(), whole.densities.copy()
    scores[0, 1], densities[3, 2, 0, 1] = NAN, NAN
    found = diagnose(replace(whole, scores=scores, densities=densities, causes=("no answer",)), 0.0)
    assert (found.counts.rollouts, found.counts.unscored, found.counts.not_finite) == (238, 1, 1)
    assert "1 more have no score (no answer). The ACD of 1 more is not finite." in verdict(found, 0, ("no answer",))[0]
    assert found.single[1].within.mean == pytest.approx(diagnose(whole, 0.0).single[1].within.mean, abs=0.02)


def test_a_threshold_moves_what_is_across_and_not_what_is_within():
    high, median = diagnose(drawn((0, 1)), 1.0), diagnose(drawn((0, 1)))
    assert high.counts.successes < median.counts.successes
    assert high.single[1].across != median.single[1].across
    assert high.single[1].within == median.single[1].within


def test_the_plot_has_a_ring_around_the_choice():
    pictures = [draw_areas(diagnose(drawn(effects)), 1) for effects in ((2, 0, 0), (0, 0, 2))]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(
    ("change", "threshold", "problem"),
    [
        ({}, 99.0, r"--threshold: with 99 all 240 rollouts are failures \(scores from -.* to .*\)"),
        ({}, -99.0, "--threshold: with -99 all 240 rollouts are successes"),
        ({"scores": np.ones((40, 6))}, None, "all 240 rollouts are successes"),
        ({"scores": np.repeat(np.arange(40.0)[:, None], 6, 1)}, None, "0 of 40 prompts have rollouts of different"),
        ({"scores": np.full((40, 6), NAN), "causes": ("no answer",)}, None, "none of 240 rollouts .*: no answer"),
    ],
    ids=["too high", "too low", "equal", "equal within", "no scores"],
)
def test_rollouts_that_nothing_could_separate_are_refused(change, threshold, problem):
    with pytest.raises(UserError, match=problem) as error:
        diagnose(replace(drawn(), **change), threshold)
    assert error.value.remedy


# The command


def test_the_command_writes_numbers_table_and_plot_and_goes_on(capsys):
    code, out, _ = small_run.run_command(capsys, *argv())
    assert code == 0
    first = rows()
    assert [(row["index"], row["seed"]) for row in first] == [(i, s) for s in range(SEEDS) for i in range(EXAMPLES)]
    assert all(len(part) == BLOCKS for row in first for part in row["acd"].values())
    numbers = json.loads(Path("out/layers.json").read_text())
    assert numbers["counts"]["rollouts"] == EXAMPLES * SEEDS
    assert [x["blocks"] for x in numbers["last"]] == [[2], [1, 2], [0, 1, 2]]
    assert numbers["settings"]["acd_layers"] == BLOCKS
    assert numbers["settings"]["reward"] == "oracle"
    assert numbers["double_blocks"] == 1
    assert numbers["seeds"] == [0, 1]
    table = Path("out/layers.md").read_text()
    assert all(f"| {name} |" in table for name in ("double 0", "single 0", "single 1"))
    assert table.splitlines()[-1][2:] in out
    assert Image.open("out/layers.png").width > 800
    threshold = sorted(row["score"] for row in first if row["index"] < 2)[1]
    code, again, _ = small_run.run_command(capsys, *argv("--seeds=3", f"--threshold={threshold}", "--examples=2"))
    assert code == 0
    assert rows()[: len(first)] == first
    assert [(row["index"], row["seed"]) for row in rows()[len(first) :]] == [(0, 2), (1, 2)]
    assert "6 rollouts of 2 examples" in again


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (["--seeds=1"], 2, "flag --seeds=1: 1 is not integer >= 2"),
        (["--examples=1"], 2, "flag --examples=1: 1 is not integer >= 2"),
        (["--threshold=high"], 2, "--threshold: 'high' found; a number or median was wanted"),
        (["--threshold=nan"], 2, "--threshold: 'nan' found"),
        (["--success=acd"], 2, "reward: 'acd' found"),
        (["--success=succes"], 2, "reward: 'succes' found"),
        (["--success=oracle", "--option=noise=much"], 2, "--option oracle.noise"),
        ([f"--data={small_run.data_folder()}"], 1, "no target image; the reward needs one"),
        (["--success=success", f"--data={small_run.data_folder()}"], 1, "no target image; the reward needs one"),
        (["--size=60x64"], 2, "multiples of 16 were wanted"),
        (["--out=scenes", "--data=scenes"], 2, "--out: scenes is --data scenes"),
    ],
    ids=lambda x: " ".join(x).replace(str(small_run.data_folder()), "small") if isinstance(x, list) else "",
)
def test_bad_requests(capsys, more, code, problem):
    Path("scenes").mkdir()
    found = small_run.fail(capsys, *argv(*more))
    assert found[0] == code
    assert problem in found[1]


def test_another_subject_is_unknown(capsys):
    code, problem, _ = small_run.fail(capsys, *["diagnose", "layer", *argv()[2:]])
    assert (code, problem) == (2, "unknown subject 'layer'; layers was wanted. Did you mean 'layers'?")


def test_a_measure_scores_as_an_evaluation_of_the_same_noise_does(capsys):
    code, _, _ = small_run.run_command(capsys, *argv("--success=success"))
    assert code == 0
    editor = open_model(str(small_run.model_folder())).open(EditorOptions(acd_layers=BLOCKS, **EDITING))
    source = Scenes("validation", 4)
    wanted = evaluate(editor, source, range(EXAMPLES), num_steps=2, seed=1, batch=2, size=(SIZE, SIZE))
    scores = [row["score"] for row in rows() if row["seed"] == 1]
    np.testing.assert_allclose(scores, wanted.measures["success"], rtol=1e-5)


def test_a_model_without_attention_masses_is_refused(monkeypatch):
    model = type(open_model(str(small_run.model_folder())))
    sizes = open_model(str(small_run.model_folder())).sizes._replace(num_blocks=0)
    monkeypatch.setattr(model, "sizes", sizes)
    with pytest.raises(UserError, match="reports the attention of no block"):
        make()


def test_other_rollouts_in_the_folder_are_refused():
    make()
    with pytest.raises(UserError, match=r"rollouts made otherwise found: steps: there 2, now 3"):
        make(options=EditOptions(3, 2.5, 0))
    with pytest.raises(UserError, match=r"reward: there 'mean', now 'other'"):
        make(name="other")
    text = Path("rollouts.jsonl").read_text()
    Path("rollouts.jsonl").write_text(text.replace("validation-00001", "validation-00009"))
    with pytest.raises(UserError, match="a rollout of another example 1, validation-00009"):
        make()
    Path("rollouts.jsonl").write_text(text + '{"name": 3}\n')
    with pytest.raises(UserError, match=r"rollouts.jsonl, line 7:") as error:
        make()
    assert error.value.remedy == "Delete that line: the rollout is made again."
