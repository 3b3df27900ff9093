"""Examples come out of folders and JSONL files as they were put in, or the gap is named."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.data import EditExample, EditFolder, Needs, check_example
from rcgrpo_jax.errors import UsageError, UserError

UNICODE = "  把杯子涂成红色 🎨\u2028« noch röter »"


def example(**changes) -> EditExample:
    whole = EditExample("cup", np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.float32), "Paint the cup red")
    return replace(whole, **changes)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, their masks (the left 4 columns white), and a third picture; nothing that lists them yet."""
    for name in ("images", "masks", "instructions"):
        (tmp_path / name).mkdir()
    mask = np.zeros((20, 30), np.uint8)
    mask[:, :4] = 255
    for i, name in enumerate(("a", "b", "target")):
        Image.new("RGB", (30, 20), (i, 0, 0)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def write_lines(folder, *rows, name="metadata.jsonl"):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def row(name="a", **changes) -> dict:
    return {"image": f"images/{name}.png", "mask": f"masks/{name}.png", "instruction": f"edit {name}", **changes}


def test_a_good_example_passes_unchanged():
    whole = example(instruction=UNICODE, target=np.zeros((20, 30, 3), np.uint8))
    assert check_example(whole) is whole
    check_example(example(image=np.zeros((16, 16, 3), np.uint8), mask=np.ones((16, 16), np.float32)))


@pytest.mark.parametrize(("changes", "problem"), [
    ({"image": np.zeros((1, 1, 3), np.uint8)}, "the image is 1 x 1 pixels; at least 16 x 16"),
    ({"image": np.zeros((15, 64, 3), np.uint8)}, "the image is 64 x 15 pixels"),
    ({"mask": np.ones((30, 20), np.float32)}, "the mask is 20 x 30 pixels; the image's 30 x 20"),
    ({"target": np.zeros((40, 60, 3), np.uint8)}, "the target is 60 x 40 pixels; the image's 30 x 20"),
    ({"mask": np.zeros((20, 30), np.float32)}, "the mask is empty"),
    ({"mask": np.full((20, 30), np.nan, np.float32)}, "mask values from nan"),
    ({"mask": np.full((20, 30), 255, np.float32)}, r"to 255\.0 found"),
    ({"mask": np.full((20, 30), -1, np.float32)}, r"from -1\.0"),
    ({"instruction": " \n"}, "the instruction is blank"),
    ({"instruction": "Make it red \ud83d"}, r"'Make it red \\ud83d' is not whole Unicode"),
    ({"caption": "A red \ud83d"}, r"the caption 'A red \\ud83d' is not whole Unicode"),
])  # fmt: skip
def test_unusable_examples_are_refused_by_name(changes, problem):
    with pytest.raises(UserError, match=problem) as caught:
        check_example(example(**changes))
    assert caught.value.problem.startswith("cup: ")


def test_jsonl_in_a_folder(folder):
    write_lines(
        folder,
        row("a", instruction=UNICODE, caption="eine rote Tasse", target="images/target.png"),
        "",
        row("b", mask_polarity="black", caption=None),
        row("a"),
    )
    source = EditFolder(folder)
    assert len(source) == 3
    first, second, third = (source[i] for i in range(3))
    assert [first.name, second.name, third.name] == ["00001-a", "00003-b", "00004-a"]
    assert first.instruction == UNICODE
    assert first.caption == "eine rote Tasse"
    assert (first.target == [2, 0, 0]).all()
    assert first.mask[0].tolist() == [1.0] * 4 + [0.0] * 26
    assert (second.image == [1, 0, 0]).all()
    assert (second.mask == 1 - first.mask).all()
    assert second.caption is second.target is None
    assert source[-1].name == third.name
    with pytest.raises(IndexError):
        source[3]


def test_supervised_triples_need_no_mask_and_flawed_targets_say_so(folder):
    line = row("a", target="images/target.png", flawed=True)
    del line["mask"]
    write_lines(folder, line, row("a", mask_polarity="black"))
    with pytest.raises(
        UserError, match=r"line 1: the field 'mask' is missing; found .*; an edit by region needs 'mask'\."
    ) as error:
        EditFolder(folder)
    assert error.value.remedy == "Add 'mask' to the line. `rcgrpo data mask` finds masks for examples that have none."
    whole, part = (EditFolder(folder, needs=Needs())[i] for i in range(2))
    assert whole.mask.shape == whole.image.shape[:2]
    assert whole.mask.dtype == part.mask.dtype
    assert (whole.mask == 1).all()
    assert part.mask[0].tolist() == [0.0] * 4 + [1.0] * 26
    assert (whole.flawed, part.flawed) == (True, False)


def test_jsonl_by_its_own_path_and_with_other_field_names(folder):
    path = write_lines(folder, {"src": "images/a.png", "m": "masks/a.png", "text": "go"}, name="train.jsonl")
    fields = {"image_field": "src", "mask_field": "m", "instruction_field": "text"}
    source = pickle.loads(pickle.dumps(EditFolder(path, polarity="black", **fields)))  # as a data worker gets it
    assert source[0].instruction == "go"
    assert source[0].mask[0].tolist() == [0.0] * 4 + [1.0] * 26


def test_folders_of_triples(folder):
    for name, text in (("b", UNICODE + "\n"), ("a", "edit a"), ("target", "edit c")):
        (folder / "instructions" / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "images" / "._a.png").touch()  # as macOS leaves beside its files
    (folder / "images" / "README.md").touch()
    source = EditFolder(folder)
    assert [source[i].name for i in range(len(source))] == ["a", "b", "target"]
    assert source[1].instruction == UNICODE.strip()
    assert (source[1].image == [1, 0, 0]).all()
    assert EditFolder(folder, polarity="black")[0].mask[0].tolist() == [0.0] * 4 + [1.0] * 26


def test_pixels_are_read_when_asked_for(folder):
    write_lines(folder, row("a"), row("b"))
    (folder / "images" / "a.png").write_text("damaged")
    source = EditFolder(folder)
    assert source[1].name == "00002-b"
    with pytest.raises(UserError, match=r"a\.png: the file is not an image"):
        source[0]


def test_examples_are_checked_when_read(folder):
    write_lines(folder, row("a"))
    Image.new("L", (30, 21), 255).save(folder / "masks" / "a.png")
    with pytest.raises(UserError, match="00001-a: the mask is 30 x 21 pixels"):
        EditFolder(folder)[0]


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        EditFolder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no examples found; metadata\.jsonl, or images/"):
        EditFolder(tmp_path)
    write_lines(tmp_path, "")
    with pytest.raises(UserError, match="no examples found"):
        EditFolder(tmp_path)


@pytest.mark.parametrize(("bad", "problem", "remedy"), [
    ('{"image": ', r"line 2: Expecting value at column 11", "braces"),
    ("[1]", "line 2: a JSON list found", "{...}"),
    ({"image": "a", "mask": "b", "instructions": "c"}, "line 2: the field 'instruction' is missing",
     "Did you mean 'instructions' for 'instruction'?"),
    ({}, "line 2: the fields 'image', 'mask' and 'instruction' are missing; found none", "Add 'image', 'mask' and"),
    (row(instruction=3), "line 2: instruction is 3; a string", "quotes"),
    (row(mask=None), "line 2: mask is None; the path of a file", "quotes"),
    (row(mask=" "), "line 2: mask is empty; a path", "Name the file"),
    (row(caption=["x"]), r"line 2: caption is \['x'\]; a string", "quotes"),
    (row(flawed="yes"), "line 2: flawed is 'yes'; true or false", "quotes"),
    (row(mask_polarity="grey"), "line 2: mask_polarity: 'grey' found; 'white' or 'black'", "colour"),
])  # fmt: skip
def test_a_bad_line_is_named(folder, bad, problem, remedy):
    write_lines(folder, row(), bad)
    with pytest.raises(UserError, match=problem) as caught:
        EditFolder(folder)
    assert remedy in caught.value.remedy


def test_a_file_that_is_not_utf8_is_refused(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        EditFolder(folder)


def test_missing_files_are_found_at_once_and_counted(folder):
    write_lines(folder, row("a"), *(row("a", image=f"images/{i}.png") for i in range(5)))
    with pytest.raises(UserError, match=r"5 of the files .* do not exist: .*0\.png, .*1\.png, .*2\.png and 2 more"):
        EditFolder(folder)


def test_missing_parts_of_a_triple_are_found(folder):
    for name in ("a", "b", "lost"):
        (folder / "instructions" / f"{name}.txt").write_text("go")
    with pytest.raises(UserError, match=r"3 of the files .*images/lost\.\*, .*masks/lost\.\*, .*target\.txt"):
        EditFolder(folder)


def test_two_images_of_one_name_are_refused(folder):
    Image.new("RGB", (30, 20)).save(folder / "images" / "a.jpg")
    with pytest.raises(UserError, match=r"both a\.jpg and a\.png"):
        EditFolder(folder)


def test_an_unknown_polarity_is_refused_before_anything_is_read(folder):
    with pytest.raises(UsageError, match="'White' found"):
        EditFolder(folder, polarity="White")


@pytest.mark.parametrize("polarity", ["white", "black"])
def test_a_mask_of_zeros_and_ones_is_refused(tmp_path, polarity):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / "m.png")  # 0 and 1 of 255
    line = {"image": "a.png", "mask": "m.png", "instruction": "Make it red."}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"levels of a label map, 0: 96\.9 %, 1: 3\.12 %"):
        EditFolder(tmp_path, polarity=polarity)[0]
