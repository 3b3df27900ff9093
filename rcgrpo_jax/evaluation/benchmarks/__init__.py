"""The benchmarks that `rcgrpo evaluate --benchmark` knows, a file each."""

from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, Published, PublishedTable, Subset
from rcgrpo_jax.evaluation.benchmarks.compbench import COMPBENCH
from rcgrpo_jax.evaluation.benchmarks.gedit import GEDIT_CN, GEDIT_EN
from rcgrpo_jax.evaluation.benchmarks.imgedit import IMGEDIT

BENCHMARKS = {benchmark.name: benchmark for benchmark in (COMPBENCH, GEDIT_EN, GEDIT_CN, IMGEDIT)}

__all__ = ["BENCHMARKS", "Benchmark", "Published", "PublishedTable", "Subset"]
