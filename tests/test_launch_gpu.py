"""`launch/gpu.sh`: one machine, several over ssh, and Slurm."""

import shlex
import subprocess

import pytest
from launch_site import HARD, TRAIN, UNPACK, WAIT, WORKER, Site, far

from rcgrpo_jax.plan import gpu


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.mark.parametrize("argv", [["--hosts=host0,host1"], ["--slurm"], []], ids=["hosts", "slurm", "here"])
def test_dry_runs_on_gpus_run_nothing(site, argv):
    dry = site.run("gpu.sh", "--dry-run", *argv, "--", *HARD)
    assert dry.returncode == 0
    assert site.calls() == []
    assert not (site.checkout / ".venv").exists()
    assert "lib_worker.sh" in dry.stdout


def test_one_machine(site):
    done = site.run("gpu.sh", "--", *HARD, does="exit 6", XLA_FLAGS="--mine")
    assert done.returncode == 6
    assert site.argv(0) == HARD
    assert site.environ(0, "XLA_FLAGS") == f"{gpu.XLA_FLAGS} --mine"
    assert site.environ(0, "XLA_PYTHON_CLIENT_MEM_FRACTION") == gpu.MEMORY_FRACTION
    assert site.environ(0, "JAX_LOCAL_DEVICE_IDS") is None
    assert ["pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[cuda]"] in site.calls("pip")


def test_no_gpu_flags_without_a_gpu(site):
    (site.path / "bin" / "nvidia-smi").unlink()
    assert site.run("gpu.sh", "--", "train").returncode == 0
    assert site.environ(0, "XLA_FLAGS") is None


def ssh_to(host: int, command: str, coordinator: str = "host0:12355") -> list[str]:
    cluster = f"RCGRPO_COORDINATOR={coordinator} RCGRPO_NUM_PROCESSES=2 RCGRPO_PROCESS_ID={host}"
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=30"]
    return ["ssh", *options, f"me@host{host}", f"export {cluster}; {command}"]


def test_several_hosts(site):
    done = site.run("gpu.sh", "--hosts=me@host0,me@host1", "--env", "A=b c", "--", *TRAIN)
    assert done.returncode == 0
    assert done.stdout.count("step 1\n") == 2
    begin = f"{UNPACK}export 'A=b c' && {WORKER} start cuda {shlex.join(TRAIN)}"
    calls = site.calls("ssh")
    assert [sorted(calls[i : i + 2]) for i in range(0, len(calls), 2)] == [
        [ssh_to(host, command) for host in (0, 1)] for command in (begin, far("follow"), far("status"))
    ]
    for host in (0, 1):
        assert site.environ(host, "RCGRPO_COORDINATOR") == "host0:12355"
        assert site.environ(host, "RCGRPO_NUM_PROCESSES") == "2"
        assert site.environ(host, "RCGRPO_PROCESS_ID") == str(host)
        assert site.environ(host, "A") == "b c"


def test_arguments_survive_ssh(site):
    assert site.run("gpu.sh", "--hosts=host0,host1", "--", *HARD).returncode == 0
    assert site.argv(0) == site.argv(1) == HARD


def test_the_coordinator_can_be_named_and_a_failing_host_fails_the_command(site):
    does = "case $HOME in *1) exit 7 ;; esac; exit 0"
    argv = ["--hosts", "me@host0,me@host1", "--coordinator=10.0.0.1:99", "--", "train"]
    assert site.run("gpu.sh", *argv, does=does).returncode == 7
    assert site.environ(1, "RCGRPO_COORDINATOR") == "10.0.0.1:99"
    assert ssh_to(0, far("status"), "10.0.0.1:99") in site.calls("ssh")


SBATCH = [
    "sbatch", "--job-name=rcgrpo", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue",
    "--open-mode=append", "--signal=TERM@300", "--partition=gpu",
]  # fmt: skip
SRUN = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"]


@pytest.mark.parametrize(
    ("does", "code", "requeued"),
    [("exit 0", 0, []), ("exit 8", 8, []), (f"kill -TERM $PPID; {WAIT}", 143, [["scontrol", "requeue", "17"]])],
    ids=["finished", "failed", "preempted"],
)
def test_slurm(site, does, code, requeued):
    """The job is submitted; then what it wraps is run as Slurm would."""
    argv = ["--slurm", "--nodes=2", "--gpus=4", "--sbatch=--partition=gpu", "--", *HARD]
    assert site.run("gpu.sh", *argv).returncode == 0
    (submitted,) = site.calls("sbatch")
    assert submitted[:-1] == SBATCH
    (site.path / "behaviour").write_text(does)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
    script = ["sh", "-c", submitted[-1].removeprefix("--wrap=")]
    done = subprocess.run(script, env=site.environment() | job, cwd="/", capture_output=True, text=True)
    assert done.returncode == code
    assert site.calls("srun") == [[*SRUN, "bash", "launch/lib_worker.sh", "task", *HARD]]
    assert site.argv(0) == HARD
    assert site.environ(0, "JAX_LOCAL_DEVICE_IDS") == "0,1"
    assert site.calls("scontrol") == requeued


def test_an_allocation_s_machines_are_given(site):
    done = site.run("gpu.sh", "--slurm", "--nodes=4", "--", "train", SLURM_JOB_ID="17")
    assert done.returncode == 2
    assert "--nodes found inside of an allocation, whose machines are given." in done.stderr
    assert site.calls() == []


def test_an_allocation_of_ones_own_is_not_put_back_into_the_queue(site):
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
    done = site.run("gpu.sh", "--slurm", "--", "train", does=f"kill -TERM $PPID; {WAIT}", **job)
    assert done.returncode == 143
    assert "saved" in done.stdout
    assert [call[0] for call in site.calls("sbatch", "srun", "scontrol")] == ["srun"]
