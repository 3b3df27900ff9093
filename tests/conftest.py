"""Every test runs on eight fake CPU devices, in fp32, with silent rank promotion forbidden."""

import gc
import os
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests compile: each program in one part, and where jaxlib still has it, by XLA's earlier code generator for CPUs.
# It takes half the time for what then runs a little slower. XLA ends a process that names a flag it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else "",
    )
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # LLVM need not try hard: most programs run once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import psutil
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

gc.freeze()  # what is imported stays, and tracing makes many objects that die by themselves
gc.set_threshold(100_000, 50, 100)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's cache; the workers of a session, which inherit the variable, share it."""
    if not hasattr(config, "workerinput"):
        kept = config.pluginmanager.hasplugin("cacheprovider")
        os.environ["RCGRPO_TESTS_COMPILED"] = str(config.cache.mkdir("compiled") if kept else tempfile.mkdtemp())


MOST_BYTES = 4 * 2**30  # of a worker
# With files as wholes, two workers end at about the same time if the long ones are not the last.
LONGEST = [
    f"test_{name}"
    for name in (
        "distributed", "experiment", "paper", "step", "sft", "resume", "ablation", "demo", "training", "quantization",
        "plan", "attention", "plan_search", "convert", "concentration", "evaluation", "mmdit", "benchmarks",
        "bucket_runs", "study_page", "layers", "compbench_official", "small_editor", "editor", "launch_tpu",
        "agreement", "measures", "lora", "report",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; xdist keeps to it with `--no-loadscope-reorder`."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A diffusers folder with random weights, of the sizes in `random_folder.SMALL`; not to be written to."""
    from rcgrpo_jax.weights import random_folder

    return random_folder.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def converted(folder, tmp_path_factory) -> Path:
    """What `convert` makes of it; not to be written to either."""
    from rcgrpo_jax.weights.convert import convert

    target = tmp_path_factory.mktemp("converted") / "model"
    convert(str(folder), target)
    return target


@pytest.fixture(scope="module")
def one_device():
    """For modules with commands that take what devices there are: fake ones do the same work eight times."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Programs stay for the next module, until they fill the memory that two workers have."""
    yield
    if psutil.Process().memory_info().rss > MOST_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="module")
def full_optimization():
    """For modules in which running takes longer than compiling.

    JAX's keys of compiled programs leave this option out, and it changes last bits: nothing goes in or out.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
