"""Several processes are one run: the same losses, one checkpoint, one set of records, and none waits for the dead."""

import signal
import socket
import subprocess
from pathlib import Path

import pytest
import small_run

from rcgrpo_jax.training.loop import train

SETTINGS = {"rollout__prompts": 4, "mesh__fsdp": 2, "train__num_steps": 3, "train__save_every": 1}


def start(config: Path, workdir: Path, count: int, **variables: str) -> list[subprocess.Popen]:
    """`rcgrpo train` on `count` processes that share eight devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = config.parent
    environment = small_run.environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"}
    return [
        subprocess.Popen(
            small_run.command(
                "train", f"--config={config}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}", f"--process_id={index}",
            ),
            env=environment | variables, text=True,
            stdout=(log / f"{index}.out").open("w"), stderr=(log / f"{index}.err").open("w"),
        )
        for index in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], log: Path, timeout: float = 400) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, *((log / f"{i}.{kind}").read_text() for kind in ("out", "err"))) for i, code in enumerate(codes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The state and the directory of the run on one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    return train(small_run.make_config(**SETTINGS), workdir), workdir


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_have_the_losses_of_one(alone, tmp_path, count):
    workdir = tmp_path / "run"
    config = small_run.config_file(tmp_path / "config.py", data__cache=str(tmp_path / "cache"), **SETTINGS)
    ended = finish(start(config, workdir, count), tmp_path)
    assert [code for code, _, _ in ended] == [0] * count, ended
    assert ["checkpoint" in output for _, output, _ in ended] == [True] + [False] * (count - 1)  # told once
    found, wanted = (small_run.metrics_without_times(path) for path in (workdir, alone[1]))
    assert [line["step"] for line in found] == [1, 2, 3]
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1


# Process 1 dies at the end of the third step, once the second is on disk.
DEATH = """
from rcgrpo_jax.training.metrics import MetricsWriter
import signal, sys, time
scalars = MetricsWriter.scalars
def die(self, step, metrics):
    scalars(self, step, metrics)
    if step == 3 and "--process_id=1" in sys.argv:
        while not os.path.isdir({checkpoint!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter.scalars = die
"""


def test_when_one_process_is_killed_the_other_says_so_and_one_alone_can_go_on(tmp_path):
    workdir = tmp_path / "run"
    settings = SETTINGS | {"train__num_steps": 4, "data__cache": str(tmp_path / "cache")}
    body = DEATH.format(checkpoint=str(workdir / "checkpoints" / "2"))
    config = small_run.config_file(tmp_path / "config.py", body, **settings)
    (left, _, error), (killed, _, _) = finish(start(config, workdir, 2), tmp_path)
    assert killed == -signal.SIGKILL
    assert left == 1
    assert "another process is gone" in error
    assert "Traceback" not in error
    state = train(small_run.make_config(**settings), workdir)  # on one process with eight devices
    assert int(state.step) == 4
    assert [line["step"] for line in small_run.metrics_without_times(workdir)] == [1, 2, 3, 4]
