"""Preparing goes on where it was stopped, leaves out what is no example, and says so."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import data_sets
import icc
import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.cli.data_prepare import run
from rcgrpo_jax.data import records
from rcgrpo_jax.data.prepare import run as running
from rcgrpo_jax.data.prepare.row import RowForm, read_row, safe_name
from rcgrpo_jax.data.prepare.run import prepare
from rcgrpo_jax.data.prepare.sets import open_own
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.runs.workdir import hold

COLUMNS = ("--image=image", "--mask=mask", "--instruction=text", "--target=target", "--caption=caption", "--id=id")
FORM = RowForm("image", "mask", "text", "target", "caption", id=("id",))
SIDE = data_sets.SIZE


def write_pictures(root: Path, **pictures: np.ndarray) -> None:
    root.mkdir(exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(root / f"{name}.png")


def write_rows(root: Path, rows: list[dict]) -> Path:
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """A table of seven examples with a skipped row after the third."""
    root, rows = tmp_path / "in", []
    for index in range(7):
        source, target = data_sets.pictures(index)
        write_pictures(root, **{f"i{index}": source, f"m{index}": data_sets.white(source), f"t{index}": target})
        files = {"image": f"i{index}.png", "mask": f"m{index}.png", "target": f"t{index}.png"}
        rows.append(files | {"text": f"Edit {index}.", "caption": "after", "id": f"n{index}"})
    rows.insert(3, rows[0])
    return write_rows(root, rows)


def test_tfds_is_imported_before_any_thread_decodes(root, tmp_path, monkeypatch):
    """Imports of other threads fail while TFDS is imported: Pillow's in `read_row` did."""
    events, load = [], records.RecordSet.load
    monkeypatch.setattr(records.RecordSet, "load", lambda self: (load(self), events.append("loaded")))
    monkeypatch.setattr(running, "read_row", lambda *_: events.append("row") or read_row(*_))
    run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS, "--workers=2"])
    assert events == ["loaded", *["row"] * 8]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(records, "MOST_EXAMPLES", 2)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Resuming

KILLED = """
import os, signal, sys
from pathlib import Path
from rcgrpo_jax.data import records
from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.prepare.run import prepare
from rcgrpo_jax.data.prepare.sets import open_own

def progress(job, done, total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

records.MOST_EXAMPLES = 2
form = RowForm("image", "mask", "text", "target", "caption", id=("id",))
prepare(open_own("json", Path(sys.argv[1])), form, Path(sys.argv[2]), 3, progress)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(root, tmp_path, small_shards):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    prepare(open_own("json", root), FORM, whole)
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(root), str(killed)], env=os.environ | path)
    assert ended.returncode == -signal.SIGKILL
    assert [file.name for file in sorted((killed / "parts").iterdir())] == ["00000.json", "00001.json"]
    read = []
    report = prepare(open_own("json", root), FORM, killed, 2, lambda job, done, total: read.append((done, total)))
    assert read == [(done, 8) for done in range(6, 9)]  # the rows of two shards, one skipped among them, are not read
    found = files_in(killed)
    assert [name for name in found if "incomplete" in name] == []
    assert found == files_in(whole)
    assert (report.whole.names, report.whole.rows) == ([f"n{index}" for index in range(7)], 8)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_not_whole_is_written_again_and_those_after_it(root, tmp_path, small_shards, damage):
    out = tmp_path / "out"
    out.mkdir()
    prepare(open_own("json", root), FORM, out)
    wanted = files_in(out)
    shard = out / "edits-train.array_record-00001"
    shard.write_bytes(shard.read_bytes()[:-70]) if damage == "cut" else shard.unlink()
    read = []
    prepare(open_own("json", root), FORM, out, progress=lambda *told: read.append(told[1]))
    assert read[0] == 3
    assert files_in(out) == wanted


def test_it_does_not_go_on_with_other_settings_or_files(root, tmp_path, small_shards):
    out = tmp_path / "out"
    run(["json", f"--from={root}", f"--out={out}", *COLUMNS])
    out.rename(tmp_path / "out.incomplete")
    prepare(open_own("json", root), FORM, tmp_path / "out.incomplete")  # as it was before the last step
    with pytest.raises(UserError, match=r'begun with form .*"white".*; .*"black".* found now'):
        run(["json", f"--from={root}", f"--out={out}", *COLUMNS, "--mask_form=black"])
    (root / "rows.jsonl").write_text((root / "rows.jsonl").read_text() + "\n")
    with pytest.raises(UserError, match="begun with files") as caught:
        run(["json", f"--from={root}", f"--out={out}", *COLUMNS])
    assert "begin anew" in caught.value.remedy


def test_what_a_stopped_run_left_unfinished_is_no_part_of_another(root, tmp_path):
    partial = tmp_path / "out.incomplete"
    partial.mkdir()
    for name in (
        "compbench-train.array_record-00000", "incomplete.edits-train.array_record-00003", f".{'0' * 32}.partial",
    ):  # fmt: skip
        (partial / name).write_bytes(b"half")
    (partial / "settings.json").write_text('{"data_set": "compbench"}')  # no part of it was finished
    run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS])
    assert [file.name for file in (tmp_path / "out").glob("*record*")] == ["edits-train.array_record-00000"]
    assert not [*(tmp_path / "out").glob("*.partial")]


def test_a_finished_data_set_is_left_as_it_is(root, tmp_path, capsys):
    out = tmp_path / "out"
    run(["json", f"--from={root}", f"--out={out}", *COLUMNS])
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    assert sorted(file.name for file in out.iterdir()) == [
        "dataset_info.json", "edits-train.array_record-00000", "features.json", "prepare.json", "skipped.jsonl",
    ]  # fmt: skip
    (out / "parts").mkdir()  # of a kill at the very end
    (out / "settings.json").touch()
    run(["json", f"--from={root}", f"--out={out}", *COLUMNS])
    assert f"{out} is finished" in capsys.readouterr().out
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before
    with pytest.raises(UserError, match="was made with other settings or files"):
        run(["json", f"--from={root}", f"--out={out}", *COLUMNS, "--keep_full_masks"])
    with pytest.raises(UserError, match="holds something else"):
        run(["json", f"--from={root}", f"--out={tmp_path}", *COLUMNS])


def test_the_folder_is_where_a_link_leads_and_no_mounted_disk(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "out")  # nothing is there yet
    run(["json", f"--from={root}", f"--out={tmp_path / 'link'}", *COLUMNS])
    assert len(open_source(f"tfds:{tmp_path / 'out'}")) == 7
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(UserError, match="is where a disk is mounted; a folder in it was wanted"):
        run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--task=text", "--tasks=EDIT 9."], "none of 8 rows is of a task that was chosen; found edit 0., edit 1"),
        (["--split=dev"], "no file of the split 'dev'; found nothing"),
        (["--out=/tmp/\udcff"], "a name in UTF-8 was wanted"),
    ],
)
def test_what_would_read_nothing_or_all_is_refused(root, tmp_path, flags, problem):
    argv = {arg.partition("=")[0]: arg for arg in (f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS, *flags)}
    with pytest.raises(UserError, match=problem):
        run(["json", *argv.values()])


def test_tasks_are_chosen_in_any_case(root, tmp_path):
    run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS, "--task=text", "--tasks=EDIT 3."])
    assert len(open_source(f"tfds:{tmp_path / 'out'}")) == 1


def test_tfds_is_imported_before_threads_import_anything(tmp_path):
    assert "_serializer" in vars(records.RecordSet(tmp_path, "edits", "Edits."))


def test_two_processes_do_not_write_one_data_set(root, tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    with (
        hold(tmp_path / "out.incomplete"),
        pytest.raises(UserError, match=r"out.incomplete: process \d+ .* is at work"),
    ):
        run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS])


def test_the_number_of_workers_changes_nothing(root, tmp_path, small_shards):
    for workers in (1, 5):
        (tmp_path / str(workers)).mkdir()
        prepare(open_own("json", root), FORM, tmp_path / str(workers), workers)
    assert files_in(tmp_path / "1") == files_in(tmp_path / "5")


def test_shards_end_by_their_bytes_too(root, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 1)
    run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS])
    assert len([*(tmp_path / "out").glob("*array_record*")]) == 7
    assert len(open_source(f"tfds:{tmp_path / 'out'}")) == 7


# What is no example


def bomb() -> bytes:
    """A PNG of 70 bytes whose header claims 3.6 billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD = {  # change of a row -> reason, detail
    "corrupt": ({"image": "corrupt.png"}, "the image cannot be read", "cannot be read to its end"),
    "text": ({"image": "rows.txt"}, "the image cannot be read", "not an image"),
    "bomb": ({"image": "bomb.png"}, "the image cannot be read", "claims more than"),
    "small": ({"image": "tiny.png"}, "the image has a side of less than 16 pixels", "8 x 8"),
    "missing": ({"image": "no.png"}, "the file of the image is missing", "no.png"),
    "null": ({"image": None}, "no image", ""),
    "list": ({"image": [1, 2]}, "the image is no picture", r"\[1, 2\] found"),
    "web": ({"image": "https://x/a.png"}, "the image is not on this machine", "https"),
    "up": ({"image": "../in/i0.png/../../outside.png"}, "the path of the image leaves the folder", "outside"),
    "root": ({"mask": "/etc/passwd"}, "the path of the mask leaves the folder", "/etc/passwd"),
    "no mask": ({"mask": None}, "no mask", ""),
    "size": ({"mask": "wide.png"}, "the mask is of another size", "30 x 24; the image 24 x 24"),
    "empty": ({"mask": "empty.png"}, "the mask is empty", ""),
    "full": ({"mask": "full.png"}, "the mask is the whole picture", ""),
    "labels": ({"mask": "labels.png"}, "the mask is not of the form 'white'", "label map"),
    "target": ({"target": "wide.png"}, "the target is of another size", "30 x 24"),
    "blank": ({"text": "  "}, "the instruction is blank", ""),
    "number": ({"text": ["a"]}, "the instruction is no text", "'a'"),
    "long": ({"text": "a" * 100_001}, "it is no usable example", "100,001 characters"),
    "nan": ({"text": float("nan")}, "the instruction is blank", ""),
    "endless": ({"text": float("inf")}, "the instruction is no text", "inf found"),
    "half": ({"caption": "\ud800"}, "it is no usable example", "the caption .* Unicode"),
}


@pytest.fixture
def bad(tmp_path) -> Path:
    """A good row, the bad ones with two good rows among them that lack caption and target, and a repeated id."""
    root, source = tmp_path / "in", data_sets.pictures(0)[0]
    mask = data_sets.white(source)
    write_pictures(
        root, image=source, mask=mask, target=data_sets.pictures(0)[1], empty=0 * mask, full=0 * mask + 255,
        wide=np.zeros((24, 30), np.uint8), labels=(mask > 0) * np.uint8(15), tiny=source[:8, :8],
    )  # fmt: skip
    Image.fromarray(source).save(tmp_path / "outside.png")
    (root / "corrupt.png").write_bytes((root / "image.png").read_bytes()[:-200])
    (root / "bomb.png").write_bytes(bomb())
    (root / "rows.txt").write_text("no picture")
    good = {"image": "image.png", "mask": "mask.png", "target": "target.png", "text": "Go.", "caption": "so"}
    rows = [good | {"id": "first"}, *(good | change | {"id": name} for name, (change, *_) in BAD.items())]
    rows[5:5] = [
        good | {"id": "bare", "caption": None, "target": None},
        good | {"id": "void", "caption": "", "target": float("nan")},
    ]
    rows += [good | {"id": "last/one.png"}, good | {"id": "first"}]
    return write_rows(root, rows)


def test_rows_that_are_no_examples_are_skipped_and_named(bad, tmp_path, capsys):
    out = tmp_path / "out"
    with (bad / "rows.jsonl").open("a") as file:
        file.write('\n{"image": ')
    run(["json", f"--from={bad}", f"--out={out}", *COLUMNS])
    source = open_source(f"tfds:{out}")
    assert [(x.name, x.has_target, x.caption) for x in source] == [
        ("first", True, "so"), ("bare", False, None), ("void", False, None), ("last-one", True, "so"),
    ]  # fmt: skip
    skipped = {row["id"]: row for row in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}
    assert skipped.keys() == {*BAD, "first", ""}
    for name, (_, reason, detail) in BAD.items():
        assert skipped[name]["reason"] == reason
        assert __import__("re").search(detail, skipped[name]["found"]), skipped[name]
    assert skipped["first"]["reason"] == "the id is there already"
    assert skipped[""]["reason"] == "the row cannot be read"
    report = json.loads((out / "prepare.json").read_text())
    assert report["rows"] == len(BAD) + 6 == report["examples"] + sum(x["rows"] for x in report["skipped"].values())
    assert (report["with_target"], report["with_caption"]) == (2, 2)
    assert report["skipped"]["the image cannot be read"]["rows"] == 3
    assert "       3  the image cannot be read (corrupt: " in capsys.readouterr().out


def test_a_data_set_without_one_example_is_an_error_and_can_be_begun_anew(bad, tmp_path):
    flags = [f"--from={bad}", f"--out={tmp_path / 'out'}", *COLUMNS]
    found = (
        rf"none of {len(BAD) + 5} rows is an example; 10: the mask is not of the form 'transparent' \(rows.jsonl, lin"
    )
    with pytest.raises(UserError, match=found) as caught:
        run(["json", *flags, "--mask_form=transparent"])
    assert "\n" not in caught.value.problem
    report = Path(caught.value.remedy.partition(" and ")[0])
    assert json.loads(report.read_text())["examples"] == 0
    assert len((report.parent / "skipped.jsonl").read_text().splitlines()) == len(BAD) + 5
    assert not (tmp_path / "out").exists()
    run(["json", *flags])


def test_a_table_without_rows_is_an_error(tmp_path):
    for rows, reason in (("", "there are no rows"), ("\n,,\n", "none of 1 rows .* the instruction is blank")):
        (tmp_path / "a.csv").write_text(f"image,mask,text\n{rows}")
        with pytest.raises(UserError, match=reason):
            run(["csv", f"--from={tmp_path / 'a.csv'}", f"--out={tmp_path / 'out'}", *COLUMNS[:3]])


def test_masks_may_be_runs(root, tmp_path):
    runs = " ".join(f"{row * SIDE + 6} 12" for row in range(4, 12))
    rows = [json.loads(line) | {"mask": runs} for line in (root / "rows.jsonl").read_text().splitlines()]
    rows[1]["mask"], rows[2]["mask"] = "4 2 9999 1", None
    write_rows(root, rows)
    run(["json", f"--from={root}", f"--out={tmp_path / 'out'}", *COLUMNS, "--mask_form=runs"])
    np.testing.assert_array_equal(open_source(f"tfds:{tmp_path / 'out'}")[0].mask, data_sets.region())
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert report["skipped"].keys() == {"the mask is not of the form 'runs'", "no mask", "the id is there already"}


def test_links_within_the_folder_are_followed(bad, tmp_path):
    (bad / "image.png").rename(tmp_path / "blob")
    (bad / "image.png").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    run(["json", f"--from={bad}", f"--out={tmp_path / 'out'}", *COLUMNS])
    assert open_source(f"tfds:{tmp_path / 'out'}")[0].name == "first"


# Pictures


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    picture.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def test_files_are_kept_unless_their_pixels_need_more_than_decoding(tmp_path):
    source, _ = data_sets.pictures(0)
    picture = Image.fromarray(source)
    turned = Image.Exif()
    turned[0x0112] = 6
    cells = {
        "png": encoded(picture, "PNG"),
        "jpeg": encoded(picture, "JPEG", quality=95),
        "turned": encoded(picture, "JPEG", exif=turned),
        "webp": encoded(picture, "WEBP", lossless=True),
        "grey": encoded(picture.convert("L"), "PNG"),
        "palette": encoded(picture.quantize(8), "PNG"),
        "profile": encoded(picture, "PNG", icc_profile=icc.rgb_profile(icc.ADOBE_RGB, np.square)),
        "clear": encoded(picture.convert("RGBA"), "PNG"),
    }
    mask = data_sets.of_hub(data_sets.white(source))
    rows = [{"image": {"bytes": cells[name], "path": ""}, "mask": mask, "text": "Go.", "id": name} for name in cells]
    data_sets.write_parquet(tmp_path / "a.parquet", rows)
    out = tmp_path / "out"
    run(["parquet", f"--from={tmp_path / 'a.parquet'}", f"--out={out}", *COLUMNS[:3], "--id=id"])

    import tensorflow_datasets as tfds

    skip = {field: tfds.decode.SkipDecoding() for field in ("image", "mask", "target")}
    stored = tfds.builder_from_directory(out).as_data_source("train", decoders=skip)
    kept = [record["name"].decode() for record in stored if record["image"] == cells[record["name"].decode()]]
    assert kept == ["png", "jpeg"]
    found = {example.name: example.image for example in open_source(f"tfds:{out}")}
    for name in ("png", "webp", "clear"):
        np.testing.assert_array_equal(found[name], source)
    np.testing.assert_array_equal(found["turned"], np.rot90(np.asarray(Image.open(io.BytesIO(cells["turned"]))), -1))
    assert np.abs(found["profile"].astype(int) - source).max() > 5
    decoded = tfds.builder_from_directory(out).as_data_source("train")
    assert all((record["image"] == found[record["name"].decode()]).all() for record in decoded)


@pytest.mark.parametrize(
    ("identifier", "name"),
    [
        ("add-0/1/00003.png", "add-0-1-00003"),
        ("../../etc/passwd", "-..-etc-passwd"),
        ('a:b*c?"<d>|e\n', "a-b-c-d-e-"),
        ("...", "-"),
        ("é" * 200, "é" * 120),
    ],
)
def test_names_of_examples_can_name_files(identifier, name):
    assert safe_name(identifier) == name


def test_a_folder_beside_the_file_that_is_read_can_be_written(root):
    run(["json", f"--from={root / 'rows.jsonl'}", f"--out={root / 'out'}", *COLUMNS])
    assert (root / "out" / "prepare.json").is_file()


def test_no_module_imports_lazily_while_threads_decode(root, tmp_path):
    """etils' lazy imports replace `__import__` in all threads, and Pillow's relative imports fail meanwhile."""
    script = """
import sys
from pathlib import Path
from rcgrpo_jax.data.prepare import run
from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.prepare.sets import open_own
read_row, missing = run.read_row, []
def watched(*row):
    missing.extend({"tensorflow_datasets"} - {*sys.modules})
    return read_row(*row)
run.read_row = watched
form = RowForm("image", "mask", "text", "target", "caption", id=("id",))
out = Path(sys.argv[2])
out.mkdir()
run.prepare(open_own("json", Path(sys.argv[1]), ""), form, out, workers=2)
assert not missing, missing
"""
    subprocess.run([sys.executable, "-c", script, root, tmp_path / "out"], check=True)
