"""What a command says and leaves behind: devices by name, any file name printed, a caller's process as it was."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import small_run

from rcgrpo_jax.cli import devices as devices_module
from rcgrpo_jax.cli.devices import describe, leave_devices_alone, open_devices
from rcgrpo_jax.cli.main import main
from rcgrpo_jax.cli.surroundings import JAX_OPTIONS, QUIETER, surroundings

# A caller's process


def state() -> dict:
    """All that a caller could miss."""
    return {
        "hooks": (sys.excepthook, sys.unraisablehook),
        "levels": [logging.getLogger(name).level for name in (None, "jax", *QUIETER)],
        "handlers": list(logging.getLogger().handlers),
        "environ": dict(os.environ),
        "jax": [getattr(jax.config, name) for name in JAX_OPTIONS],
        "errors": (sys.stdout.errors, sys.stderr.errors),
    }


@pytest.mark.parametrize("error", [None, ZeroDivisionError(), KeyboardInterrupt(), SystemExit(0)])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_caller_keeps_its_process(capsys, monkeypatch, error, debug):
    def run(argv):
        leave_devices_alone()
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        os.environ["XLA_FLAGS"] = "--of_plan"
        assert sys.excepthook is sys.__excepthook__
        if error:
            raise error

    monkeypatch.setattr("rcgrpo_jax.cli.export.run", run)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    before = state()
    small_run.run_command(capsys, "export", *debug)
    assert state() == before


def test_an_exception_of_a_caller_is_seen(tmp_path):
    code = (
        f"from rcgrpo_jax.cli.main import main\nmain(['export', '--workdir={tmp_path}', '--out=x'])\nraise KeyError(7)"
    )
    found = subprocess.run([sys.executable, "-c", code], env=small_run.environment(), capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.endswith("KeyError: 7\n")


# Devices


class Device:
    def __init__(self, platform: str, kind: str, process: int = 0):
        self.platform, self.device_kind, self.process_index = platform, kind, process


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([Device("tpu", "TPU v5 lite")] * 8, "8 x TPU v5 lite"),
        ([Device("gpu", "NVIDIA H100", i // 8) for i in range(16)], "16 x NVIDIA H100 in 2 processes"),
        ([Device("cpu", "cpu")], "1 x cpu (riscv64)"),
    ],
)
def test_devices_have_names(monkeypatch, found, text):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert describe(found) == text


SAID = {
    "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.": "'.[cuda]'",
    "A Google TPU may be present on this machine, but libtpu is not installed. Falling back to cpu.": "'.[tpu]'",
    "CUDA backend failed to initialize: no driver.": "nvidia-smi",
    "Another thing.": "Another thing.",
}


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("said", SAID)
def test_what_jax_says_of_its_choice_is_passed_on_with_the_way_out(capsys, caplog, monkeypatch, said, process):
    def choose():
        logging.getLogger("jax._src.any").warning(said)
        return [Device("cpu", "cpu")]

    monkeypatch.setattr(devices_module.jax, "devices", choose)
    monkeypatch.setattr(devices_module.jax, "process_index", lambda: process)
    with surroundings(debug=False):
        open_devices()
    messages = [record.getMessage() for record in caplog.records]
    assert [said in message and SAID[said] in message for message in messages] == [True] * (process == 0)
    assert capsys.readouterr().err.count("devices: 1 x cpu (") == (process == 0)
    assert logging.getLogger("jax").propagate


def test_a_jax_that_cannot_use_the_gpu_says_so(tmp_path):
    """With the one private name of JAX that pretends there is one."""
    code = (
        "from jax._src import hardware_utils\nhardware_utils.has_visible_nvidia_gpu = lambda: True\n"
        "from rcgrpo_jax.cli.devices import open_devices\nopen_devices()"
    )
    environment = {**os.environ, "PYTHONPATH": str(small_run.ROOT), "JAX_PLATFORMS": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0
    assert "pip install -e '.[cuda]'" in found.stderr
    chosen = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert chosen.stderr.startswith("devices: ")
    assert len(chosen.stderr.splitlines()) == 1


# Printing


@pytest.mark.parametrize("variables", [{}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_name_that_is_no_text_is_written_and_printed(tmp_path, variables):
    folder = os.fsencode(tmp_path) + b"/\xff\xc3\xbc"
    environment = {**small_run.environment(), **variables}
    argv = small_run.command("data", "scenes", "--count=1", "--size=32")
    found = subprocess.run([*argv, b"--out=" + folder], env=environment, capture_output=True)
    assert found.returncode == 0
    assert found.stdout.startswith(b"1 tasks (train, 32 x 32): ")
    assert b"\\udcff" in found.stdout
    assert (Path(os.fsdecode(folder)) / "metadata.jsonl").is_file()


def test_a_stream_without_encoding_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["--help"]) == 0
    assert sys.stdout.getvalue().startswith("usage: ")
