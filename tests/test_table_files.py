"""Containers give the same rows whatever the files, from any row on, and name rows that cannot be read."""

import base64
import csv
import io
import json
import tarfile
from pathlib import Path

import data_sets
import numpy as np
import pytest

from rcgrpo_jax.data.paths import Finder
from rcgrpo_jax.data.prepare.row import Prepared, RowForm, read_row
from rcgrpo_jax.data.prepare.sets import fit_form
from rcgrpo_jax.data.tables import CONTAINERS, FileTable, find_files
from rcgrpo_jax.errors import UserError

COUNT = 7
FORM = RowForm(image="image", mask="mask", instruction="text", target="target", id=("name",))


def rows_of(start: int, count: int) -> list[dict]:
    rows = []
    for index in range(start, start + count):
        source, target = data_sets.pictures(index)
        pictures = {"image": source, "mask": data_sets.white(source), "target": target}
        rows.append(
            {key: data_sets.png(value) for key, value in pictures.items()} | {"text": "Go.", "name": f"n{index}"}
        )
    return rows


def as_paths(folder: Path, row: dict) -> dict:
    """The row with its pictures in files beside the table."""
    cells = dict(row)
    for key in ("image", "mask", "target"):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        cells[key] = f"pictures/{row['name']}-{key}.png"
        (folder / cells[key]).write_bytes(row[key])
    return cells


def as_text(row: dict) -> dict:
    """The row with its pictures in Base64, plain and as data URLs."""
    coded = {key: base64.b64encode(row[key]).decode() for key in ("image", "mask", "target")}
    return row | coded | {key: f"data:image/png;base64,{coded[key]}" for key in ("mask", "target")}


def write_parquet(file: Path, rows: list[dict]) -> None:
    data_sets.write_parquet(file, [row | {"image": {"bytes": row["image"], "path": None}} for row in rows], group=2)


def write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.DictWriter(opened, FORM.columns.values(), delimiter="\t" if file.suffix == ".tsv" else ";")
        writer.writeheader()
        writer.writerows(as_paths(file.parent, row) if index % 2 else as_text(row) for index, row in enumerate(rows))


def write_json(file: Path, rows: list[dict]) -> None:
    rows = [as_paths(file.parent, row) for row in rows]
    if file.suffix == ".jsonl":
        file.write_text("\n\n".join(map(json.dumps, rows)))
    elif rows[0]["name"] == "n0":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text(json.dumps({row["name"]: row for row in rows}))


def write_tar(file: Path, rows: list[dict]) -> None:
    mode = "w:gz" if file.suffix == ".gz" else "w"
    with tarfile.open(file, mode) as archive:
        for row in rows:
            texts = json.dumps({"text": row["text"], "name": row["name"]}).encode()
            contents = {"PNG": row["image"], "mask.png": row["mask"], "target.png": row["target"], "json": texts}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"some.folder/{row['name']}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


TAR = RowForm("png", "mask.png", "json.text", "target.png", id=("json.name",))
KINDS = [
    ("parquet", write_parquet, ".parquet", FORM),
    ("csv", write_csv, ".csv", FORM),
    ("csv", write_csv, ".tsv", FORM),
    ("json", write_json, ".json", FORM),
    ("json", write_json, ".jsonl", FORM),
    ("webdataset", write_tar, ".tar", TAR),
    ("webdataset", write_tar, ".tar.gz", TAR),
]


@pytest.mark.parametrize(("kind", "write", "suffix", "form"), KINDS, ids=[kind[2] for kind in KINDS])
def test_rows_are_the_same_from_any_row_on_and_over_files(tmp_path, kind, write, suffix, form):
    for number, (start, count) in enumerate(((0, 3), (3, 4))):
        write(tmp_path / f"{number}{suffix}", rows_of(start, count))
    table = FileTable(CONTAINERS[kind], find_files(tmp_path, CONTAINERS[kind]))
    assert len(table) == COUNT
    assert {*form.columns.values()} <= {*table.columns}
    for start in (0, 1, 3, 5, COUNT):
        found = [read_row(row, 0, form, Finder()) for row in table.rows(start, form.columns.values())]
        assert [example.id for example in found] == [f"n{index}" for index in range(start, COUNT)]
        for index, example in enumerate(found, start=start):
            assert isinstance(example, Prepared)
            image, target = data_sets.pictures(index)
            np.testing.assert_array_equal(example.example.image, image)
            np.testing.assert_array_equal(example.example.target, target)
            np.testing.assert_array_equal(example.example.mask, data_sets.region())


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    write_tar(tmp_path / "a.tar", rows_of(0, 1))
    write_parquet(tmp_path / "a.parquet", rows_of(0, 1))
    for kind, name in (("webdataset", "a.tar"), ("parquet", "a.parquet")):
        asked = "json.text" if kind == "webdataset" else "text"
        (row,) = CONTAINERS[kind].rows(tmp_path / name, columns=[asked])
        assert row.cells[asked] == "Go."
        assert not {"png", "image"} & {*row.cells}


def faults(kind: str, file: Path) -> list[str]:
    rows = list(CONTAINERS[kind].rows(file))
    assert CONTAINERS[kind].count(file) == len(rows)
    return [row.fault for row in rows]


def test_lines_that_are_no_rows_cost_themselves_alone(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n1,2,3\n\n\xff,2\n"1\n')
    assert [bool(fault) for fault in faults("csv", tmp_path / "a.csv")] == [False, True, False, True]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[1]\n{"a": \n\n{"a": 2}')
    first, second, third, fourth = faults("json", tmp_path / "a.jsonl")
    assert (first, second, fourth) == ("", "[1] found, no object", "")
    assert third.startswith("no JSON")


def test_a_quote_that_is_not_closed_names_the_lines_that_it_swallows(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3,"4\n5,6\n7,8\n')
    first, second = faults("csv", tmp_path / "a.csv")
    assert first == ""
    assert second.startswith("lines 3 to 5: unexpected end of data")


def test_a_column_that_comes_twice_or_is_a_link_costs_its_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.txt", None), ("b.txt", None), ("b.txt", None), ("c.txt", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind or tarfile.REGTYPE, "a.txt"
            archive.addfile(member, io.BytesIO())
    first, second, third = faults("webdataset", tmp_path / "a.tar")
    assert (first, second) == ("", "txt is there twice")
    assert "txt is a link" in third


@pytest.mark.parametrize(
    ("name", "content", "problem"), [("a.json", "[]", "no rows found"), ("a.jsonl", "[", "no JSON")]
)
def test_a_table_without_columns_says_why(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        fit_form(FORM, FileTable(CONTAINERS["json"], [tmp_path / name]), ())


def test_an_archive_that_was_cut_gives_the_rows_before_the_cut(tmp_path):
    write_tar(tmp_path / "a.tar", rows_of(0, 3))
    content = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        end = archive.getmember("some.folder/n1.mask.png").offset_data + 100
    (tmp_path / "a.tar").write_bytes(content[:end])
    assert [bool(fault) for fault in faults("webdataset", tmp_path / "a.tar")] == [False, True]
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        faults("webdataset", tmp_path / "b.tar")


def test_a_damaged_row_group_costs_itself_alone(tmp_path):
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "a.parquet", rows_of(0, 6))
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 64] = b"\xff" * 64
    (tmp_path / "a.parquet").write_bytes(content)
    assert [bool(fault) for fault in faults("parquet", tmp_path / "a.parquet")] == [False] * 2 + [True] * 2 + [
        False
    ] * 2


@pytest.mark.parametrize(
    ("kind", "name", "content", "problem"),
    [
        ("parquet", "a.parquet", b"PAR1 and then nothing", "cannot be read as Parquet .* a whole file was wanted"),
        ("csv", "a.csv", b"a,a\n1,2\n", "the first line is .* names of columns, each once"),
        ("csv", "a.csv", b"", "this is an empty file"),
        ("csv", "a.csv", "a,b\n1,2\n".encode("utf-16"), "the first line is not UTF-8"),
        ("json", "a.json", b'{"a": 1}', "a list of objects was wanted"),
        ("json", "a.json", b'[{"a": 1}', "not readable as JSON"),
        ("json", "a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "a Git LFS pointer"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, kind, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        FileTable(CONTAINERS[kind], [tmp_path / name]).columns  # noqa: B018


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    from rcgrpo_jax.data.tables import parquet

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    parquet.load_pyarrow.cache_clear()
    with pytest.raises(UserError, match="pyarrow, which is not installed") as caught:
        CONTAINERS["parquet"].count(tmp_path / "a.parquet")
    assert "[data]" in caught.value.remedy


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_is_read_from_any_row_across_its_batches(tmp_path, kind):
    import pyarrow

    file = tmp_path / "data-00000-of-00001.arrow"
    table = pyarrow.table({"n": [*range(10)], "text": [f"row {i}" for i in range(10)]})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    arrow = CONTAINERS["arrow"]
    assert (arrow.columns(file), arrow.count(file)) == (["n", "text"], 10)
    for start in (0, 3, 4, 9, 10):
        found = [(row.where, row.cells) for row in arrow.rows(file, start, ["n"])]
        assert found == [(f"{file.name}, row {i}", {"n": i}) for i in range(start, 10)]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: cannot be read as Arrow"):
        list(arrow.rows(file))
