"""`launch/editscore.sh`: what it installs, merges and serves, and how it waits and ends."""

import os
import time

import pytest
from launch_site import Site

PLACE = "runs/editscore"
SERVES = 'trap "exit 0" TERM; touch "$SITE/healthy"; for i in {1..1500}; do sleep 0.02; done'
URLS = "--config.reward_options.editscore.urls=http://here:8000/v1,http://here:8001/v1"


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    for file in (site.checkout / PLACE).glob("*.pid"):
        if is_running(site, int(file.stem)):
            os.kill(int(file.read_text()), 9)


def is_running(site: Site, port: int) -> bool:
    return f"port {port}: ended" not in site.run("editscore.sh", "status").stdout


def serve(site: Site, *argv: str, does: str = SERVES):
    return site.run("editscore.sh", "me/lora", "--gpus=0,3", "--host=here", *argv, does=does)


def started(site: Site, count: int) -> list[list[str]]:
    """The calls of so many servers: one answers for all here, and the others may still be on their way."""
    end = time.monotonic() + 60
    logs = [site.checkout / PLACE / f"{port}.log" for port in range(8000, 8000 + count)]
    while time.monotonic() < end:
        if len(site.calls("vllm")) == count and all(log.is_file() and log.read_text() for log in logs):
            break
        time.sleep(0.05)
    return sorted(site.calls("vllm"))


def vllm(port: int, length: int = 4096) -> list[str]:
    return [
        "vllm", "serve", f"{PLACE}/model", "--served-model-name", "editscore", "--port", str(port),
        "--max-num-seqs", "64", "--max-model-len", str(length), "--limit-mm-per-prompt", '{"image": 2}',
        "--enable-prefix-caching", "--mm-processor-cache-gb", "0",
    ]  # fmt: skip


def test_a_server_a_gpu_is_started_and_its_address_printed(site):
    done = serve(site, "--base=me/base", "--max-model-len=8192")
    assert (done.returncode, done.stdout.split()) == (0, ["--config.reward_options.editscore.model=editscore", URLS])
    (merged,) = site.calls("python")
    assert merged == ["python", "launch/merge_lora.py", "me/lora", "me/base", f"{PLACE}/model.partial"]
    assert started(site, 2) == [vllm(8000, 8192), vllm(8001, 8192)]
    logs = [(site.checkout / PLACE / f"{port}.log").read_text() for port in (8000, 8001)]
    assert logs == ["GPU 0\n", "GPU 3\n"]
    install = ["pip", "install", "--quiet", "--disable-pip-version-check", "vllm==0.33.0", "peft==0.21.2"]
    assert install in site.calls("pip")
    assert not (site.checkout / ".venv").exists()


def test_the_same_command_leaves_what_is_there_alone_and_stop_ends_it(site):
    serve(site)
    again = serve(site)
    assert (again.returncode, again.stdout.split()[1]) == (0, URLS)
    assert site.calls("python", "vllm") == []
    assert site.run("editscore.sh", "status").stdout == "port 8000: answers\nport 8001: answers\n"
    assert site.run("editscore.sh", "stop").returncode == 0
    assert site.run("editscore.sh", "status").stdout == "port 8000: ended\nport 8001: ended\n"
    assert serve(site).returncode == 0
    assert len(started(site, 2)) == 2


def test_it_waits_until_the_servers_answer(site):
    slow = 'trap "exit 0" TERM; sleep 0.5; date +%s%N >"$SITE/healthy"; for i in {1..1500}; do sleep 0.02; done'
    assert serve(site, does=slow).returncode == 0
    assert (site.path / "healthy").exists()
    assert len(site.calls("curl")) > 2


def test_a_server_that_ends_ends_the_command_with_its_last_words(site):
    done = serve(site, does="echo out of memory; exit 1")
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert "launch/editscore.sh: error: the server at port 8000 has ended; its last lines are above." in done.stderr


def test_a_merge_that_fails_leaves_no_model(site):
    (site.path / "bin" / "python").write_text('#!/bin/bash\nmkdir "${!#}"\nexit 1\n')
    assert serve(site).returncode == 1
    assert not (site.checkout / PLACE / "model").exists()
    assert site.calls("vllm") == []


def test_another_lora_is_not_served_from_the_same_folder(site):
    serve(site)
    other = site.run("editscore.sh", "me/other", "--gpus=0")
    assert (other.returncode, "model: merged of me/lora" in other.stderr) == (1, True)


def test_all_gpus_are_taken_by_default_and_without_one_it_says_so(site):
    (site.path / "bin" / "nvidia-smi").write_text("#!/bin/bash\nprintf '0\\n1\\n'\n")
    assert site.run("editscore.sh", "me/lora", "--host=here", does=SERVES).stdout.split()[1] == URLS
    site.run("editscore.sh", "stop")
    (site.path / "bin" / "nvidia-smi").unlink()
    assert "no GPU found" in site.run("editscore.sh", "me/lora", does=SERVES).stderr


def test_a_dry_run_runs_nothing(site):
    done = site.run("editscore.sh", "me/lora", "--dry-run")
    assert (done.returncode, site.calls()) == (0, [])
    assert "vllm serve runs/editscore/model" in done.stdout
    assert not (site.checkout / PLACE).exists()


def test_what_was_not_served_cannot_be_stopped(site):
    done = site.run("editscore.sh", "stop")
    assert (done.returncode, f"{PLACE}: no server found" in done.stderr) == (1, True)
