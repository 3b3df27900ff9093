"""`rcgrpo data mask`: its folder is one to train on, goes on where it was stopped, and names what it left out."""

import dataclasses
import errno
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.data.example import NOTHING, UNMASKED
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.masking.editor import editor_method
from rcgrpo_jax.masking.folder import LOG, SKIPPED, TABLE, make_masks
from rcgrpo_jax.masking.method import HALF, Finish, Method, MethodOptions

COUNT = 3


@pytest.fixture
def unmasked(tmp_path):
    """A folder of scenes without masks; its last two examples have no target, and one that is no other picture."""
    folder, lines = tmp_path / "unmasked", []
    folder.mkdir()
    scenes = Scenes("train", COUNT + 2, size=64)
    for i in range(COUNT + 2):
        line = {"image": f"{i}.png", "instruction": scenes[i].instruction}
        Image.fromarray(scenes[i].image).save(folder / f"{i}.png")
        if i != COUNT:
            line["target"] = f"{i}_target.png"
            target = scenes[i].target if i < COUNT else scenes[i].image
            Image.fromarray(target).save(folder / line["target"])
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def make(folder, out, *flags):
    return main(["data", "mask", f"--from={folder}", "--method=difference", f"--out={out}", *flags])


def test_found_masks_are_a_folder_to_train_on_and_the_rest_is_named(unmasked, tmp_path, capsys):
    out = tmp_path / "masked"
    before = sorted((file.name, file.read_bytes()) for file in unmasked.iterdir())
    assert make(unmasked, out) == 0
    said = capsys.readouterr().out
    source, scenes = EditFolder(out), Scenes("train", COUNT, size=64)
    assert len(source) == COUNT
    for i in range(COUNT):
        example, exact = source[i], scenes[i].mask > 0
        found = example.mask > 0
        np.testing.assert_array_equal(example.image, scenes[i].image)
        np.testing.assert_array_equal(example.target, scenes[i].target)
        assert example.instruction == scenes[i].instruction
        assert set(np.unique(example.mask)) == {0, 1}
        assert (found & exact).sum() / (found | exact).sum() > 0.5
    reasons = [json.loads(line)["reason"] for line in (out / SKIPPED).read_text().splitlines()]
    assert "00004-3: no target image" in reasons[0]
    assert "00005-4: the mask came out empty" in reasons[1]
    assert "3 masks" in said
    assert "2 examples left out" in said
    assert all(reason in said for reason in reasons)
    assert sorted((file.name, file.read_bytes()) for file in unmasked.iterdir()) == before
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 160


def test_soft_masks_are_read_back_as_they_were_found(unmasked, tmp_path):
    assert make(unmasked, tmp_path / "masked", "--soft") == 0
    mask = EditFolder(tmp_path / "masked")[0].mask
    assert len(np.unique(mask)) > 10
    assert mask.max() == 1


class Counted:
    """A method that marks a corner, and counts what it was asked."""

    def __init__(self):
        self.names = []

    def __call__(self, example):
        self.names.append(example.name)
        scores = np.zeros(example.image.shape[:2], np.float32)
        scores[:20, :20] = 1
        return scores


def masks_of(folder, out, settings=()):
    counted = Counted()
    source = open_source(str(folder), needs=UNMASKED)
    made = make_masks(source, out, Method(counted, dict(settings)), Finish(), {"method": "corner"})
    return made, counted.names


def test_what_is_there_is_not_made_again_unless_its_pictures_changed(unmasked, tmp_path):
    out = tmp_path / "masked"
    first, asked = masks_of(unmasked, out)
    assert len(asked) == len(first.lines) == COUNT + 2
    again, asked = masks_of(unmasked, out)
    assert (asked, again.kept, again.lines) == ([], COUNT + 2, first.lines)
    Image.new("RGB", (64, 64), "red").save(unmasked / "1.png")
    (out / first.lines[0]["mask"]).unlink()
    _, asked = masks_of(unmasked, out)
    assert asked == ["00001-0", "00002-1"]


def test_a_call_that_was_killed_goes_on(unmasked, tmp_path):
    out = tmp_path / "masked"
    masks_of(unmasked, out)
    lines = (out / LOG).read_bytes().splitlines(keepends=True)
    (out / LOG).write_bytes(b"".join(lines[:2]) + lines[2][:30])
    (out / TABLE).unlink()
    made, asked = masks_of(unmasked, out)
    assert asked == ["00003-2", "00004-3", "00005-4"]
    assert len(EditFolder(out)) == len(made.lines) == COUNT + 2
    assert masks_of(unmasked, out)[1] == []


def test_what_cannot_be_read_is_left_out_and_masks_that_are_there_are_not_looked_at(unmasked, tmp_path):
    table = unmasked / "metadata.jsonl"
    first = json.loads(table.read_text().splitlines()[0])
    (unmasked / "loop.png").symlink_to("loop.png")
    os.mkfifo(unmasked / "pipe.png")
    (unmasked / "void.png").touch()
    (unmasked / f"{'n' * 250}.png").symlink_to("0.png")
    bad = [{"image": x} for x in ("loop.png", "pipe.png", "void.png", "none.png", f"{'n' * 250}.png")]
    odd = [{"mask": {"counts": [1], "size": [2, 2]}}, {"mask": "none.png", "mask_value": True}]
    table.write_text("\n".join(json.dumps(first | change) for change in [{}, *bad, {"target": "loop.png"}, *odd]))
    made, _ = masks_of(unmasked, tmp_path / "masked")
    assert [line["image"] for line in made.lines] == [f"images/0000{i}-0.png" for i in (1, 8, 9)]
    problems = (
        "no file .*loop",
        "no file .*pipe",
        "an empty file",
        "no file .*none",
        "a name that long",
        "no file .*loop",
    )
    for skipped, problem in zip(made.skipped, problems, strict=True):
        assert re.search(problem, skipped["reason"])


@pytest.mark.parametrize("left", [0, 0.5])
@pytest.mark.parametrize("field", ["image", "mask", "target"])
def test_a_picture_that_was_torn_is_made_again(unmasked, tmp_path, field, left):
    file = tmp_path / "masked" / masks_of(unmasked, tmp_path / "masked")[0].lines[1][field]
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    assert masks_of(unmasked, tmp_path / "masked")[1] == ["00002-1"]
    assert file.read_bytes() == whole


def test_a_full_disk_stops_and_skips_nothing(unmasked, tmp_path, monkeypatch):
    written, save = [], Image.Image.save

    def fill(self, path, *args):
        written.append(path)
        save(self, path, *args)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fill)
        with pytest.raises(UserError, match="No space left"):
            masks_of(unmasked, tmp_path / "masked")
    assert not (tmp_path / "masked" / TABLE).exists()
    (tmp_path / "masked" / "images" / f".{'a' * 32}.partial").touch()  # of a kill
    masks_of(unmasked, tmp_path / "masked")
    masks_of(unmasked, tmp_path / "whole")
    one, two = ({x.relative_to(d): x.read_bytes() for x in d.rglob("*") if x.is_file() and x.name != "lock"}
                for d in (tmp_path / "masked", tmp_path / "whole"))  # fmt: skip
    assert one == two


def test_examples_whose_pictures_would_have_one_name_do_not_share_them(tmp_path):
    scene = Scenes("train", 1, size=64)[0]
    source = [dataclasses.replace(scene, name=name) for name in ("a/b", "a%2Fb")]
    made = make_masks(source, tmp_path / "masked", Method(Counted(), {}), Finish(), {})
    assert [(len(made.lines), x["reason"]) for x in made.skipped] == [(1, "a%2Fb.png: another example has this name.")]


def test_masks_of_other_settings_and_other_folders_are_left_alone(unmasked, tmp_path):
    out = tmp_path / "masked"
    masks_of(unmasked, out, {"side": 20})
    with pytest.raises(UserError, match="made otherwise: side: there 20, now 30"):
        masks_of(unmasked, out, {"side": 30})
    other = tmp_path / "other"
    other.mkdir()
    (other / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds metadata\.jsonl and no masks\.json"):
        masks_of(unmasked, other)


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        (["--method=segment"], 2, "no --segmenter found"),
        (["--method=editor"], 2, "no --model found"),
        (["--method=difference", "--seed=1"], 2, "--seed: found with --method difference; it belongs to editor"),
        (["--method=difference", "--soft", "--threshold=0.2"], 2, "--soft: found with --threshold"),
        (["--method=editor", "--model=nowhere"], 1, "nowhere"),
        (["--method=editor", "--model=small-editor", "--size=100x100"], 2, "multiples of 16 pixels"),
        (["--method=editor", "--model=small-editor", "--size=9999999x9999999"], 1, "GiB at least; this machine has"),
        (["--method=segment", "--segmenter=nowhere.onnx"], 1, "there is no such file"),
    ],
)
def test_mistakes_are_two_lines(unmasked, tmp_path, capsys, flags, code, problem):
    assert main(["data", "mask", f"--from={unmasked}", f"--out={tmp_path / 'masked'}", *flags]) == code
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if not line.startswith("devices:")]
    assert len(said) == 2
    assert problem in said[0]
    assert not (tmp_path / "masked").exists()


def test_masks_are_not_written_where_the_examples_are(unmasked, capsys):
    assert make(unmasked, unmasked) == 2
    assert "which is read" in capsys.readouterr().err


def test_no_mask_at_all_is_a_failure(unmasked, tmp_path, capsys):
    rows = [json.loads(line) for line in (unmasked / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({field: row[field] for field in ("image", "instruction")}) for row in rows]
    (unmasked / "metadata.jsonl").write_text("\n".join(lines))
    assert make(unmasked, tmp_path / "masked") == 1
    assert "none of 5 examples got a mask; 00001-0: no target image" in capsys.readouterr().err


def test_a_folder_of_images_and_instructions_needs_no_masks_where_nobody_does(unmasked, tmp_path):
    for part, text in (("images", None), ("instructions", "Make it red.")):
        (tmp_path / "parts" / part).mkdir(parents=True)
        if text:
            (tmp_path / "parts" / part / "a.txt").write_text(text)
    (unmasked / "0.png").rename(tmp_path / "parts/images/a.png")
    assert EditFolder(tmp_path / "parts", needs=NOTHING)[0].mask.all()
    with pytest.raises(UserError, match="masks/a"):
        EditFolder(tmp_path / "parts")


@pytest.mark.usefixtures("one_device")
def test_the_editor_marks_something_by_an_instruction_and_nothing_without(folder):
    method = editor_method(MethodOptions(model=str(folder), size=(32, 32), dtype="float32"))
    example = Scenes("train", 1, size=64)[0]
    scores = method.scores(example)
    assert scores.shape == (64, 64)
    assert scores.min() == 0
    assert scores.max() == 1
    empty = type(example)(**{**vars(example), "instruction": ""})
    assert not method.scores(empty).any()


@pytest.mark.slow
@pytest.mark.usefixtures("full_optimization", "one_device")
def test_the_small_editor_finds_what_is_to_be_removed(tmp_path):
    flags = ["--method=editor", "--model=small-editor", "--size=128x128", "--dtype=float32", f"--out={tmp_path / 'a'}"]
    assert main(["data", "mask", "--from=scenes:validation/remove:8", *flags]) == 0
    scenes, found = Scenes("validation", 8, kinds=("remove",)), EditFolder(tmp_path / "a")
    masks = [(found[i].mask >= HALF, scenes[i].mask > 0) for i in range(8)]
    assert np.mean([(a & b).sum() / (a | b).sum() for a, b in masks]) > 0.35
