"""Plans for GPUs that are not there: jax's CUDA plugin compiles without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.plan import gpu
from rcgrpo_jax.plan.topology import open_topology

PLUGIN = Path(sys.prefix) / "cuda"  # where launch/test.sh puts it: nothing else shall see it
COMMAND = "import sys; from rcgrpo_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
# Lowering asks for cuDNN's version alone; its gigabyte is not needed to compile.
WITH_CUDNN = (
    f"from jax._src.cudnn import fused_attention_stablehlo as f; f.check_cudnn_version = lambda: 91000; {COMMAND}"
)
needs_plugin = pytest.mark.skipif(not PLUGIN.is_dir(), reason="no CUDA plugin: run bash launch/test.sh once")


def plan(path: Path, *argv: str, command: str = COMMAND) -> tuple[subprocess.CompletedProcess, dict]:
    report = path / "plan.json"
    config = small_run.config_file(path / "config.py")
    argv = ["plan", f"--config={config}", f"--json={report}", "--config.model.dtype=bfloat16", *argv]
    environment = os.environ | {"PYTHONPATH": str(PLUGIN), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", command, *argv], env=environment, capture_output=True, text=True)
    return found, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.slow
@needs_plugin
def test_two_nodes_of_gpus_with_cudnn(tmp_path):
    """cuDNN counts by its operands: a device that attended to the samples or heads of others would show."""
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    found, report = plan(tmp_path, "--topology=2*h100:4", *mesh, command=WITH_CUDNN)
    assert found.returncode == 0, found.stderr
    assert "attention cudnn" in found.stdout
    assert "72.78 GiB a device" in found.stdout
    assert {"jax", "jax-cuda12-plugin"} <= set(report["software"])
    rollout, _, update = report["programs"]
    for program in (rollout, update):
        assert program["cost"]["uncounted"] == {}
        assert 0.8 < program["cost"]["flops"] / program["analytic"] < 1.1, program["name"]
        assert program["roofline"]["compute"] > 0
    gathers = rollout["cost"]["collectives"]["all-gather"]
    assert 0 < gathers["dcn"] < gathers["ici"]  # weights stay within a node; its results do not
    assert update["cost"]["collectives"]["all-reduce"]["dcn"] > 0  # gradients


@needs_plugin
def test_without_cudnn_the_error_says_what_to_do(tmp_path):
    found, _ = plan(tmp_path, "--topology=a100:1")
    if found.returncode == 0:
        pytest.skip("this machine has cuDNN")
    assert found.returncode == 1
    assert "error: model.attention: cudnn needs cuDNN" in found.stderr
    assert "jax[cuda12]" in found.stderr.splitlines()[-1]


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="h100:8 needs the GPU compiler") as error:
        open_topology("h100:8")
    assert "pip install 'jax[cuda12]'" in error.value.remedy


def test_the_users_share_of_the_memory_counts(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert gpu.memory_fraction() == 0.5
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "half")
    with pytest.raises(UsageError, match="'half' found"):
        gpu.memory_fraction()
