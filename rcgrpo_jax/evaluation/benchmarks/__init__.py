"""The benchmarks that `rcgrpo evaluate --benchmark` knows, a file each."""

from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, Published, PublishedTable
from rcgrpo_jax.evaluation.benchmarks.compbench import COMPBENCH

BENCHMARKS = {benchmark.name: benchmark for benchmark in (COMPBENCH,)}

__all__ = ["BENCHMARKS", "Benchmark", "Published", "PublishedTable"]
