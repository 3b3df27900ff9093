"""What is no folder of examples is called what it is, with what to do about it."""

import gzip
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from rcgrpo_jax.data import EditFolder, jsonl
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UserError

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 23802\n"
LINE = {"image": "a.png", "mask": "m.png", "instruction": "Make it red."}
COCO = {"info": {}, "images": [{"file_name": "a.png"}], "annotations": [{"segmentation": [[1, 2]]}], "categories": []}


@pytest.fixture
def folder(tmp_path):
    """A picture and its mask."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "m.png")
    return tmp_path


def refusal(path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    assert caught.value.problem.startswith(str(path))
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"a")


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "000000.txt")


FILES = {
    "a Parquet file": lambda path: path.write_bytes(b"PAR1" + bytes(range(160, 256)) + b"PAR1"),
    "a tar archive": write_tar,
    "a zip archive": write_zip,
    "a gzip file": lambda path: path.write_bytes(gzip.compress(json.dumps(LINE).encode())),
    "an Arrow stream": lambda path: path.write_bytes(b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16)),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(16)),
    "a PNG picture": lambda path: Image.new("L", (2, 2)).save(path, "PNG"),
    "an HTML page": lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
    "a table of separated values": lambda path: path.write_text("image,mask,prompt\na.png,m.png,Make it red.\n"),
    "one JSON list": lambda path: path.write_text(json.dumps([LINE, LINE], indent=2)),
    "one JSON document": lambda path: path.write_text(json.dumps({"data": [LINE]}, indent=2)),
    "a JSON document of COCO annotations": lambda path: path.write_text(json.dumps(COCO)),
    "binary data": lambda path: path.write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("name", ["metadata.jsonl", "data.bin"])
@pytest.mark.parametrize("kind", FILES)
def test_other_kinds_of_files_are_called_by_their_names(tmp_path, kind, name):
    FILES[kind](tmp_path / name)
    error = refusal(tmp_path / name)
    assert kind in error.problem
    assert "a .jsonl file (JSON Lines)" in error.problem
    assert "UTF-8" not in str(error)


def test_json_on_many_lines_is_still_told_from_a_bad_line(tmp_path):
    (tmp_path / "coco.json").write_text(json.dumps(COCO, indent=1))
    assert "a JSON document of COCO annotations" in refusal(tmp_path / "coco.json").problem
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "mask"')
    assert "line 1: Expecting ':' delimiter at column 26" in refusal(tmp_path / "a.jsonl").problem


@pytest.mark.parametrize("where", ["", "data"])
def test_a_folder_of_shards_says_what_there_is(tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("# Edits")
    for i in range(3):
        FILES["a Parquet file"](tmp_path / where / f"train-0000{i}-of-00003.parquet")
    write_tar(tmp_path / where / "000000.tar")
    (tmp_path / where / "metadata.csv").write_text("file_name,text\n")
    found = (
        "found a tar archive, 000000.tar; a table of separated values, metadata.csv; "
        "a Parquet file, train-00000-of-00003.parquet, and 2 more such"
    )
    assert found in refusal(tmp_path).problem


def test_a_folder_of_another_layout_is_shown_the_way(tmp_path, folder):
    (folder / "train.jsonl").write_text(json.dumps(LINE))
    assert str(folder / "train.jsonl") in refusal(folder).remedy
    (folder / "dataset_info.json").write_text("{}")
    (folder / "features.json").write_text("{}")
    assert f"tfds:{folder}" in refusal(folder).remedy


@pytest.mark.parametrize("name", ["a.png", "m.png", "metadata.jsonl"])
def test_pointers_of_git_lfs_are_called_by_their_name(folder, name):
    (folder / "metadata.jsonl").write_text(json.dumps(LINE))
    (folder / name).write_text(LFS)
    with pytest.raises(UserError, match=f"{name}: this is a Git LFS pointer") as caught:
        EditFolder(folder)[0]
    assert "git lfs pull" in caught.value.remedy


@pytest.mark.parametrize(("row", "problem", "remedy"), [
    ({"original_image": "a", "edited_image": "b", "edit_prompt": "c"},
     "the fields 'image', 'mask' and 'instruction' are missing; found 'original_image', 'edited_image', 'edit_prompt'",
     "'original_image' for 'image', 'edit_prompt' for 'instruction' and 'edited_image' for 'target'? Rename. Add 'm"),
    ({"source_img": "a", "mask_img": "m", "instruction": "c", "target_img": "t"},
     "the fields 'image' and 'mask' are missing",
     "'source_img' for 'image', 'mask_img' for 'mask' and 'target_img' for 'target'? Rename."),
    ({"file_name": "a", "text": "c", "mask": "m"}, "the fields 'image' and 'instruction' are missing",
     "'file_name' for 'image' and 'text' for 'instruction'?"),
    ({**LINE, "mask": {"size": [32, 32], "counts": "abc"}}, "mask is a run-length encoding of COCO", "as PNG files"),
    ({**LINE, "mask": [{"size": [32, 32], "counts": [1, 2]}]}, "mask is a run-length encoding of COCO", "as PNG files"),
    ({**LINE, "mask": [[1, 2, 3, 4, 5, 6]]}, "mask is a list of polygons", "as PNG files"),
    ({**LINE, "mask": [1, 2, 30, 40]}, "mask is a box of four numbers", "as PNG files"),
    ({**LINE, "image": {"bytes": "iVBOR", "path": None}}, "image is an image within the row", "as PNG files"),
    ({**LINE, "target": {"src": "a"}}, "target is an object with 'src'", "as PNG files"),
    ({**LINE, "image": "https://example.org/a.png"}, "image is 'https://example.org/a.png'; the path", "Download"),
    ({**LINE, "image": "data:image/png;base64," + "A" * 5000}, "image is 'data:image/png;base64,AAA", "Download"),
    ({**LINE, "mask": "A" * 5000}, "which is no file's name", "Save what stands there"),
    ({**LINE, "caption": ["x" * 5000]}, "caption is ['xxx", "quotes"),
    ({**LINE, "mask_value": 1.5}, "mask_value is 1.5; a number or a text", "15"),
    ({**LINE, "mask_polarty": "black"}, "'mask_polarty' is no field of a line; 'mask_polarity' was probably", "Rename"),
    ({**LINE, "mask_value": -1}, "line 1: mask_value: '-1' found; numbers from 0", "15"),
    ({**LINE, "mask_value": 0, "mask_polarity": "black"}, "both mask_polarity and mask_value", "Leave mask_polarity"),
])  # fmt: skip
def test_rows_of_other_data_sets_say_what_is_meant(folder, row, problem, remedy):
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    error = refusal(folder)
    assert problem in error.problem
    assert remedy in error.remedy
    assert len(error.problem) < 500


def test_a_line_may_name_the_value_of_its_own_region(folder):
    labels = Image.new("L", (32, 32))
    labels.paste(3, (0, 0, 8, 32))
    labels.paste(7, (8, 0, 24, 32))
    labels.save(folder / "m.png")
    lines = [{**LINE, "mask_value": None}, {**LINE, "mask_value": 3}, {**LINE, "mask_value": "3,7"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = EditFolder(folder, mask_value="7")
    assert [source[i].mask.sum() for i in range(3)] == [16 * 32, 8 * 32, 24 * 32]
    labels.point(lambda x: 255 * (x == 7)).save(folder / "m.png")
    (folder / "metadata.jsonl").write_text(json.dumps({**LINE, "mask_polarity": "black"}))
    assert EditFolder(folder, mask_value="7")[0].mask.sum() == 16 * 32


@pytest.mark.parametrize(("line", "problem"), [
    ("[" * 100_000, "not readable as JSON"),
    ('{"image": ' + "1" * 5000 + "}", "not readable as JSON"),
    (json.dumps({**LINE, "caption": "x" * 2000}), "line 1: longer than 1,024 bytes"),
])  # fmt: skip
def test_lines_that_cannot_be_meant_are_refused(folder, monkeypatch, line, problem):
    if "longer" in problem:
        monkeypatch.setattr(jsonl, "MAX_LINE", 1024)
    (folder / "metadata.jsonl").write_text(line)
    assert problem in refusal(folder).problem


def test_an_instruction_that_cannot_be_meant_is_refused(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({**LINE, "instruction": "red " * 30_000}))
    with pytest.raises(UserError, match="the instruction has 120,000 characters; at most 100,000"):
        EditFolder(folder)[0]
