"""Edits in the nearest of Kontext's shapes: each in its own, a program a shape, and one size as it was."""

import json
from collections import defaultdict

import gedit_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from judge_server import serving
from PIL import Image

from rcgrpo_jax.cli import benchmark as benchmark_command
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.buckets import KONTEXT, make_buckets
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import resize_image
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation import edit
from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS
from rcgrpo_jax.evaluation.edit import edit_all
from rcgrpo_jax.evaluation.measure import measure
from rcgrpo_jax.parallel.mesh import make_mesh

SIZE = (64, 64)
SOURCES = ((40, 40), (40, 60), (60, 40), (44, 60), (41, 40), (30, 80), (40, 41))  # (height, width)


class Shapes:
    """Pictures of several shapes, of one kind of edit."""

    def __init__(self, task: str = "add"):
        self._task = task

    def __len__(self) -> int:
        return len(SOURCES)

    def __getitem__(self, index: int) -> EditExample:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*SOURCES[range(len(self))[index]], 3), np.uint8)
        return EditExample(f"{index}", image, np.ones(image.shape[:2], np.float32), f"Edit {index}.", task=self._task)


@pytest.fixture
def made(monkeypatch) -> list[tuple]:
    """The batches that are edited from now on, as shape and indices; an edit is the negative of its source."""
    batches: list[tuple] = []

    def negative(editor, batch, *_):
        batches.append((batch.pixels.shape, batch.indices[: batch.count].tolist()))
        return 255 - batch.pixels, jnp.zeros(len(batch.indices))

    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(edit, "_edit", negative)
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: None)
    monkeypatch.setattr(FluxKontextEditor, "params", {})
    return batches


def editor() -> FluxKontextEditor:
    model = FluxKontext(small_run.model_folder())
    return model.open(EditorOptions(dtype="float32", max_text_tokens=16), make_mesh({}, jax.devices()[:1]))


def edits_of(folder) -> dict[str, np.ndarray]:
    return {file.stem: np.asarray(Image.open(file)) for file in folder.glob("*.png")}


def make(folder, **options) -> None:
    edit_all(editor(), Shapes(), range(len(SOURCES)), folder, num_steps=2, batch=2, size=SIZE, **options)


def test_each_edit_has_the_nearest_shape_of_the_area_and_shows_the_whole_source(tmp_path, made):
    make(tmp_path, buckets=KONTEXT)
    buckets = make_buckets(KONTEXT, SIZE)
    found = edits_of(tmp_path)
    assert len(found) == len(SOURCES)
    assert len({x.shape for x in found.values()}) > 2
    for index, source in enumerate(SOURCES):
        size = buckets.nearest(*source)
        np.testing.assert_array_equal(found[f"{index}"], 255 - resize_image(Shapes()[index].image, size))


def test_a_shape_has_one_program_and_every_example_is_edited_once(tmp_path, made):
    make(tmp_path, buckets=KONTEXT)
    rows = defaultdict(set)
    for (count, *shape), _ in made:
        rows[tuple(shape)].add(count)
    assert all(len(counts) == 1 for counts in rows.values())
    assert sorted(index for _, indices in made for index in indices) == [*range(len(SOURCES))]


def test_a_call_that_was_stopped_goes_on_in_batches_of_the_same_rows(tmp_path, made):
    make(tmp_path / "whole", buckets=KONTEXT)
    made.clear()
    make(tmp_path / "half", buckets=KONTEXT, share=(0, 2))
    (shape,) = (shape for shape, indices in made if 4 in indices)
    assert shape[0] == 2  # 0 has that shape, too
    lines = tmp_path / "half" / "edits-0-of-2.jsonl"
    lines.write_text("".join(line for line in lines.open() if json.loads(line)["index"] != 4))
    made.clear()
    make(tmp_path / "half", buckets=KONTEXT, share=(0, 2))
    assert made == [(shape, [4])]
    make(tmp_path / "half", buckets=KONTEXT, share=(1, 2))
    whole, half = edits_of(tmp_path / "whole"), edits_of(tmp_path / "half")
    assert whole.keys() == half.keys()
    for name, picture in whole.items():
        np.testing.assert_array_equal(picture, half[name])


def test_one_size_is_the_default_and_its_settings_are_as_before(tmp_path, made):
    make(tmp_path)
    assert {x.shape[:2] for x in edits_of(tmp_path).values()} == {SIZE}
    assert [indices for _, indices in made] == [[0, 1], [2, 3], [4, 5], [6]]
    assert "buckets" not in json.loads((tmp_path / "settings.json").read_text())["settings"]
    with pytest.raises(UserError, match="buckets: there None, now 'kontext'"):
        make(tmp_path, buckets=KONTEXT)


def test_edits_of_several_shapes_are_not_measured_as_of_one(tmp_path, made):
    make(tmp_path, buckets=KONTEXT)
    with pytest.raises(UserError, match="edits in the shapes of kontext found; edits of one size were wanted"):
        measure(tmp_path, Shapes())


def test_shapes_are_of_a_benchmark_alone(tmp_path):
    with pytest.raises(UsageError, match="--buckets: found without --benchmark"):
        command.run(["--data=x", f"--out={tmp_path}", "--model=small-editor", "--buckets=kontext"])


@pytest.mark.parametrize(("argv", "wanted"), [([], {(64, 64), (48, 80)}), (["--buckets=none"], {(64, 64)})])
def test_a_model_edits_a_benchmark_in_shapes_and_a_judge_sees_the_sizes_of_the_sources(
    tmp_path, made, monkeypatch, argv, wanted
):
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: Shapes("adjust"))
    (tmp_path / "prompts.json").write_text(json.dumps(gedit_data.imgedit_prompts()))
    given = ["--benchmark=imgedit", "--data=x", f"--model={small_run.model_folder()}", "--dtype=float32", "--steps=2"]
    given += ["--text_tokens=16", "--batch=2", f"--out={tmp_path / 'out'}", "--size=64x64", "--judge=imgedit"]
    with serving(gedit_data.imgedit_answer) as server:
        options = [f"urls={server.url}", "model=tiny", f"prompts={tmp_path / 'prompts.json'}"]
        command.run([*given, *(f"--judge_option={option}" for option in options), *argv])
        bodies = [body for body in server.bodies if "Edit" in gedit_data.said(body)]
    assert {x.shape[:2] for x in edits_of(tmp_path / "out" / "edits" / "base").values()} >= wanted
    seen = sorted(tuple(picture.shape[:2] for picture in gedit_data.shown(body)) for body in bodies)
    assert seen == sorted((size, size) for size in SOURCES)
    assert f"| base | measured | {len(SOURCES)} | 3.000 " in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_a_shape_is_compiled_once_and_edited_as_it_is_alone(tmp_path, monkeypatch):
    compiled = edit._edit_latents._cache_size()
    sizes = {index: make_buckets(KONTEXT, SIZE).nearest(*SOURCES[index]) for index in (0, 1, 4)}  # two of one shape
    edit_all(editor(), Shapes(), [*sizes], tmp_path / "all", num_steps=2, batch=2, size=SIZE, buckets=KONTEXT)
    assert edit._edit_latents._cache_size() - compiled == len(set(sizes.values())) == 2
    found = edits_of(tmp_path / "all")
    for size in set(sizes.values()):
        indices = [index for index, other in sizes.items() if other == size]
        folder = tmp_path / f"{size}"
        edit_all(editor(), Shapes(), indices, folder, num_steps=2, batch=2, size=size)
        for name, picture in edits_of(folder).items():
            np.testing.assert_array_equal(picture, found[name])


@pytest.mark.parametrize(("argv", "shapes"), [([], {SIZE}), (["--buckets=kontext"], {(64, 64), (48, 80), (80, 48)})])
def test_compbench_is_edited_in_one_size_or_in_shapes_and_measured_in_its_own(
    tmp_path, made, monkeypatch, argv, shapes
):
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: Shapes())
    monkeypatch.setitem(BENCHMARKS, "compbench", BENCHMARKS["compbench"]._replace(side=32, measures=("psnr",)))
    given = ["--benchmark=compbench", "--data=x", f"--model={small_run.model_folder()}", "--dtype=float32"]
    given += ["--steps=2", "--text_tokens=16", "--batch=2", f"--out={tmp_path / 'out'}", "--size=64x64"]
    command.run([*given, *argv])
    found = {x.shape[:2] for x in edits_of(tmp_path / "out" / "edits" / "base").values()}
    assert found >= shapes
    rows = [json.loads(line) for line in (tmp_path / "out" / "base.jsonl").read_text().splitlines()]
    assert len(rows) == len(SOURCES)
