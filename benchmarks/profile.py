"""`python -m benchmarks.profile WORKDIR`: where the time of a run goes, by its metrics and, if it has one, its trace.

The run is one of `rcgrpo train`, with `--config.train.profile_steps=N` for the trace. Its first step compiles and is
left out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from jax.profiler import ProfileData

from rcgrpo_jax.plan.text import align
from rcgrpo_jax.runs.metrics import read_metrics

PHASES = ("data", "rollout", "reward", "update")
Interval = tuple[float, float]  # start and end


def phase_seconds(lines: list[Mapping[str, float]]) -> dict[str, float]:
    """Median seconds of each part of a step, and of the rest: metrics, pictures and checkpoints.

    Args:
        lines: Of `metrics.jsonl`, from the first step on, of one start.
    """
    steps = lines[1:]
    seconds = {name: median(line[f"seconds/{name}"] for line in steps) for name in PHASES}
    rests = [
        line["time"] - before["time"] - sum(line[f"seconds/{name}"] for name in PHASES)
        for before, line in zip(lines, steps, strict=False)
    ]
    return seconds | {"records": median(rests)}


def program_seconds(trace: Path) -> tuple[dict[str, float], float]:
    """Seconds in which each compiled program ran on any thread or device, longest first, and those of the steps."""
    running, steps = defaultdict(list), []
    for plane in ProfileData.from_file(str(trace)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_module" in stats:
                running[stats["hlo_module"]].append((event.start_ns, event.end_ns))
            elif "step_num" in stats:
                steps.append((event.start_ns, event.end_ns))
    seconds = {name: covered(intervals) / 1e9 for name, intervals in running.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1])), covered(steps) / 1e9


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    length, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def rows(seconds: Mapping[str, float], whole: float, least: float = 0.0) -> Iterator[list[str]]:
    """Name, seconds and share of the whole, of what has at least a share of `least`."""
    yield from ([name, f"{x:.3f}", f"{x / whole:.1%}"] for name, x in seconds.items() if x >= least * whole)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("workdir", type=Path, help="directory of a run of `rcgrpo train`")
    workdir = parser.parse_args(argv).workdir
    if not (metrics := workdir / "metrics.jsonl").is_file():
        parser.error(f"workdir: {metrics} is missing; the directory of a run was wanted.")
    lines = [line for line in read_metrics(metrics) if line["step"]]  # step 0 has held-out samples alone
    if len(lines) < 3:
        parser.error(f"workdir: {len(lines)} steps found in {metrics}, 3 were wanted. Train for longer.")
    if "seconds/rollout" not in lines[0]:
        parser.error(f"workdir: {metrics} is not of `rcgrpo train`. Name the directory of such a run.")
    seconds = phase_seconds(lines)
    print(align([["a step", "seconds", "share"], *rows(seconds, sum(seconds.values()))]))
    for trace in sorted(workdir.glob("profile/**/*.xplane.pb")):
        programs, steps = program_seconds(trace)
        print("\n" + align([["a program", "seconds", "share"], *rows(programs, steps, least=1e-3)]))


if __name__ == "__main__":
    main()
