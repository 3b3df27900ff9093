"""The loop that every training shares. It writes metrics, pictures and checkpoints, stops on SIGTERM, and resumes."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.errors import StopRequested, UserError, is_everywhere, mark_everywhere
from rcgrpo_jax.options import TrainOptions
from rcgrpo_jax.parallel.distributed import (
    any_process,
    gather,
    is_main,
    raise_together,
    report_lost_process,
    text_of_main,
)
from rcgrpo_jax.progress import Progress
from rcgrpo_jax.runs.best import Best, write_mark
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.differences import check_same_config, config_differences
from rcgrpo_jax.runs.metrics import METRICS, MetricsWriter, check_finite, read_metrics
from rcgrpo_jax.runs.saved import Schema, saved_config
from rcgrpo_jax.runs.workdir import FOLDERS, LOCK, hold, make_folder
from rcgrpo_jax.runs.writers import check_installed, writer_names

logger = logging.getLogger(__name__)
State = TypeVar("State")
Pictures = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]  # of a step, by name; empty if none was asked for
# (state, step, whether to draw) -> new state, metrics, pictures
StepFunction = Callable[[State, int, bool], tuple[State, Mapping[str, float], Pictures]]
GRID, GALLERY, SAMPLES = "pictures", "gallery", "samples"  # names of pictures, as writers have them
FILES = {GRID: "step", GALLERY: "gallery", SAMPLES: "samples"}  # how the names of their files begin


@contextmanager
def open_run(
    options: TrainOptions, config_record: Mapping[str, Any], workdir: Path, results: Sequence[str] = ()
) -> Iterator[Checkpointer]:
    """Opens the directory of a run, which is created if missing, and locks it against other runs.

    Args:
        options: What it writes.
        config_record: Its configuration.
        workdir: The directory.
        results: Names of further folders in it.

    Yields:
        The checkpoints of the run.

    Raises:
        UserError: If the directory cannot be created or written to, if another run has locked it, if the processes have
            different directories or configurations, or if another process ends while the run is open.
    """
    with ExitStack() as stack:
        stack.enter_context(report_lost_process())
        with raise_together():
            make_folder(workdir, "workdir")
            if is_main():
                steps = [f"checkpoints/{x.name}" for x in workdir.glob("checkpoints/[0-9]*") if x.name.isdecimal()]
                make_folder(workdir, "workdir", (*FOLDERS, *results, *steps), (METRICS, LOCK))
                stack.enter_context(hold(workdir))
                check_installed(writer_names(options.writers))  # now, and not after hours of encoding
        saving = Checkpointer(workdir / "checkpoints", save_every=options.save_every, keep=options.keep)
        checkpointer = stack.enter_context(saving)
        found = gather(np.array([checkpointer.latest_step() or 0]))
        if found.min() < found.max():
            apart = UserError(
                f"workdir: {workdir}: the processes find checkpoints of different steps, {', '.join(map(str, found))}; "
                "one directory for all was wanted.",
                "Choose a folder that all processes share.",
            )
            raise mark_everywhere(apart)
        _check_same_command(config_record)
        yield checkpointer


def _check_same_command(config: Mapping[str, Any]) -> None:
    """Raises a `UserError` if the configuration of this process is not that of process 0."""
    main = json.loads(text_of_main(json.dumps(config)))
    with raise_together():
        if differences := config_differences(main, config, saved_as="process 0"):
            raise UserError(
                f"The configuration is not that of process 0: {'; '.join(differences)}.",
                "Start the same command on every process.",
            )


def restore(
    checkpointer: Checkpointer,
    state: State,
    config_record: Mapping[str, Any],
    schema: Schema,
    may_differ: Collection[str],
) -> State:
    """Reads the latest checkpoint.

    Args:
        checkpointer: Of `open_run`.
        state: The state before the first step. The checkpoint is read onto its shardings.
        config_record: The configuration as it is saved with each checkpoint.
        schema: The fields of this kind of training.
        may_differ: Dotted fields that a run may change when it resumes.

    Returns:
        The saved state, or `state` itself if there is no checkpoint.

    Raises:
        UserError: If the configuration saved with it differs from `config_record` in a field outside of `may_differ`.
    """
    step = checkpointer.latest_step()
    if step is None:
        return state
    check_same_config(saved_config(checkpointer, schema), config_record, may_differ)
    state = checkpointer.restore(state)
    logger.warning("resuming from step %d of %s", step, checkpointer.directory)
    return state


def read_best(workdir: Path, checkpointer: Checkpointer, metric: str, patience: int) -> Best:
    """The best checkpoint of a run that resumes, by `metrics.jsonl` as process 0 finds it; it is held and marked.

    Args:
        workdir: Of the run.
        checkpointer: Its checkpoints.
        metric: Of `Best`; empty: no step is the best.
        patience: Of `Best`.

    Raises:
        UserError: `metrics.jsonl` is damaged, or the mark cannot be written.
    """
    with raise_together():
        file = workdir / METRICS
        lines = read_metrics(file) if metric and is_main() and file.exists() else []
    known = [{"step": line["step"], metric: line[metric]} for line in lines if metric in line]
    lines = json.loads(text_of_main(json.dumps(known)))
    best = Best.read(metric, patience, lines, checkpointer.latest_step() or 0, checkpointer.steps())
    checkpointer.held.step = best.step
    with raise_together():
        if is_main():
            write_mark(checkpointer.directory, best)
    return best


def is_finished(state: State, num_steps: int, best: Best | None = None) -> bool:
    """Whether the run has no step left, or has run out of patience. If so, it logs that."""
    out_of_patience = best is not None and best.ends_run
    if int(state.step) < num_steps and not out_of_patience:
        return False
    logger.warning("nothing to do: %s", best if out_of_patience else f"train.num_steps is {num_steps}")
    return True


def run_steps(
    state: State,
    step_function: StepFunction,
    options: TrainOptions,
    config_record: Mapping[str, Any],
    workdir: Path,
    checkpointer: Checkpointer,
    name: str,
    samples: int,
    shown: Callable[[Mapping[str, float]], Mapping[str, float]],
    best: Best | None = None,
    before: Callable[[State], tuple[Mapping[str, float], Pictures]] | None = None,
    stop: threading.Event | None = None,
) -> State:
    """Runs the steps that are left. It saves every `train.save_every` steps, at the end and on SIGTERM.

    SIGTERM ends it after the step under way, or after the one before where that step raises `StopRequested`.

    Args:
        state: Has `step`, the steps done.
        step_function: One step. Its state may be donated.
        options: Its length, and what it writes.
        config_record: The configuration as it is saved with each checkpoint.
        workdir: Gets `metrics.jsonl`, `images/`, a folder of each of `train.writers`, and `profile/` if
            `train.profile_steps` asks for it.
        checkpointer: Of `open_run`.
        name: Of the progress bar.
        samples: Samples a step, for the rate.
        shown: Picks the metrics of the progress bar.
        best: The best checkpoint so far, of `read_best`; updated in place. It ends the run when its patience ends.
        before: What is measured and shown of the state before the first step, as step 0.
        stop: Set by SIGTERM, for a step that looks at it while it waits.

    Returns:
        The state after the last step that was taken.

    Raises:
        UserError: If the loss or the gradient is not finite; the checkpoints before it stay.
    """
    first, last = int(state.step), options.num_steps
    best = best or Best("", 0)
    with raise_together():  # process 0 alone opens them, and may fail
        names = writer_names(options.writers)
        metrics_writer = MetricsWriter(workdir, resume_step=first, names=names, config=config_record)
    with (
        metrics_writer as writer,
        Progress(last, first, name) as progress,
        termination(stop or threading.Event()) as stop,
    ):
        if before is not None and first == 0:
            metrics, pictures = before(state)
            with raise_together():
                writer.scalars(0, metrics)
                save_pictures(workdir, writer, 0, pictures)
        for step in trace_steps(range(first + 1, last + 1), name, workdir / "profile", options.profile_steps):
            draw = step % options.image_every == 0 or step == last
            try:
                state, metrics, pictures = step_function(state, step - 1, draw)
            except UserError as error:
                # As a judge that is gone: all processes still have the state of the step before, unless it was donated.
                whole = is_everywhere(error) and not any(x.is_deleted() for x in jax.tree.leaves(state))
                if whole and step > first + 1:
                    checkpointer.save(step - 1, state, config_record, force=True)
                if whole and any_process(isinstance(error, StopRequested)):
                    _log_stop(step - 1)
                    break
                raise
            check_finite(metrics, step)  # before saving: a lost run must not replace a good checkpoint
            with raise_together():  # process 0 alone writes, and the save under way is to end on all
                writer.scalars(step, metrics)
            stopped = any_process(stop.is_set())  # a preemption may reach the processes in different steps
            better = best.metric in metrics and best.add(step, float(metrics[best.metric]))
            due = step == last or stopped or better or best.ends_run
            checkpointer.save(step, state, config_record, force=due)
            if better:
                checkpointer.wait()  # the one before stays until this one is whole, and then the mark is true
                checkpointer.held.step = step
                with raise_together():
                    if is_main():
                        write_mark(checkpointer.directory, best)
            if pictures:  # after saving: one that cannot be written costs no step
                with raise_together():
                    save_pictures(workdir, writer, step, pictures)
            progress.update(shown(metrics), samples=samples)
            if best.ends_run:
                logger.warning("ended at step %d: %s", step, best)
                break
            if stopped:
                _log_stop(step)
                break
        checkpointer.wait()
    return state


def _log_stop(step: int) -> None:
    logger.warning("stopped at step %d on request; the same command resumes", step)


def save_pictures(workdir: Path, writer: MetricsWriter, step: int, pictures: Pictures) -> None:
    """Writes the pictures of a step, on process 0 alone: its own, where the processes have different ones."""
    if is_main():
        for name, picture in pictures.items():
            save_image(workdir / "images" / f"{FILES[name]}_{step:06d}.png", picture)
        writer.images(step, pictures)


def trace_steps(steps: range, name: str, folder: Path, count: int) -> Iterator[int]:
    """Yields the steps, and traces `count` of them on process 0, from the second on, since the first compiles.

    Args:
        steps: The steps of this start of the run.
        name: Of the steps in the trace.
        folder: Where jax.profiler writes the trace.
        count: Steps to trace; 0: none.
    """
    with ExitStack() as trace:
        for step in steps:
            if step == steps.start + 1 + count:
                trace.close()
            elif step == steps.start + 1 and is_main():
                trace.enter_context(jax.profiler.trace(str(folder)))
            with jax.profiler.StepTraceAnnotation(name, step_num=step):
                yield step


@contextmanager
def termination(stop: threading.Event) -> Iterator[threading.Event]:
    """Yields the event, which SIGTERM sets: what a preemption and `kill` send."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
