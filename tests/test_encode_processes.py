"""`rcgrpo data encode` by several processes, and by several runs at once: no example twice, and no entry is lost."""

import itertools
import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_run
from PIL import Image
from test_distributed import finish, start

from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.encoding.cache import EncodedSource

SHAPES = ((48, 96), (96, 48))  # of the pictures, each of which has a bucket
COUNT = 14  # examples, of which the first and the last are equal


def write_data(folder: Path) -> Path:
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(COUNT - 1):
        height, width = SHAPES[i % 3 % 2]  # two of three are wide
        picture = rng.integers(0, 256, (6, 6, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[8:40, 8:40] = 255
        Image.fromarray(picture).resize((width, height)).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        rows.append({"image": f"{i}.png", "mask": f"mask{i}.png", "instruction": f"Paint box {i} red."})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "edits")


# Two at a time, and each process tells what it has written.
TELL = """
from rcgrpo_jax.encoding import cache
cache.PIXELS_AT_ONCE = 2 * 64 * 64
if not hasattr(cache.EncodedSource, "told"):  # the configuration file is run more than once
    cache.EncodedSource.told, save = True, cache.EncodedSource._save
    def tell(self, file, tensors, texts):
        save(self, file, tensors, texts)
        print("wrote", file.name, flush=True)
    cache.EncodedSource._save = tell
"""
# The process ends within the writing of its third entry, whose file is there under another name.
KILLED = """
    import os, signal, sys
    replace, replaced = os.replace, []
    def kill(source, target):
        if str(target).endswith(".safetensors"):
            replaced.append(target)
        if "--process_id={victim}" in sys.argv and len(replaced) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)
    os.replace = kill
"""


def config_file(path: Path, data: Path, cache: Path, body: str = "") -> Path:
    changes = {"data__path": str(data), "data__cache": str(cache), "data__buckets": "kontext"}
    return small_run.config_file(path, TELL + body, **changes)


def written(*outputs: str) -> list[str]:
    return re.findall(r"^wrote (\S+)$", "".join(outputs), re.MULTILINE)


def entries(cache: Path) -> dict[str, int]:
    """The whole entries of a cache, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}


def read_all(data: Path, cache: Path) -> EncodedSource:
    """All examples as a run reads them; nothing is to be encoded."""
    editor = FluxKontextEditor(FluxKontext(small_run.model_folder()), EditorOptions("float32", 16))
    found = EncodedSource(EditFolder(data), editor, (64, 64), cache, buckets="kontext")
    assert found.made == 0
    for index, known in found.known.items():
        row = found[index]
        assert row["instruction"] == known.instruction
        assert row["pixels"].shape == (*known.size, 3)
        assert np.isfinite(np.float32(row["reference"])).all()
    return found


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_encode_each_example_once(data, tmp_path):
    cache = tmp_path / "cache"
    config = config_file(tmp_path / "config.py", data, cache)
    ended = finish(start(config, tmp_path / "run", 2, "data encode"), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    shares = [written(output) for _, output, _ in ended]
    assert min(map(len, shares)) >= COUNT // 2 - 1
    assert sorted(itertools.chain(*shares)) == sorted(entries(cache))
    assert len(entries(cache)) == COUNT - 1  # of two equal ones one
    assert [f"encoded      {COUNT - 1} in" in output for _, output, _ in ended] == [True, False]
    found = read_all(data, cache)
    assert {size: len(indices) for size, indices in found.buckets.items()} == {(48, 96): 10, (96, 48): 4}

    before = entries(cache)
    for count in (2, 1):  # also another number of processes
        ended = finish(start(config, tmp_path / "run", count, "data encode"), tmp_path)
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert [written(output) for _, output, _ in ended] == [[]] * count
        assert "encoded      0 in" in ended[0][1]
    assert entries(cache) == before


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_loses_what_it_had_in_hand_alone(data, tmp_path, victim):
    cache = tmp_path / "cache"
    config = config_file(tmp_path / "killed.py", data, cache, KILLED.format(victim=victim))
    ended = finish(start(config, tmp_path / "run", 2, "data encode"), tmp_path)
    assert ended[victim][0] == -signal.SIGKILL
    code, output, error = ended[1 - victim]
    assert code == 1 or (victim == 0 and code == -signal.SIGABRT), error  # JAX ends the others too, and may be first
    assert "another process is gone" in error or "another task died" in error
    assert "Traceback" not in error
    assert len(written(ended[victim][1])) == 2
    done = entries(cache)
    assert sorted(done) == sorted(written(output, ended[victim][1]))

    config = config_file(tmp_path / "config.py", data, cache)
    ended = finish(start(config, tmp_path / "run", 2, "data encode"), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    made = written(*(output for _, output, _ in ended))
    assert sorted([*made, *done]) == sorted(entries(cache))
    assert {name: entries(cache)[name] for name in done} == done
    assert len(read_all(data, cache)) == COUNT


@pytest.mark.slow
def test_two_runs_on_one_cache_at_the_same_time_do_no_damage(data, tmp_path):
    """They know nothing of each other, and may both encode an example."""
    cache = tmp_path / "cache"
    config = config_file(tmp_path / "config.py", data, cache)
    argv = small_run.command("data", "encode", f"--config={config}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": small_run.environment()}
    runs = [subprocess.Popen([*argv, f"--workdir={tmp_path / name}"], **pipes) for name in ("one", "two")]
    outputs = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert set(written(*outputs)) == set(entries(cache))
    assert len(entries(cache)) == COUNT - 1
    assert not list(cache.glob("*.partial"))
    assert len(read_all(data, cache)) == COUNT
