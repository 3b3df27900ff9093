"""benchmarks.data: it and its peer do the same work, and the table says what was measured."""

import json

import numpy as np
import pytest
from references import Reference

from benchmarks import data
from rcgrpo_jax.data.buckets import KINDS, make_buckets
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.scenes.files import write_folder
from rcgrpo_jax.data.scenes.source import parse_scenes

data_torch = Reference("benchmarks.data_torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    write_folder(data.Shaped(3, 96), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_both_make_the_same_pixels_of_a_folder(folder, kind):
    source, fit = EditFolder(folder), make_buckets(kind, (32, 32)).fit
    assert [source[i].mask.shape for i in range(3)] == [(96, 96), (64, 96), (96, 64)]
    pictures = data.pictures_of(source, fit, folder)
    job = data_torch.Job("folder", str(folder), [data_torch.Picture(*x) for x in pictures], [[0], [1], [2]], [], 0)
    assert data_torch.measure(job)[1] == data.read(source, fit)
    assert data.read(source, make_buckets("none", (16, 16)).fit) != data.read(source, fit)


def test_both_make_the_same_pixels_of_scenes():
    source, fit = parse_scenes("train:2"), make_buckets("none", (32, 32)).fit
    pictures = [data_torch.Picture(*x) for x in data.pictures_of(source, fit)]
    assert data_torch.measure(data_torch.Job("scenes", "train:2", pictures, [[0, 1]], [], 0))[1] == data.read(
        source, fit
    )


def test_the_table_has_medians_with_their_spread_and_ratios_of_a_turn():
    found = {"read": [2.0, 4.0, 9.0], "peer read": [1.0, 4.0, 3.0], "first start": [1.0, 1.0, 1.0]}
    found |= {"encoding": [0.5] * 3, "next start": [50.0] * 3, "from the cache": [80.0] * 3, "peer cache": [40.0] * 3}
    header, line = data.rows({"folder, one": found})
    assert len(header) == len(line)
    assert line[:6] == ["folder", "one", "4 (2 to 9)", "3", "2 (1 to 3)", "1 (1 to 1)"]
    assert line[6:] == ["50%", "50", "80 (80 to 80)", "40", "2 (2 to 2)"]


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_kind_and_way_of_fitting(tmp_path, capfd):
    file = tmp_path / "data.json"
    data.main(["--count=3", "--side=64", "--size=32", "--prompts=2", "--repeats=1", f"--json={file}"])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| folder",
        "| folder",
        "| records",
        "| records",
        "| scenes",
        "| scenes",
    ]
    rates = json.loads(file.read_text())["rates"]
    assert len(rates) == 6
    assert all(np.isfinite(x).all() and len(x) == 1 for row in rates.values() for x in row.values())
