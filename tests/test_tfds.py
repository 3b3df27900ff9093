"""TFDS datasets hold examples as a folder does, and are written and read without TensorFlow."""

import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grain
import icc
import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.data import tfds
from rcgrpo_jax.data.example import EditExample, Needs
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.sources import open_source, same_examples
from rcgrpo_jax.data.tfds import TfdsSource
from rcgrpo_jax.data.tfds_writer import write_tfds
from rcgrpo_jax.errors import UsageError, UserError

UNICODE = "  把杯子涂成红色 🎨\u2028« noch röter »"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 23802\n"
SIZES = [(20, 30), (33, 17), (16, 16), (40, 24), (18, 50)]


def fields(example: EditExample) -> list:
    """Everything in an example, with dtypes, in a form that `==` compares."""
    arrays = [None if a is None else (a.dtype, a.tolist()) for a in (example.image, example.mask, example.target)]
    return [example.name, example.instruction, example.caption, example.flawed, example.task, *arrays]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Five examples of different sizes with soft masks and targets; the first has a caption and exotic text."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    lines = []
    for i, size in enumerate(SIZES):
        for kind, shape in (("image", (*size, 3)), ("mask", size), ("target", (*size, 3))):
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / f"{kind}{i}.png")
        paths = {kind: f"{kind}{i}.png" for kind in ("image", "mask", "target")}
        lines.append(paths | {"instruction": f"edit {i}", "caption": None})
    lines[0] |= {"instruction": UNICODE, "caption": "eine rote Tasse"}
    lines[1] |= {"flawed": True}
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def folder(root) -> EditFolder:
    return EditFolder(root)


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    return write_tfds(folder, "edits", tmp_path_factory.mktemp("tfds"))


def write_by_hand(data_dir: Path, features: dict, *rows: dict) -> Path:
    """A dataset as others would make it: any features, any number of splits."""
    import tensorflow_datasets as tfds

    path = data_dir / "other" / "2.1.0"
    path.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity("other", tfds.core.Version("2.1.0"), str(path), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": list(rows), "test": list(rows[:1])})
    writer.close_all()
    return path


def by_hand(**changes) -> tuple[dict, dict]:
    """Features and a row in other forms than `write_tfds` chooses: no name or caption, a mask without channels."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "mask": tfds.features.Tensor(shape=(None, None), dtype=np.uint8, encoding="zlib"),
        "instruction": tfds.features.Text(),
    }
    mask = np.zeros((20, 30), np.uint8)
    mask[:, :4] = 255
    row = {"image": Image.new("RGB", (30, 20), (1, 2, 3)), "mask": mask, "instruction": "go"} | changes
    return {field: features[field] for field in row if field in features}, row


def test_a_folder_comes_back_as_it_was(folder, written):
    source = TfdsSource("edits", data_dir=written.parents[1])
    assert len(source) == len(folder) == 5
    assert [fields(source[i]) for i in range(5)] == [fields(folder[i]) for i in range(5)]
    assert (source[0].instruction, source[0].caption, source[1].caption) == (UNICODE, "eine rote Tasse", None)
    assert source[-1].name == folder[4].name
    with pytest.raises(IndexError):
        source[5]
    assert written.name == "1.0.0"
    assert list(written.parent.iterdir()) == [written]  # nothing unfinished is left beside it


def test_masks_marked_in_black_come_back_within_a_rounding(root, folder, written, tmp_path):
    white, black = (TfdsSource(str(written), polarity=polarity)[1].mask for polarity in ("white", "black"))
    np.testing.assert_array_equal(white, folder[1].mask)
    np.testing.assert_allclose(black, 1 - white, atol=1e-7)
    assert black.dtype == np.float32
    inverted = TfdsSource(str(write_tfds(EditFolder(root, polarity="black"), "inverted", tmp_path)))
    np.testing.assert_allclose(inverted[1].mask, black, atol=1e-7)  # not a step of 1 / 255


def test_stamps_change_with_the_files_the_split_and_the_marking(folder, tmp_path):
    written = str(write_tfds(folder, "edits", tmp_path))

    def stamps(**changes) -> list[str]:
        source = TfdsSource(written, **changes)
        return [source.stamp(i) for i in range(len(source))]

    first = stamps()
    assert len(set(first)) == 5
    assert stamps() == first
    for other in (stamps(polarity="black"), stamps(split="train[1:]"), stamps(mask_value="0")):
        assert not set(first) & set(other)
    (record,) = Path(written).glob("*array_record*")
    os.utime(record, ns=(0, 0))
    assert not set(first) & set(stamps())


def test_tfds_itself_reads_what_was_written(folder, written):
    import tensorflow_datasets as tfds

    records = tfds.data_source("edits", split="train", data_dir=written.parents[1])
    assert len(records) == 5
    np.testing.assert_array_equal(records[2]["image"], folder[2].image)
    np.testing.assert_array_equal(records[2]["mask"][..., 0], np.rint(folder[2].mask * 255))
    assert records[0]["instruction"].decode() == UNICODE


def test_text_that_is_not_utf_8_is_named():
    with pytest.raises(UserError, match=r"here: .*byte 0xff.*; text in UTF-8 was wanted"):
        tfds._decode(b"a\xff", "text", "here")


def test_grain_shuffles_and_workers_get_their_own_copy(folder, written):
    source = pickle.loads(pickle.dumps(TfdsSource(str(written))))  # as a data worker gets it
    order = grain.MapDataset.source(source).seed(0).shuffle().repeat(2)
    epoch = [order[i] for i in range(5)]
    assert sorted(example.name for example in epoch) == [folder[i].name for i in range(5)]
    by_name = {folder[i].name: folder[i] for i in range(5)}
    assert all(fields(example) == fields(by_name[example.name]) for example in epoch)


def test_targets_captions_and_tasks_may_be_missing_from_some_examples(folder, tmp_path):
    mixed = [replace(folder[0], target=None, task="add"), folder[1], replace(folder[2], target=None)]
    source = TfdsSource(str(write_tfds(mixed, "mixed", tmp_path, split="test")), split="test")
    assert [fields(source[i]) for i in range(3)] == [fields(example) for example in mixed]
    assert [example.has_target for example in source] == [False, True, False]


def test_datasets_of_other_forms(tmp_path):
    features, row = by_hand()
    palette = io.BytesIO()  # encoded elsewhere: pixels are indices
    Image.new("RGB", (30, 20), (200, 100, 50)).quantize(4).save(palette, "PNG")
    path = write_by_hand(tmp_path, features, row, row | {"image": palette.getvalue()}, row)
    first, second = (TfdsSource(str(path))[i] for i in range(2))
    assert (first.name, first.instruction, first.caption, first.target) == ("00000", "go", None, None)
    assert first.mask[0].tolist() == [1.0] * 4 + [0.0] * 26
    assert (first.image == [1, 2, 3]).all()
    assert (second.image == [200, 100, 50]).all()
    assert len(TfdsSource("other:2.1.0", split="train[1:]", data_dir=tmp_path)) == 2


def test_pictures_are_treated_as_files_are(tmp_path):
    import tensorflow_datasets as tfds

    features, row = by_hand()
    features["mask"] = tfds.features.Image(shape=(None, None, 1))
    labels = Image.fromarray(row["mask"] // 51)  # class 5
    labels.putpalette([*[0] * 15, 128, 0, 0, *[0] * 750])
    tagged = Image.new("RGB", (30, 20), (200, 100, 50))
    encoded = {}
    for field, picture, profile in (
        ("mask", labels, None),
        ("image", tagged, icc.rgb_profile(icc.ADOBE_RGB, np.square)),
    ):
        picture.save(file := io.BytesIO(), "PNG", icc_profile=profile)
        encoded[field] = file.getvalue()
    path = write_by_hand(tmp_path, features, row | encoded)
    with pytest.raises(UserError, match=r"example 0, mask: the mask has colours, .* 5 \(#800000\)"):
        TfdsSource(str(path))[0]
    example = open_source(f"tfds:{path}", mask_value="5")[0]
    assert example.mask[0].tolist() == [1.0] * 4 + [0.0] * 26
    wanted = icc.in_srgb(np.array([200, 100, 50]), icc.ADOBE_RGB, np.square)
    np.testing.assert_allclose(example.image[0, 0], wanted, atol=2)


def test_masks_are_the_whole_pictures_where_none_is_needed(tmp_path):
    features, row = by_hand()
    path = write_by_hand(tmp_path, *({key: x[key] for key in x if key != "mask"} for x in (features, row)))
    assert (TfdsSource(str(path), needs=Needs())[0].mask == np.ones((20, 30), np.float32)).all()
    with pytest.raises(UserError, match=r"the feature 'mask' is missing; found .*; an edit by region needs it\."):
        TfdsSource(str(path))


def test_fields_of_other_names(tmp_path):
    features, row = by_hand()
    other = {"image": "source_img", "mask": "mask_img", "instruction": "text"}
    path = write_by_hand(
        tmp_path, *({other[key]: value for key, value in mapping.items()} for mapping in (features, row))
    )
    names = {f"{field}_field": name for field, name in other.items()}
    assert TfdsSource(str(path), **names)[0].instruction == "go"
    with pytest.raises(UserError, match=r"the feature 'image' is missing; found 'mask_img', 'source_img', 'text'"):
        TfdsSource(str(path))
    with pytest.raises(UserError, match="Did you mean 'source_img'"):
        TfdsSource(str(path))
    with pytest.raises(UserError, match="Did you mean 'mask_img'"):
        TfdsSource(str(path), **names | {"mask_field": "mask_image"})


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"name": "edit"}, "tfds:edit: no such dataset in "),
    ({"name": "edits:3.0.0"}, "tfds:edits:3.0.0: no such dataset"),
    ({"name": "mnist"}, "tfds:mnist: no such dataset"),  # known to TFDS, but not prepared
    ({"name": "/no/such/folder"}, "tfds:/no/such/folder: no such dataset"),
    ({"split": "tain"}, r"tfds:edits@tain: .*Unknown split 'tain'(.|\n)*Choose one of train"),
    ({"split": "train[9:]"}, r"tfds:edits@train\[9:\]: the split cannot be read"),
    ({"split": "train["}, r"tfds:edits@train\[: the split cannot be read"),
    ({"split": "train[:0]"}, r"tfds:edits@train\[:0\]: the split cannot be read"),
    ({"mask_field": "caption"}, r"'caption' is Text.*; uint8 \[H, W, 1\] or \[H, W\] was wanted"),
    ({"image_field": "mask"}, r"'mask' is Image.*; uint8 \[H, W, 3\] was wanted"),
    ({"instruction_field": "image"}, "'image' is Image.*; a text was wanted"),
    ({"polarity": "grey"}, "'grey' found"),
])  # fmt: skip
def test_what_cannot_be_opened_is_named(written, arguments, problem):
    with pytest.raises(UserError, match=problem):
        TfdsSource(**{"name": "edits", "data_dir": written.parents[1]} | arguments)


def test_other_file_formats_are_refused(tmp_path):
    path = write_by_hand(tmp_path, *by_hand())
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="the files are in the tfrecord format; array_record was wanted"):
        TfdsSource(str(path))


@pytest.mark.parametrize(("file", "content", "problem"), [
    ("dataset_info.json", LFS, "dataset_info.json is a Git LFS pointer"),
    ("other-train.array_record-00000", LFS, "other-train.array_record-00000 is a Git LFS pointer"),
    ("dataset_info.json", "[1]", r"the description of the dataset cannot be read \("),
    ("features.json", '{"features": 3}', r"the description of the dataset cannot be read \("),
])  # fmt: skip
def test_pointers_and_damage_are_named(tmp_path, file, content, problem):
    path = write_by_hand(tmp_path, *by_hand())
    (path / file).write_text(content)
    with pytest.raises(UserError, match=rf"tfds:{path}: {problem}") as caught:
        TfdsSource(str(path))
    assert ("git lfs pull" in caught.value.remedy) == (content == LFS)


def test_records_that_cannot_be_used_are_named(tmp_path):
    features, row = by_hand()
    damaged, labels, blank = {"image": b"\x89PNG"}, {"mask": row["mask"] // 255}, {"instruction": " "}
    path = write_by_hand(tmp_path, features, *(row | change for change in (damaged, labels, blank)))
    source = TfdsSource(str(path))
    for index, problem in enumerate(
        (
            "example 0, image: the file is not an image",
            "example 1, mask: the mask has the levels of",
            "00002: the instr",
        )
    ):
        with pytest.raises(UserError, match=problem):
            source[index]


def test_a_record_of_a_file_that_was_cut_short_is_named(tmp_path):
    features, row = by_hand()
    source = TfdsSource(str(write_by_hand(tmp_path, features, row)))
    source._records = [dict.fromkeys(row)]
    with pytest.raises(UserError, match=r"example 0 cannot be read \(image is missing\)"):
        source[0]


def test_writing_is_all_or_nothing(folder, written, tmp_path):
    with pytest.raises(UserError, match="the dataset exists"):
        write_tfds(folder, "edits", written.parents[1])
    for name, split in (("My-Edits", "train"), ("edits", "all"), ("edits", "a b")):
        with pytest.raises(UsageError, match="lower-case letters, digits and underscores"):
            write_tfds(folder, name, tmp_path, split=split)
    with pytest.raises(UserError, match="instruction is blank"):
        write_tfds([folder[0], replace(folder[1], instruction="")], "partly", tmp_path)
    assert not list(tmp_path.glob("partly/*"))


def test_paths_name_folders_or_datasets(root, written, tmp_path):
    import tensorflow_datasets as tfds

    features, row = by_hand()
    path = write_by_hand(tmp_path / "a@b", features, row, row)
    assert isinstance(open_source(str(root), "white"), EditFolder)
    assert len(open_source(f"tfds:{written}", "white")) == 5
    assert len(open_source(f"tfds:{written}@train[:60%]", "white")) == 3
    assert len(open_source(f"tfds:{path}", "white")) == 2  # the "@" belongs to the folder
    assert len(open_source(f"tfds:{path}@test", "white")) == 1
    assert open_source(f"tfds:{path}", "black")[0].mask[0, 0] == 0
    tfds.core.add_data_dir(written.parents[1])
    assert len(open_source("tfds:edits@train", "white")) == 5
    for wrong in ("tfds:", "tfds:@train", "tfds:edits@"):
        with pytest.raises(UsageError, match=r"tfds:DATASET\[@SPLIT\] was wanted"):
            open_source(wrong, "white")


WITHOUT_TENSORFLOW = """
import sys
from rcgrpo_jax.data.sources import open_source, same_examples
from rcgrpo_jax.data.tfds_writer import write_tfds

folder, data_dir = sys.argv[1:]
source = open_source(folder)
assert "tensorflow_datasets" not in sys.modules, "TFDS is imported before it is needed"
dataset = open_source(f"tfds:{write_tfds(source, 'edits', data_dir)}")
assert (dataset[4].image == source[4].image).all()
"""


def test_tensorflow_is_never_imported_and_tfds_only_when_needed(root, tmp_path):
    package = tmp_path / "installed" / "tensorflow"  # looks installed, and notes any attempt to import it
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("open(__file__ + '.imported', 'w')\nraise ImportError('not wanted')\n")
    path = os.pathsep.join([str(package.parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(root), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    assert [file.name for file in package.glob("*.imported")] == []


@pytest.mark.parametrize(
    ("path", "other", "same"),
    [
        ("scenes:train:600", "scenes:train/add:9:0.4", True),
        ("scenes:train:600", "scenes:validation:600", False),
        ("tfds:edits", "tfds:edits@train", True),
        ("tfds:edits@train", "tfds:edits@test", False),
        ("tfds:/data@home/edits", "tfds:/data@home/edits@train", True),
        ("tfds:edits@train[:90%]", "tfds:edits", True),
        ("tfds:edits@train[:90%]", "tfds:edits@train[90%:]", False),
        ("tfds:edits@train[:90%]", "tfds:edits@test", False),
        ("edits", "./here/../edits/", True),
        ("edits", "edits/metadata.jsonl", True),
        ("edits[1]", "edits", False),
        ("edits", "edits/test", False),
    ],
)
def test_paths_that_name_the_same_examples(path, other, same):
    assert same_examples(path, other) == same
