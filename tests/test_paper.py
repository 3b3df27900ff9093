"""`launch/paper.sh`: the paper's experiment, command by command, and once as a whole on a tiny model with a judge."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import small_run
from launch_site import WAIT, Site

from rcgrpo_jax.data.scenes.files import write_folder, write_tasks
from rcgrpo_jax.data.scenes.source import Scenes

PACKAGE = Path(sys.prefix, "editscore")  # where launch/test.sh puts it
NEEDED = ["--model=M", "--data=D", "--judge=http://judge:8000/v1", "--out=O"]
LORAS = ("global", "rdp", "rdp-acd", "tau-1.0-1.0", "tau-0.8-1.2", "tau-1.2-0.8")
TABLES = {"table-1": LORAS[2:3], "table-2": LORAS[:3], "table-3": (LORAS[3], LORAS[2], *LORAS[4:])}


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(small_run.ROOT / "launch" / "paper.sh"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def dry_run(*argv: str) -> list[str]:
    done = run(*NEEDED, "--dry-run", *argv)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition("rcgrpo ")[2] for line in done.stdout.splitlines()]


def test_the_commands_of_the_experiment():
    lines = dry_run("--topology=h100:8", "--lpips-squeeze=S", "--", "--config.train.num_steps=7")
    kinds = [re.match(r"data \w+|\w+", line)[0] for line in lines]
    learned = ["train", "export"] * len(LORAS)
    assert kinds == ["data prepare"] * 2 + ["plan", *learned, "evaluate", "evaluate", "evaluate", "ablate"]
    assert lines[0] == "data prepare compbench --from D/compbench --out O/data/compbench"
    trained = dict(zip(LORAS, (line for line in lines if line.startswith("train ")), strict=True))
    for name, line in trained.items():
        assert "--config.data.path=tfds:O/data/humanedit" in line
        assert line.endswith(f"--config.train.num_steps=7 --workdir O/runs/{name}")
        assert ("--config.acd.weight=0" in line) == (name in ("global", "rdp"))
        assert ("--config.explore.kind=global" in line) == (name == "global")
    assert "--config.surrogate.tau_edit=0.8 --config.surrogate.tau_base=1.2" in trained["tau-0.8-1.2"]
    evaluated = [line for line in lines if line.startswith("evaluate ")]
    for (table, names), line in zip(TABLES.items(), evaluated, strict=True):
        assert f"--published {table} " in line
        assert tuple(re.findall(r"--adapter (\S+)=O/loras/\1(?: |$)", line)) == names
        assert "--lpips_squeeze S" in line
    assert "--seeds 0 --batches 20" in lines[-1]


def test_what_is_trained_on_may_be_any_data():
    lines = dry_run("--train=tfds:/data/mine@train[:90%]", "--clip=none")
    assert not any(line.startswith("data prepare humanedit") for line in lines)
    trained = [line for line in lines if line.startswith("train ")]
    assert len(trained) == len(LORAS)
    assert all("'--config.data.path=tfds:/data/mine@train[:90%]'" in line for line in trained)
    assert not any("--clip" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (NEEDED[:3], 2, "missing --out."),
        ([], 2, "missing --model --data --judge --out."),
        ([*NEEDED, "--steps=0"], 2, "--steps: '0' found; a positive integer was wanted."),
        ([*NEEDED, "--modle=M"], 2, "'--modle' found; a flag was wanted."),
        ([*NEEDED, "--config"], 2, "--config: '' found; a value was wanted."),
        ([*NEEDED, "--size=512"], 2, "--size: '512' found; WIDTHxHEIGHT in pixels was wanted."),
        ([*NEEDED, "--lpips-squeeze=/nowhere"], 1, "--lpips-squeeze: no file /nowhere found."),
        (NEEDED, 1, "--data: no folder D/compbench found."),
    ],
    ids=["one", "all", "steps", "flag", "value", "size", "weights", "data"],
)
def test_mistakes_are_told(argv, code, problem):
    done = run(*argv)
    assert (done.returncode, done.stdout) == (code, "")
    first, remedy = done.stderr.splitlines()
    assert first == f"launch/paper.sh: error: {problem}"
    assert remedy.startswith("  ")


def test_the_commands_are_run_as_they_are_shown_whatever_becomes_of_the_script(tmp_path):
    site = Site(tmp_path)
    (site.path / "data" / "compbench").mkdir(parents=True)
    for table in ("table-1/table", "table-2/table", "table-3/table", "fig-5/groups"):
        (site.path / "out" / table).parent.mkdir(parents=True)
        (site.path / "out" / f"{table}.md").write_text(f"{table}\n")
    flags = ["--model=M", f"--data={site.path}/data", "--judge=J", f"--out={site.path}/out"]
    shown = site.run("paper.sh", *flags, "--dry-run").stdout
    done = site.run("paper.sh", *flags, does=f': >"{site.checkout}/launch/paper.sh"; exit 0')
    assert done.returncode == 0
    assert [" ".join(call) for call in site.calls("rcgrpo")] == shown.replace("'", "").splitlines()
    assert done.stdout.endswith("table-1/table\ntable-2/table\ntable-3/table\nfig-5/groups\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_goes_to_the_command_and_ends_the_experiment(tmp_path, name):
    site = Site(tmp_path)
    (site.path / "behaviour").write_text(WAIT)
    (site.path / "data" / "compbench").mkdir(parents=True)
    flags = ["--model=M", f"--data={site.path}/data", "--judge=J", f"--out={site.path}/out"]
    command = ["bash", str(site.checkout / "launch" / "paper.sh"), *flags]
    heed = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # also where the tests run without a terminal
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script = subprocess.Popen(command, env=site.environment(), preexec_fn=heed, **pipes)
    while not (site.homes[0] / "ready").exists():
        assert script.poll() is None
        time.sleep(0.01)
    script.send_signal(getattr(signal, name))
    said, problem = script.communicate(timeout=60)
    assert (script.returncode, said.splitlines()) == (143, ["step 1", "saved"])
    assert problem.endswith("launch/paper.sh: stopped; the same command goes on\n")
    assert len(site.calls("rcgrpo")) == 1


@pytest.fixture
def judge(tmp_path) -> str:
    """The address of an oracle for the scenes that are trained on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = small_run.ROOT / "launch" / "oracle_server.py"
    command = [sys.executable, str(script), f"--data={tmp_path / 'train'}", f"--port={port}"]
    write_folder(Scenes("train", 4, 64), tmp_path / "train")
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(small_run.ROOT)}) as server:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGE.is_dir(), reason="launch/test.sh installs editscore")
def test_the_whole_experiment(tmp_path, judge):
    """Scenes in CompBench's layout, a judge over HTTP, one step a run."""
    write_tasks(Scenes("heldout", 3, 64), tmp_path / "in" / "compbench")
    out = tmp_path / "out"
    argv = [
        f"--model={small_run.model_folder()}", f"--data={tmp_path / 'in'}", f"--judge={judge}", f"--out={out}",
        f"--train={tmp_path / 'train'}", f"--config={small_run.ROOT / 'configs' / 'small_editor_paper.py'}",
        "--clip=none", "--size=64x64", "--steps=1", "--batches=1", "--",
        "--config.rewards.oracle=0", "--config.rewards.editscore=1", "--config.reward_options.editscore.model=oracle",
        "--config.train.num_steps=1", "--config.rollout.prompts=2", "--config.rollout.group_size=4",
        "--config.rollout.num_steps=2", "--config.data.size=(64,64)", "--config.model.max_text_tokens=16",
        "--config.acd.layers=2", "--config.lora.rank=4", "--config.train.writers=",
    ]  # fmt: skip
    environment = {
        "PYTHONPATH": f"{small_run.ROOT}:{PACKAGE}",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = run(*argv, **environment)
    assert done.returncode == 0, done.stderr
    for table, names in TABLES.items():
        text = (out / table / "table.md").read_text()
        assert text in done.stdout
        assert f"Table {table[-1]}" in text
        assert all(f"| {name} | measured | 3 |" in text for name in ("base", *names))
        assert "| published |" in text
    assert {file.name for file in (out / "edits").iterdir()} == {"base", *LORAS}
    assert "background drift" in (out / "fig-5" / "groups.md").read_text()
