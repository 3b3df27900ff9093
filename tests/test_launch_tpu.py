"""`launch/tpu.sh`: the commands it runs, in what order, and what arrives on the workers."""

import shlex
import subprocess
import time
from pathlib import Path

import pytest
from launch_site import HARD, RECORD, TRAIN, UNPACK, WAIT, WORKER, Site, far

PLACE = ["--zone=us-west4-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DIRECT = ["gcloud", "compute", "tpus", "tpu-vm"]
DESCRIBE = [*QUEUED, "describe", "rc", *PLACE, "--format=value(state.state)", "--quiet"]
DELETE = [*QUEUED, "delete", "rc", *PLACE, "--force", "--quiet"]
EVERYWHERE = ["--worker=all", "--node=all", "--batch-size=all"]
ALIVE = ["--ssh-flag=-oConnectTimeout=15", "--ssh-flag=-oServerAliveInterval=30"]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def tpu(site, action, *argv, **kwargs):
    return site.run("tpu.sh", action, "--name=rc", *PLACE, *argv, **kwargs)


def ssh(command: str, *flags: str) -> list[str]:
    return [*QUEUED, "ssh", "rc", *PLACE, *EVERYWHERE, *flags, *ALIVE, f"--command={command}", "--quiet"]


def start(*argv: str) -> str:
    return f"{{ {UNPACK}{WORKER} start tpu {shlex.join(argv)}; }} < rcgrpo.tar.gz"


def without_archive(call: list[str]) -> list[str]:
    return [word if not word.endswith("code.tar.gz") else "CODE" for word in call]


SCP = [*QUEUED, "scp", "CODE", "rc:rcgrpo.tar.gz", *PLACE, *EVERYWHERE, "--quiet"]
ATTEMPT = [SCP, ssh(start(*TRAIN)), ssh(far("follow")), ssh(far("status"))]


def create(*flags: str) -> list[str]:
    return [*QUEUED, "create", "rc", *PLACE, *flags, "--quiet"]


V5E = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=rc"]


# What is created


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


# The whole way


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


def test_a_request_after_a_preemption_may_fail_and_is_made_again(site):
    states = "ACTIVE SUSPENDED ABSENT FAILED ABSENT ACTIVE"
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states=states, lost="1")
    assert done.returncode == 0
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


def changes(site) -> list[list[str]]:
    return [call for call in site.calls("gcloud") if call[4] in ("create", "delete")]


def test_a_tpu_that_cannot_be_reached_any_more_is_made_again(site):
    """It was started there; then nobody follows, says how it went, starts it again twice, or answers at all."""
    states = "ACTIVE ACTIVE ACTIVE ABSENT ACTIVE"
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states=states, lost="2 3 4 5 6")
    assert done.returncode == 0
    assert changes(site) == [DELETE, create(*V5E), DELETE]


def test_a_tpu_that_was_never_reached_is_kept(site):
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE ACTIVE ACTIVE", lost="1 2 3 4")
    assert done.returncode == 1
    assert "error: rc cannot be reached.\n  See to ssh first" in done.stderr
    assert changes(site) == []


def test_a_tpu_that_answers_but_starts_nothing_is_kept(site):
    (site.homes[1] / "rcgrpo").write_text("where a directory was wanted")
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN, states="ACTIVE ACTIVE ACTIVE")
    assert done.returncode == 1
    assert "error: rc can be reached, but rcgrpo cannot be started there." in done.stderr
    assert changes(site) == []


def test_a_configuration_that_git_ignores_is_refused_before_anything_is_created(site):
    (site.checkout / ".gitignore").write_text("configs/a.py\n")
    done = tpu(site, "train", "--type=v5litepod-16", "--", *TRAIN)
    assert done.returncode == 2
    assert "--config: 'configs/a.py:v5e_16' found, which git ignores" in done.stderr
    assert site.calls() == []


def test_a_dry_status_prints_what_it_would_ask(site):
    dry = tpu(site, "status", "--dry-run")
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == [DESCRIBE, ssh(far("status"))]


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


# What arrives


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
    fresh += ["--rename-dir-limit=200000"]
    assert site.calls("pip", "gcsfuse", "rcgrpo") == [
        [*pip, "--upgrade", "pip"],
        [*pip, "--editable", ".[tpu]"],
        ["gcsfuse", *fresh, "bucket", "/gcs/bucket"],
        ["rcgrpo", "train", "--config", "configs/a.py:v5e_16", "--workdir", "/gcs/bucket/run"],
    ]


def test_a_newer_python_is_fetched_for_the_images_of_tpu_vms(site):
    """Theirs is 3.10."""
    new, old = site.path / "bin" / "python3.12", site.path / "bin" / "python3"
    old.rename(new)
    old.write_text(f"""{RECORD}case $* in -c*) exit 1 ;; "-m uv python find 3.12") echo "{new}" ;; esac""")
    old.chmod(0o755)
    assert tpu(site, "train", "--keep", "--type=v5litepod-16", "--", *HARD, states="ACTIVE").returncode == 0
    assert site.argv(0) == site.argv(1) == HARD
    fetch = [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "python", "install", "--quiet", "3.12"],
        ["-m", "uv", "python", "find", "3.12"],
    ]
    calls = [call[1:] for call in site.calls("python3") if call[1] == "-m"]
    assert sorted(calls) == sorted(2 * fetch)  # two workers, side by side
    assert sorted(fetch, key=calls.index) == fetch
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


# A dry run


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
