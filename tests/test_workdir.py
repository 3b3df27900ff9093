"""The directory of a run: one run has it at a time, and what lies in the way is named before the first step."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.errors import UserError, is_everywhere
from rcgrpo_jax.options import TrainOptions
from rcgrpo_jax.report.run_record import read_run
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.run import FOLDERS, open_run
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder, no_leftovers
from rcgrpo_jax.whole import sweep, whole_file


def opened(workdir: Path) -> Checkpointer:
    with open_run(TrainOptions(), {}, workdir) as checkpointer:
        return checkpointer


def refused(workdir: Path) -> str:
    """What is said of a directory in which no run can start; nothing is changed in it."""
    before = sorted(workdir.rglob("*")) if workdir.is_dir() else []
    with pytest.raises(UserError) as error:
        opened(workdir)
    assert (sorted(workdir.rglob("*")) if workdir.is_dir() else []) == before
    assert is_everywhere(error.value)
    return error.value.problem


# One run at a time

HOLD = """
import sys, time
from pathlib import Path
from rcgrpo_jax.runs.workdir import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(small_run.ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_directory_is_one_runs_until_that_ends_and_a_kill_is_an_end(tmp_path, holder):
    assert f"process {holder.pid} on {os.uname().nodename} is at work in it" in refused(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    opened(tmp_path)
    opened(tmp_path)


def test_a_reader_needs_no_lock(tmp_path, holder):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert read_run(tmp_path).metrics == [{"step": 1}]


def test_an_ablation_has_its_folder_to_itself(capsys, tmp_path, holder):
    file = small_run.config_file(tmp_path / "config.py", data__path="scenes:train:4")
    _, problem, _ = small_run.fail(
        capsys, "ablate", f"--config={file}", f"--out={tmp_path}", "--variant=a: acd.weight=0",
        "--data=scenes:heldout:2", "--config.rewards.colour=0", "--config.rewards.oracle=1",
    )  # fmt: skip
    assert f"process {holder.pid} on " in problem


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(monkeypatch, tmp_path, caplog, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text


# A run that was refused


def make_and_hold(workdir: Path, *names: str, error: Exception | None = None) -> None:
    """What a run does in its directory before its first step; `names` end with / where they are folders."""
    with no_leftovers(workdir):
        make_folder(workdir, "workdir")
        with hold(workdir):
            for name in names:
                path = workdir / name
                path.mkdir(parents=True) if name.endswith("/") else path.write_text("")
            if error:
                raise error


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("names", [["compiled/"], ["compiled/", "compiled/program", "images/"]], ids=str)
def test_a_refused_run_leaves_nothing_of_its_own(tmp_path, names):
    with pytest.raises(UserError):
        make_and_hold(tmp_path / "runs" / "a", *names, error=UserError("no.", "Go."))
    assert names_in(tmp_path) == []


def test_a_refused_run_leaves_what_was_there_and_what_has_content(tmp_path):
    for name in ("images", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / LOCK).write_text("")
    with pytest.raises(UserError):
        make_and_hold(tmp_path, "compiled/", "cache/", "cache/encoded", error=UserError("no.", "Go."))
    assert names_in(tmp_path) == ["cache", "images", LOCK, "notes"]


def test_a_refused_run_leaves_compiled_programs_that_were_there_and_those_beside_results(tmp_path):
    for name in ("old/compiled", "new"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError):
        make_and_hold(tmp_path / "old", "compiled/program", error=UserError("no.", "Go."))
    with pytest.raises(UserError):
        make_and_hold(tmp_path / "new", "compiled/", "compiled/program", "metrics.jsonl", error=UserError("no.", "Go."))
    assert names_in(tmp_path / "old") == ["compiled"]
    assert names_in(tmp_path / "new") == ["compiled", "metrics.jsonl"]


def test_a_run_that_ends_well_leaves_its_folders(tmp_path):
    make_and_hold(tmp_path, "compiled/")
    assert names_in(tmp_path) == ["compiled", LOCK]


# What lies in the way


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    assert refused(tmp_path / "run").startswith(f"workdir: {tmp_path}/run cannot be made")
    assert refused(tmp_path / "run" / "deeper").startswith(f"workdir: {tmp_path}/run/deeper cannot be made")


@pytest.mark.parametrize("name", [*FOLDERS, "checkpoints/10"])
def test_a_file_where_a_folder_belongs(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert refused(tmp_path) == f"workdir: {tmp_path}/{name} is a file; a folder was wanted."


@pytest.mark.parametrize("name", ["metrics.jsonl", LOCK])
def test_a_folder_where_a_file_belongs(tmp_path, name):
    (tmp_path / name).mkdir()
    assert refused(tmp_path) == f"workdir: {tmp_path}/{name} is a folder; a file was wanted."


@pytest.mark.parametrize(("name", "wanted"), [("images", "a folder"), ("metrics.jsonl", "a file")])
def test_a_link_to_nothing(tmp_path, name, wanted):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert refused(tmp_path) == f"workdir: {tmp_path}/{name} is a link to nothing; {wanted} was wanted."


@pytest.mark.parametrize("name", [".", "checkpoints", "images", "tensorboard"])
def test_a_folder_that_nobody_may_write_to(monkeypatch, tmp_path, name):
    locked = tmp_path / name
    locked.mkdir(exist_ok=True)
    real = tempfile.TemporaryFile

    def fail(*args, dir, **options):
        if Path(dir) == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert refused(tmp_path) == f"workdir: {locked} cannot be written to (Permission denied)."


def test_what_is_shared_for_reading_may_be_so(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    real = tempfile.TemporaryFile

    def fail(*args, dir, **options):
        assert Path(dir).name != "cache"
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    make_folder(tmp_path, "workdir", FOLDERS)


def test_foreign_files_among_the_checkpoints_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpointer(folder, save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, {"x": np.zeros(1)}, {"seed": 0})
    names = ("notes.txt", ".DS_Store", "1 (copy)", "copy of 1", "٣")
    for name in names:
        (folder / name).mkdir() if "1" in name or name == "٣" else (folder / name).write_text("")
    checkpointer = opened(tmp_path)
    assert checkpointer.steps() == [1]
    with Checkpointer(folder, save_every=1, keep=1) as checkpointer:
        checkpointer.save(2, {"x": np.zeros(1)}, {"seed": 0})
    assert sorted(path.name for path in folder.iterdir()) == sorted((*names, "2"))


def test_an_empty_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints/7: the checkpoint cannot be read") as error:
        read_run(tmp_path)
    assert error.value.remedy.endswith("to go on from the start.")


def test_checkpoints_that_nobody_may_read(monkeypatch, tmp_path):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("rcgrpo_jax.runs.checkpoint.ocp.path.step.standard_name_format", fail)
    with pytest.raises(UserError, match="checkpoints: cannot be read: PermissionError"):
        read_run(tmp_path)


@pytest.mark.parametrize("copied", ["step_000009 (1).png", "step_000009 copy.png", "step_٩.png", "step_.png"])
def test_a_copied_picture_is_no_step(tmp_path, copied):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "images").mkdir()
    for name in ("step_000002.png", copied):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "step_000003.png").mkdir()
    (tmp_path / "images" / "step_000004.png").symlink_to("gone")
    assert list(read_run(tmp_path).pictures) == ["step 2"]


@pytest.mark.parametrize("kind", ["folder", "unreadable"])
def test_metrics_that_cannot_be_read(monkeypatch, tmp_path, kind):
    file = tmp_path / "metrics.jsonl"
    if kind == "folder":
        file.mkdir()
    else:
        file.write_text("")

        def fail(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_run(tmp_path)


# Files that are whole


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_is_what_it_was_until_it_is_whole(tmp_path, fails):
    (tmp_path / "there").write_text("before")
    (tmp_path / "link").symlink_to("there")
    with pytest.raises(OSError, match="full") if fails else nullcontext(), whole_file(tmp_path / "link") as partial:
        partial.write_text("after")
        assert (tmp_path / "there").read_text() == "before"
        if fails:
            raise OSError("full")
    assert (tmp_path / "there").read_text() == ("before" if fails else "after")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "there"]


def test_what_a_kill_leaves_is_swept_and_nothing_else(tmp_path):
    names = [".mine.partial", "a.partial", f".{'0' * 32}.partial"]
    for name in names:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == names[:2]
