"""Edits go into a folder as they are made, each once, whoever shares the work; pictures of any program are measured."""

import json
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.images import read_image, save_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation import edit
from rcgrpo_jax.evaluation.edit import edit_all
from rcgrpo_jax.evaluation.measure import measure
from rcgrpo_jax.evaluation.measures import Measure, base, register
from rcgrpo_jax.evaluation.pictures import PictureLog
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import make_tables, notes

COUNT, SIZE = 5, 48
SCENES = Scenes("heldout", COUNT, SIZE)
NAMES = [SCENES[i].name for i in range(COUNT)]


@cache
def editor() -> FluxKontextEditor:
    options = EditorOptions(max_text_tokens=16, attention="xla", acd_layers=10)
    return FluxKontextEditor(FluxKontext(small_run.model_folder()), options)


@pytest.fixture(autouse=True)
def made(monkeypatch) -> list[int]:
    """The indices that are edited from now on; an edit is the negative of its source, and R_acd index / 8."""
    indices: list[int] = []

    def negative(editor, batch, *_):
        indices.extend(int(index) for index in batch.indices[: batch.count])
        return 255 - batch.pixels, jnp.asarray(batch.indices / 8, jnp.float32)

    monkeypatch.setattr(edit, "_edit", negative)
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: None)
    monkeypatch.setattr(FluxKontextEditor, "params", {})
    return indices


def edit_into(folder, source=SCENES, indices=range(COUNT), **options) -> None:
    edit_all(editor(), source, indices, folder, **{"num_steps": 2, "batch": 2, **options})


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Editing


def test_a_folder_has_a_picture_and_a_line_of_each_example_and_the_settings_once(tmp_path, made):
    told = []
    edit_into(tmp_path, seed=7, lora={"x": {"A": np.ones(2)}}, progress=lambda: told.append(len(made)))
    assert told == [2, 2, 4, 4, 5]  # a batch at a time
    assert {file.name for file in tmp_path.iterdir()} == {
        "settings.json", "edits-0-of-1.jsonl", *(f"{name}.png" for name in NAMES),
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "edits-0-of-1.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        example = SCENES[index]
        np.testing.assert_array_equal(read_image(tmp_path / line["file"]), 255 - example.image)
        wanted = {"name": example.name, "index": index, "instruction": example.instruction, "acd": index / 8}
        assert line == wanted | {"file": f"{example.name}.png"}
    common = json.loads((tmp_path / "settings.json").read_text())
    assert (common["settings"]["seed"], common["settings"]["size"]) == (7, [SIZE, SIZE])
    assert common["origin"]["lora"]


@pytest.mark.parametrize("torn", [b"", b'{"name": "heldout-0', b"\0\0"])
def test_what_was_stopped_goes_on_and_what_is_there_is_not_made_again(tmp_path, made, torn):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    edit_into(whole)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_into(stopped, progress=stop)  # in the first batch, after its first edit
    with (stopped / "edits-0-of-1.jsonl").open("ab") as file:
        file.write(torn)
    (stopped / f"{NAMES[1]}.png").write_bytes(b"torn")  # a picture without its line
    made.clear()
    told = []
    edit_into(stopped, progress=lambda: told.append(None))
    assert made == [1, 2, 3, 4]
    assert len(told) == COUNT
    assert content(stopped) == content(whole)
    (stopped / f"{NAMES[3]}.png").unlink()
    made.clear()
    edit_into(stopped)
    assert made == [3]


def test_calls_that_share_the_work_make_each_edit_once(tmp_path, made):
    for share in ((1, 3), (2, 3)):
        edit_into(tmp_path, share=share)
    assert made == [1, 4, 2]
    edit_into(tmp_path)  # the rest, in one
    assert made == [1, 4, 2, 0, 3]
    assert len(measure(tmp_path, SCENES, measures=["acd"]).names) == COUNT
    with pytest.raises(UsageError, match="share: 3 of 3 found"):
        edit_into(tmp_path, share=(3, 3))


def test_two_calls_do_not_make_one_share_at_once(tmp_path, made):
    edit_into(tmp_path)
    with PictureLog(tmp_path, 0, 1), pytest.raises(UserError, match=r"edits-0-of-1\.jsonl: another process is making"):
        edit_into(tmp_path)
    with PictureLog(tmp_path, 0, 2):  # another share
        edit_into(tmp_path)


def test_processes_share_the_work(tmp_path, made, monkeypatch):
    monkeypatch.setattr(edit.jax, "process_index", lambda: 1)
    monkeypatch.setattr(edit.jax, "process_count", lambda: 2)
    monkeypatch.setattr(edit.distributed, "gather", lambda x: x)
    edit_into(tmp_path)
    assert made == [1, 3]


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"num_steps": 3}, "steps: there 2, now 3"),
        ({"solver": "heun"}, "solver: there 'euler', now 'heun'"),
        ({"guidance": 1.0}, "guidance: there 2.5, now 1.0"),
        ({"seed": 1}, "seed: there 0, now 1"),
        ({"size": (32, 64)}, "size: there [48, 48], now [32, 64]"),
        ({"lora": {"A": np.ones(2)}}, "lora: there None, now "),
        ({"source": Scenes("validation", COUNT, SIZE)}, "data: there "),
        ({"indices": range(4)}, "data: there "),
        ({"source": [SCENES[i] for i in range(COUNT)] * 2, "indices": range(COUNT, 2 * COUNT)}, "was edited as"),
    ],
    ids=["steps", "solver", "guidance", "seed", "size", "lora", "source", "indices", "repeated"],
)
def test_a_folder_that_was_made_otherwise_is_refused_with_what_differs(tmp_path, made, options, differs):
    edit_into(tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError) as error:
        edit_into(tmp_path, **options)
    assert differs in error.value.problem
    assert content(tmp_path) == before


def test_a_folder_of_before_there_were_solvers_is_eulers_and_goes_on(tmp_path, made):
    edit_into(tmp_path)
    file = tmp_path / "settings.json"
    common = json.loads(file.read_text())
    assert common["settings"].pop("solver") == "euler"
    file.write_text(json.dumps(common))
    made.clear()
    edit_into(tmp_path)
    assert not made
    assert measure(tmp_path, SCENES, measures=["acd"]).settings["solver"] == "euler"
    with pytest.raises(UserError, match="solver: there 'euler', now 'dpmpp_2m'"):
        edit_into(tmp_path, num_steps=3, solver="dpmpp_2m")


def test_another_model_and_pictures_of_another_program_are_refused(tmp_path, monkeypatch):
    edit_into(tmp_path / "edits")
    monkeypatch.setattr(FluxKontext, "whole_fingerprint", lambda self: "another")
    with pytest.raises(UserError, match=r"model: there '\w+\.\.\., now 'another'"):
        edit_into(tmp_path / "edits")
    save_image(tmp_path / "theirs" / "a.png", SCENES[0].image)
    with pytest.raises(UserError, match=r"pictures without settings.json found"):
        edit_into(tmp_path / "theirs")


def test_names_lead_nowhere_else_and_are_told_apart(tmp_path):
    example = SCENES[0]
    edit_into(tmp_path / "in", [replace(example, name="../a/b")], [0])
    assert (tmp_path / "in" / "%2E.%2Fa%2Fb.png").is_file()
    assert [x.name for x in tmp_path.iterdir()] == ["in"]
    assert measure(tmp_path / "in", [replace(example, name="../a/b")], measures=["acd"]).names == ("../a/b",)
    with pytest.raises(UserError, match="the examples 0 and 2 have this name"):
        edit_into(tmp_path / "twice", [example, SCENES[1], example], range(3))


# Measuring


def pictures_of(folder, names=NAMES) -> np.ndarray:
    """Saves the negatives as another program would, and returns them."""
    pictures = np.stack([255 - SCENES[i].image for i in range(len(names))])
    for name, picture in zip(names, pictures, strict=True):
        save_image(folder / f"{name}.png", picture)
    return pictures


def test_pictures_of_any_program_measure_as_the_same_ones_in_memory(tmp_path):
    pictures = pictures_of(tmp_path / "theirs")
    edit_into(tmp_path / "ours")
    chosen = ["psnr", "acd"]
    theirs, ours, array = (
        measure(x, SCENES, measures=chosen) for x in (tmp_path / "theirs", tmp_path / "ours", pictures)
    )
    for found in (theirs, ours, array):
        assert found.names == tuple(NAMES)
        np.testing.assert_array_equal(found.images, pictures)
        np.testing.assert_array_equal(found.measures["psnr"], array.measures["psnr"])
    assert theirs.of_pictures
    assert set(theirs.measures) == {"psnr"}
    assert "ACD is not measured: only the rollout that made an edit knows it." in notes(theirs, ours)
    np.testing.assert_array_equal(ours.measures["acd"], np.arange(COUNT, dtype=np.float32) / 8)
    assert ours.settings["steps"] == 2
    assert ours.settings["data"] == theirs.settings["data"]
    theirs.save(tmp_path / "a.npz")
    assert Evaluation.load(tmp_path / "a.npz").settings == theirs.settings
    (table, *_) = make_tables({"theirs": [theirs], "ours": [ours]})  # the data are the same, and so they compare
    assert [line[0] for line in table.lines] == ["variant", "theirs", "ours"]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_batches_change_nothing(tmp_path, batch):
    pictures = pictures_of(tmp_path)[[3, 1, 2]]
    found = measure(pictures, SCENES, [3, 1, 2], ["psnr"], batch=batch)
    whole = measure(tmp_path, SCENES, measures=["psnr"])
    np.testing.assert_allclose(found.measures["psnr"], whole.measures["psnr"][[3, 1, 2]], rtol=1e-6)


def test_a_picture_that_is_missing_or_of_another_size_is_named(tmp_path):
    pictures_of(tmp_path, NAMES[:3])
    with pytest.raises(UserError, match=rf"{NAMES[3]}.png: no such file; .* The folder has 3 .png files"):
        measure(tmp_path, SCENES, measures=["psnr"])
    save_image(tmp_path / f"{NAMES[1]}.png", np.zeros((SIZE, 64, 3), np.uint8))
    with pytest.raises(UserError, match=rf"{NAMES[1]}.png: 64x48 pixels found; 48x48 were wanted") as error:
        measure(tmp_path, SCENES, range(3), ["psnr"])
    assert "--size 64x48" in error.value.remedy
    (tmp_path / f"{NAMES[0]}.png").write_text("text")
    with pytest.raises(UserError, match=rf"{NAMES[0]}.png: the file is not an image"):
        measure(tmp_path, SCENES, range(3), ["psnr"])
    with pytest.raises(UserError, match="none: no such folder"):
        measure(tmp_path / "none", SCENES)


def test_what_takes_a_target_is_left_out_without_one_and_refused_where_some_have_one(tmp_path):
    without = [replace(SCENES[i], target=None) for i in range(COUNT)]
    pictures = pictures_of(tmp_path)
    found = measure(tmp_path, without, measures=["success", "psnr"])
    assert set(found.measures) == {"psnr"}
    assert any(note.startswith("edit success is not measured") for note in notes(found))
    make_tables({"a": [found]})
    with pytest.raises(UserError, match=f"{NAMES[2]}: no target image, and examples before it have theirs"):
        measure(pictures, [SCENES[0], SCENES[1], *without[2:]], measures=["success", "psnr"], batch=2)
    with pytest.raises(UserError, match=f"{NAMES[0]}: its target is flawed on purpose"):
        measure(pictures[:1], [replace(SCENES[0], flawed=True)], measures=["psnr"])


def test_a_size_that_no_memory_holds_is_refused_before_a_picture_is_made_so_large(tmp_path):
    with pytest.raises(
        UserError, match=r"size: 900000 x 900000 pixels, 5 pictures at a time, takes [\d,.]+ GiB at least"
    ):
        measure(tmp_path, SCENES, size=(900_000, 900_000))


def test_pictures_in_memory_have_their_shape():
    with pytest.raises(UsageError, match=r"uint8 \[4, 48, 48, 3\] found; uint8 \[5, 48, 48, 3\] were wanted"):
        measure(np.zeros((4, SIZE, SIZE, 3), np.uint8), SCENES)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("settings.json", "{}", "settings: {} found"),
        ("settings.json", "text", "settings.json: not JSON"),
        ("edits-0-of-1.jsonl", "text\n", "edits-0-of-1.jsonl, line 1: not JSON"),
        ("edits-0-of-1.jsonl", '{"name": 1}\n', "edits-0-of-1.jsonl, line 1:"),
        ("edits-0-of-1.jsonl", "", f"the picture of {NAMES[0]} has no line"),
    ],
)
def test_a_folder_that_is_damaged_is_told_in_words(tmp_path, file, text, problem):
    edit_into(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as error:
        measure(tmp_path, SCENES, measures=["psnr"])
    assert problem in error.value.problem


def test_edits_of_other_data_of_the_same_names_are_refused(tmp_path):
    edit_into(tmp_path)
    other = [replace(SCENES[i], instruction="Another.") for i in range(COUNT)]
    with pytest.raises(UserError, match="its edits are of data of the digest"):
        measure(tmp_path, other, measures=["psnr"])


def test_a_measure_is_one_registered_entry(monkeypatch):
    monkeypatch.setattr(base, "_MEASURES", dict(base._MEASURES))
    brightness = Measure(
        "brightness", "brightness", 1, "↑", lambda inputs, top, index: inputs.edited.max((1, 2, 3)) * top + index,
        load=lambda options: np.float32(2), read=lambda source, index: np.float32(index),
    )  # fmt: skip
    register(brightness)
    found = measure(np.full((COUNT, SIZE, SIZE, 3), 255, np.uint8), SCENES, measures=["brightness"], batch=2)
    np.testing.assert_array_equal(found.measures["brightness"], 2 + np.arange(COUNT))
    with pytest.raises(ValueError, match="registered twice"):
        register(brightness)
    with pytest.raises(UsageError, match="'brightnes' found") as error:
        measure(np.zeros((COUNT, SIZE, SIZE, 3), np.uint8), SCENES, measures=["brightnes"])
    assert "'brightness'" in error.value.remedy


# The command


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--model=small-editor"], "both --model and --pictures found"),
        (["--steps=4"], "--steps: found with --pictures"),
        (["--lora=a"], "--lora: found with --pictures"),
        (["--pictures={}/other/theirs"], "folders of different names were wanted"),
        (["--out={}/theirs/out"], "which is read"),
        (["--data=scenes:heldout:6"], "no such file; the edit of the example heldout-00005-replace was wanted"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(tmp_path, argv, problem):
    pictures_of(tmp_path / "theirs")
    given = [f"--data=scenes:heldout:{COUNT}", f"--out={tmp_path / 'out'}", f"--size={SIZE}x{SIZE}"]
    changed = [x.format(tmp_path) for x in argv]
    given = [x for x in given if x.split("=")[0] not in {change.split("=")[0] for change in changed}]
    with pytest.raises(UserError) as error:
        command.run([f"--pictures={tmp_path / 'theirs'}", *given, *changed])
    assert problem in error.value.problem
    assert not list(tmp_path.rglob("*.npz"))


def test_either_a_model_or_pictures_are_named(tmp_path):
    with pytest.raises(UsageError, match="neither --model nor --pictures"):
        command.run([f"--out={tmp_path}", "--data=scenes:heldout:1"])


def test_the_command_keeps_edits_and_goes_on_with_them(tmp_path, made):
    argv = [f"--model={small_run.model_folder()}", f"--data=scenes:heldout:{COUNT}", f"--size={SIZE}x{SIZE}"]
    argv += ["--dtype=float32", "--text_tokens=16", "--steps=2", f"--edits={tmp_path / 'edits'}"]
    command.run([*argv, f"--out={tmp_path / 'a'}"])
    assert made == [*range(COUNT)]
    (tmp_path / "edits" / "base" / f"{NAMES[2]}.png").unlink()
    command.run([*argv, f"--out={tmp_path / 'b'}"])
    assert made == [*range(COUNT), 2]
    first, again = (Evaluation.load(tmp_path / out / "base.npz") for out in "ab")
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.measures["acd"], np.arange(COUNT, dtype=np.float32) / 8)
    assert first.settings == again.settings
    with pytest.raises(UserError, match="steps: there 2, now 3"):
        command.run([*argv[:-2], "--steps=3", argv[-1], f"--out={tmp_path / 'c'}"])
