"""Published data sets, in the layouts of their authors, come out as examples with the right masks."""

import json

import data_sets
import numpy as np
import pytest

from rcgrpo_jax.cli.data_prepare import run
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError, UserError

LAYOUTS = {
    "compbench-parquet": data_sets.compbench_parquet,
    "compbench-folders": data_sets.compbench_folders,
    "magicbrush": data_sets.magicbrush,
    "humanedit": data_sets.humanedit,
    "ultraedit": data_sets.ultraedit,
    "cocoedit": data_sets.cocoedit,
}
WANTED = {  # name, index of the pictures, caption, task
    "compbench": [
        ("add-000ca3cb-0-00000", 0, "a thing 0", "add"),
        ("add-001ca3cb-0-00001", 1, "a thing 1", "add"),
        ("remove-002ca3cb-0-00002", 2, "a thing 2", "remove"),
        ("remove-003ca3cb-0-00003", 3, "a thing 3", "remove"),
        ("replace-004ca3cb-0-00004", 4, "a thing 4", "replace"),
    ],
    "magicbrush": [(f"242679-{index + 1}", index, None, "") for index in range(3)],
    "humanedit": [
        ("photo-0", 0, "a photograph 0", "add"),
        ("photo-1", 1, "a photograph 1", "remove"),
        ("photo-2", 2, "a photograph 2", "counting"),
    ],
    "ultraedit": [(f"{index:08d}", index, f"after {index}", "") for index in range(2)],
    "cocoedit": [(f"{index:08d}", index, None, "") for index in range(3)],
}


def prepare(name: str, path, out, *flags: str) -> dict:
    """Runs the command, and returns its report."""
    run([name, f"--from={path}", f"--out={out}", "--workers=2", *flags])
    return json.loads((out / "prepare.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_examples_are_those_that_were_published(tmp_path, layout, capsys):
    name, out = layout.partition("-")[0], tmp_path / "out"
    prepare(name, LAYOUTS[layout](tmp_path / "in"), out)
    assert capsys.readouterr().out.endswith(f"\n\ntfds:{out}\n")
    source = open_source(f"tfds:{out}")
    found = [source[index] for index in range(len(source))]
    assert [(x.name, int(x.instruction[5:-1]), x.caption, x.task) for x in found] == WANTED[name]
    for example, (_, index, *_) in zip(found, WANTED[name], strict=True):
        image, target = data_sets.pictures(index)
        if (name, index) == ("humanedit", 1):
            image[16:22, 16:22] = target[16:22, 16:22] = 0
        np.testing.assert_array_equal(example.image, image)
        np.testing.assert_array_equal(example.mask, data_sets.region())
        if name == "cocoedit":
            assert example.target is None
        else:
            np.testing.assert_array_equal(example.target, target)


def test_tfds_itself_reads_what_is_written(tmp_path):
    import tensorflow_datasets as tfds

    prepare("compbench", data_sets.compbench_parquet(tmp_path / "in"), tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out")
    records = builder.as_data_source("train")
    assert (len(records), builder.info.splits["train"].num_examples, builder.info.name) == (5, 5, "compbench")
    record = records[3]
    np.testing.assert_array_equal(record["target"], data_sets.pictures(3)[1])
    assert record["mask"].shape == (data_sets.SIZE, data_sets.SIZE, 1)
    assert (record["id"], record["has_target"]) == (b"remove-003ca3cb/0/00003.png", True)


def test_rows_are_counted_by_task_and_beside_the_published_numbers(tmp_path, capsys):
    report = prepare("compbench", data_sets.compbench_parquet(tmp_path / "in"), tmp_path / "out")
    assert (report["rows"], report["examples"]) == (7, 5)
    assert report["rows_by_task"] == {"add": 2, "remove": 2, "replace": 2}
    assert report["examples_by_task"] == {"add": 2, "remove": 2, "replace": 1}
    assert report["published_by_task"] == {"add": 982, "remove": 1331, "replace": 152}
    assert report["not_chosen_by_task"] == {"action": 1}
    assert report["skipped"]["no mask"]["first"][0]["id"] == "replace-005ca3cb/0/00005.png"
    shown = capsys.readouterr().out
    assert "  replace                          2         1       152" in shown
    assert "warning: 2 rows of replace read; 152 are published" in shown


def test_tasks_and_splits_are_chosen(tmp_path):
    source = data_sets.compbench_parquet(tmp_path / "in")
    report = prepare("compbench", source, tmp_path / "a", "--tasks=remove")
    assert (report["examples_by_task"], report["published_by_task"]) == ({"remove": 2}, {"remove": 1331})
    report = prepare("compbench", source, tmp_path / "b", "--split=multi_turn", "--tasks=multi_turn_add")
    assert report["examples_by_task"] == {"multi_turn_add": 5}
    report = prepare("magicbrush", data_sets.magicbrush(tmp_path / "mb"), tmp_path / "c", "--split=dev")
    assert (report["examples"], report["published_by_task"]) == (1, {"": 528})


def test_blank_masks_of_ultraedit_are_kept_where_that_is_asked(tmp_path):
    source = data_sets.ultraedit(tmp_path / "in")
    assert prepare("ultraedit", source, tmp_path / "a")["skipped"]["the mask is the whole picture"]["rows"] == 1
    report = prepare("ultraedit", source, tmp_path / "b", "--keep_full_masks")
    assert (report["examples"], report["skipped"]) == (3, {})
    assert open_source(f"tfds:{tmp_path / 'b'}")[2].mask.min() == 1


def test_missing_files_of_a_data_set_are_told(tmp_path, capsys):
    source = data_sets.compbench_parquet(tmp_path / "in")
    (source / "data/train-00000-of-00002.parquet").unlink()
    report = prepare("compbench", source, tmp_path / "out")
    assert "1 of 2 files are not there: 0" in report["warnings"]
    assert "warning: 1 of 2 files are not there: 0" in capsys.readouterr().out


def test_a_column_of_another_name_is_given_by_a_flag(tmp_path):
    rows = [
        {"src": data_sets.of_hub(data_sets.pictures(0)[0]), "mask_image": data_sets.of_hub(data_sets.white(None)),
         "edit_prompt": "Edit 0."},
    ]  # fmt: skip
    source = data_sets.write_parquet(tmp_path / "in/data/RegionBase-00000-of-00001.parquet", rows).parent
    with pytest.raises(
        UserError, match="--image: no column 'source_image'; found src, mask_image, edit_prompt"
    ) as caught:
        prepare("ultraedit", source, tmp_path / "out")
    assert caught.value.remedy == "Did you mean --image src?"
    report = prepare("ultraedit", source, tmp_path / "out", "--image=src")
    assert report["examples"] == 1
    assert sum("so no target is read" in warning for warning in report["warnings"]) == 1
    with pytest.raises(UserError, match="--target: no column 'edited'"):
        prepare("ultraedit", source, tmp_path / "other", "--image=src", "--target=edited")


def test_archives_that_are_not_unpacked_are_named(tmp_path):
    source = data_sets.cocoedit(tmp_path / "in")
    (source / "images_part1").rename(tmp_path / "elsewhere")
    for name in ("images_part1.zip_aa", "images_part1.zip_ab", "masks_part1.zip"):
        (source / name).touch()
    with pytest.raises(UserError, match=r"'images_part1/0.png' of metadata.jsonl is not there") as caught:
        prepare("cocoedit", source, tmp_path / "out")
    assert (
        "cat images_part1.zip_* > images_part1.zip; then unzip each of images_part1.zip, masks" in caught.value.remedy
    )


def test_a_mask_form_that_misses_the_change_is_doubted(tmp_path):
    source = data_sets.compbench_parquet(tmp_path / "in")
    right = prepare("compbench", source, tmp_path / "right")
    wrong = prepare("compbench", source, tmp_path / "wrong", "--mask_form=black")
    assert right["change"] == {"compared": 5, "less_than_0.5_in_mask": 0}
    assert wrong["change"] == {"compared": 5, "less_than_0.5_in_mask": 5}
    doubt = "its form (--mask_form) is probably another one"
    assert [any(doubt in warning for warning in report["warnings"]) for report in (right, wrong)] == [False, True]


@pytest.mark.parametrize(
    ("name", "flags", "problem"),
    [
        ("compbnech", [], r"unknown data set 'compbnech'; .* Did you mean 'compbench'\?"),
        ("compbench", ["--tasks=ad"], "--tasks: 'ad' found; add, remove"),
        ("compbench", ["--split=test"], "--split: 'test' found; train, multi_turn was wanted"),
        (
            "compbench",
            ["--split=multi_turn"],
            "the Parquet files of the hub, or the folder tasks/ .* wanted; found .cache, tasks",
        ),
        ("magicbrush", ["--tasks=add"], "--tasks: 'add' found; none, since it names no tasks"),
        ("magicbrush", [], "the Parquet files of the hub wanted; found .cache, tasks"),
        ("parquet", ["--image=a"], "missing --mask, --instruction"),
        ("parquet", ["--image=a", "--mask=b", "--instruction=c", "--tasks=add"], "no column of the task is known"),
        ("parquet", ["--image=a", "--mask=b", "--instruction=c"], "no .parquet file found"),
        ("compbench", ["--mask_form=grey"], "mask_form"),
    ],
)
def test_what_cannot_be_prepared_is_named(tmp_path, name, flags, problem):
    data_sets.compbench_folders(tmp_path / "in")
    (tmp_path / "in/.cache").mkdir()
    (tmp_path / "in/.cache/a.parquet").touch()
    with pytest.raises((UsageError, UserError), match=problem):
        prepare(name, tmp_path / "in", tmp_path / "out", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
