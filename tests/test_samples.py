"""How a run is judged while it goes on: galleries, held-out samples, the best checkpoint, and early ends."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax import struct

from rcgrpo_jax.cli.export import _step
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.options import with_changes
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.samples import Samples
from rcgrpo_jax.rl.setup import MOST_SAMPLES, set_up
from rcgrpo_jax.rl.trainer import post_train
from rcgrpo_jax.runs import run
from rcgrpo_jax.runs.best import MARK, Best, best_step, write_mark
from rcgrpo_jax.runs.grid import candidate_pixels, gallery_rows
from rcgrpo_jax.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
NAN = math.nan
HELD_OUT = "scenes:heldout:3"

# The gallery


def test_the_gallery_has_the_best_and_the_worst_by_each_reward_beside_their_sources():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 200, 200, 3), np.uint8)
    batch = EditBatch({}, pixels, np.zeros((2, 200, 200), np.float32), ("Make it red.", "Make it blue."))
    images = jnp.asarray(rng.random((2, 3, 200, 200, 3), np.float32))
    scores = {
        "colour": np.array([[0.2, NAN, 0.9], [0.5, 0.1, 0.3]]),
        "judge": np.full((2, 3), NAN),
        "total": np.array([[1.0, 3.0, 2.0], [NAN, NAN, NAN]]),
    }
    rows = gallery_rows(batch, images, scores)
    wanted = [("colour", ((0, 2), (1, 1))), ("total", ((0, 1), (0, 0)))]  # the judge has failed
    assert len(rows) == len(wanted)
    for row, (name, places) in zip(rows, wanted, strict=True):
        captions = [text for text, _ in row.pictures]
        (best, worst) = (f"{scores[name][place]:.3f}" for place in places)
        assert captions == ["source", f"best  {name} {best}", "source", f"worst  {name} {worst}"]
        for (p, i), source, edit in zip(places, row.pictures[::2], row.pictures[1::2], strict=True):
            np.testing.assert_array_equal(source[1], pixels[p])
            np.testing.assert_array_equal(edit[1], candidate_pixels(images[p, i]))
    assert rows[0].text == "colour, best: Make it red.  worst: Make it blue."


# Samples


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Two steps with samples before the first and after the second: the directory, and what was rolled out for them."""
    workdir, noises = tmp_path_factory.mktemp("run"), []
    judging = {"train__samples": HELD_OUT, "train__sample_every": 2, "train__best": "samples/colour"}
    config = small_run.make_config(train__num_steps=2, **judging)
    edit = Samples._edit

    def seen(params, lora, prompts, noise):
        noises.append((any(np.any(x) for x in jax.tree.leaves(lora)), noise))

    def watched(self, lora):
        programs = self._groups[0].programs
        with pytest.MonkeyPatch.context() as patch:
            rollout = programs.rollout
            patch.setattr(programs, "rollout", lambda *given: seen(*given) or rollout(*given))
            return edit(self, lora)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "_edit", watched)
        post_train(config, workdir, jax.devices()[:1])
    return workdir, noises


@pytest.mark.slow
def test_the_samples_are_scored_before_the_first_step_and_every_few(judged):
    names = {f"{kind}/{name}" for kind in ("samples", "samples_base")
             for name in ("colour", "preservation", "acd", "background_error")}  # fmt: skip
    lines = read_metrics(judged[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    found = [{name: x for name, x in line.items() if name.startswith("samples")} for line in lines]
    found = [{name: x for name, x in line.items() if name != "samples_per_second"} for line in found]
    assert [line.keys() for line in found] == [names, set(), names]
    for name in ("colour", "preservation", "acd", "background_error"):
        assert found[0][f"samples/{name}"] == found[0][f"samples_base/{name}"]  # a fresh adapter does nothing
        assert found[2][f"samples_base/{name}"] == found[0][f"samples_base/{name}"]
    assert found[2]["samples/acd"] != found[0]["samples/acd"]  # and a trained one something
    assert 0 < found[0]["samples/background_error"] < 1
    assert sorted(file.name for file in judged[0].glob("images/samples*")) == [
        "samples_000000.png", "samples_000002.png",
    ]  # fmt: skip


@pytest.mark.slow
def test_base_and_lora_start_from_the_noise_of_an_evaluation(judged):
    noises = judged[1]
    assert [adapted for adapted, _ in noises] == [False, True, True]  # the base once
    wanted = initial_noise(np.uint32(0), jnp.arange(3), noises[0][1].shape[2:])
    for _, noise in noises:
        np.testing.assert_array_equal(noise[:, 0], wanted)


@pytest.mark.slow
def test_the_best_step_is_marked(judged):
    assert best_step(judged[0] / "checkpoints") == 2


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 5),
        ({"rollout__micro_batch": 2}, 2),
        ({"rollout__decode_micro_batch": 4}, 8),  # in whole parts
        ({"rollout__group_size": 2}, 4),  # no more than candidates of a step
    ],
)
def test_samples_are_edited_in_parts_that_fit(changes, most):
    samples = Samples.__new__(Samples)
    samples._options, samples._mesh = small_run.make_options(**changes), make_mesh({}, jax.devices()[:1])
    assert samples._at_a_time(5) == most


def test_the_first_examples_alone_are_encoded(tmp_path, caplog):
    config = small_run.make_config(train__samples="scenes:heldout:20", data__cache=str(tmp_path))
    setup = set_up(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        assert len(setup.encode_samples(tmp_path)) == MOST_SAMPLES
        assert "scenes:heldout:20: the first 8 of 20 examples are used" in caplog.messages
        assert len(list(tmp_path.glob("*.safetensors"))) == MOST_SAMPLES
        assert set_up(small_run.make_config(), jax.devices()[:1]).encode_samples(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"samples": "FOLDER"}, "train.samples: .* found, which data.path names too; held-out ones were wanted"),
        ({"best": "samples/colour"}, "train.best: samples/colour without train.samples"),
        ({"samples": HELD_OUT, "best": "colour"}, r"train.best: 'colour' found; one of samples/.* was wanted"),
        ({"samples": HELD_OUT, "best": "samples/background_error"}, "train.best: 'samples/background_error' found"),
        ({"samples": HELD_OUT, "patience": 2}, "train.patience: 2 without train.best"),
        ({"sample_every": 0}, "train.sample_every: 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes, problem):
    config = small_run.make_config()
    config.train.update({name: config.data.path if x == "FOLDER" else x for name, x in changes.items()})
    with pytest.raises(UsageError, match=problem):
        validate(config, 1)


# The best checkpoint


def test_a_score_must_be_higher_to_be_better():
    best = Best("samples/colour", patience=2)
    found = [best.add(step, score) for step, score in enumerate((NAN, 0.5, 0.5, 0.7, NAN), 1)]
    assert found == [False, True, False, True, False]
    assert (best.step, best.waited, best.ends_run) == (4, 1, False)
    best.add(6, 0.1)
    assert best.ends_run
    assert not Best("samples/colour", 0, best.scores, best.step).ends_run


def test_a_run_that_resumes_knows_its_best_by_what_is_on_disk():
    lines = [{"step": 0, "m": 9.0}, *({"step": step, "m": x} for step, x in enumerate((3.0, 2.0, None, 1.0, 8.0), 1))]
    lines.insert(3, {"step": 2, "other": 5.0})
    best = Best.read("m", 2, lines, last=4, saved=[2, 4])  # step 1 has no checkpoint, 5 will be repeated
    assert (best.step, best.waited, best.ends_run) == (2, 2, True)
    assert [*best.scores] == [1, 2, 3, 4]
    assert Best.read("m", 0, lines, last=4, saved=[]).step is None


def test_a_mark_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"best\.json: not there"):
        best_step(tmp_path)
    write_mark(tmp_path, Best("m", 0, {3: 0.5}, 3))
    assert best_step(tmp_path) == 3
    for text, problem in (("{", "cannot be read"), ('{"step": 0, "metric": "m", "score": 1}', "step: 0 found")):
        (tmp_path / MARK).write_text(text)
        with pytest.raises(UserError, match=problem):
            best_step(tmp_path)
    write_mark(tmp_path, Best("m", 0))
    assert not (tmp_path / MARK).exists()


@struct.dataclass
class State:
    step: jax.Array


def run_toy(workdir, scores, **changes):
    """A run that scores every step; its last step, its checkpoints, and whether there was nothing to do."""
    options = with_changes(
        small_run.make_options().train,
        {"save_every": 100, "keep": 1, "num_steps": len(scores), "writers": ""} | changes,
    )

    def step(state, index, draw):
        return state.replace(step=state.step + 1), {"loss": 0.5, "samples/x": scores[index]}, {}

    with run.open_run(options, {}, workdir) as checkpointer:
        first = checkpointer.latest_step() or 0
        state = State(jnp.int32(first))
        best = run.read_best(workdir, checkpointer, "samples/x", options.patience)
        if finished := run.is_finished(state, options.num_steps, best):
            return first, checkpointer.steps(), finished
        given = (step, options, {}, workdir, checkpointer, "", 1, dict, best)
        state = run.run_steps(state, *given)
    return int(state.step), checkpointer.steps(), finished


def test_the_best_checkpoint_is_kept_beside_the_last_also_after_a_resume(tmp_path):
    scores = [0.1, 0.9, 0.3, 0.2, 0.4, 0.95]
    assert run_toy(tmp_path, scores[:3]) == (3, [2, 3], False)
    assert run_toy(tmp_path, scores[:5]) == (5, [2, 5], False)
    assert json.loads((tmp_path / "checkpoints" / MARK).read_text()) == {"metric": "samples/x", "step": 2, "score": 0.9}
    assert run_toy(tmp_path, scores)[0] == 6
    assert best_step(tmp_path / "checkpoints") == 6


def test_patience_ends_a_run_for_good_unless_it_is_raised(tmp_path, caplog):
    scores = [0.1, 0.9, 0.3, 0.2, 0.4, 0.5, 0.6]
    assert run_toy(tmp_path, scores, patience=2) == (4, [2, 4], False)
    line = "samples/x: the best is 0.9 at step 2, and train.patience is 2"
    assert caplog.messages[-1] == f"ended at step 4: {line}"
    assert run_toy(tmp_path, scores, patience=2) == (4, [2, 4], True)
    assert caplog.messages[-1] == f"nothing to do: {line}"
    assert run_toy(tmp_path, scores, patience=4) == (6, [2, 6], False)


def test_a_kill_between_the_best_checkpoint_and_its_mark_loses_nothing(tmp_path, monkeypatch):
    mark = run.write_mark

    def killed(folder, best):
        if best.step == 2:
            raise KeyboardInterrupt
        mark(folder, best)

    monkeypatch.setattr(run, "write_mark", killed)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, [0.1, 0.9, 0.3])
    assert best_step(tmp_path / "checkpoints") == 1
    monkeypatch.setattr(run, "write_mark", mark)
    assert run_toy(tmp_path, [0.1, 0.9, 0.3]) == (3, [2, 3], False)
    assert best_step(tmp_path / "checkpoints") == 2


@pytest.mark.slow
def test_a_run_that_ends_early_has_ended_well(tmp_path, monkeypatch, capsys):
    scores = iter([0.5, 0.4, 0.3])
    picture = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(Samples, "compare", lambda *_: ({"samples/colour": next(scores)}, picture))
    config = small_run.make_config(
        train__samples=HELD_OUT, train__sample_every=1, train__best="samples/colour", train__patience=1,
    )  # fmt: skip
    file = small_run.config_file(tmp_path / "config.py", config=config)
    code, out, error = small_run.run_command(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert code == 0, error
    assert str(tmp_path / "run" / "checkpoints" / "2") in out
    out = tmp_path / "lora"
    assert (
        small_run.run_command(capsys, "export", f"--workdir={tmp_path / 'run'}", "--step=best", f"--out={out}")[0] == 0
    )
    assert list(out.iterdir())


def test_a_step_is_a_number_or_best(tmp_path):
    class Values:
        workdir, step = tmp_path, "12"

    assert _step(Values) == 12
    Values.step = "-1"
    with pytest.raises(UsageError, match="a whole number or best was wanted"):
        _step(Values)
