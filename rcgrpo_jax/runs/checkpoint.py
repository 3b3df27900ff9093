"""Checkpoints of the training state: asynchronous, atomic, bit-equal, with errors a user can act on.

A checkpoint is the directory `<directory>/<step>`: one pytree of arrays (LoRA, optimizer, EMA, random key, step) and
the run's configuration as JSON. It is written beside its final name and renamed once it is whole, so a process killed
at any moment leaves the earlier checkpoints as they were and nothing that looks like a new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.errors import UserError, is_everywhere, mark_everywhere
from rcgrpo_jax.orbax import is_of_files, loading, ocp, saving
from rcgrpo_jax.parallel.distributed import raise_together
from rcgrpo_jax.runs.best import Held

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")  # strerror: ENOSPC, EDQUOT, EFBIG


class Checkpointer:
    """The checkpoints of one run. Reading touches nothing on disk, so a running training can be read beside.

    Args:
        directory: Where the step directories are; created by the first save.
        save_every: Steps between two saves.
        keep: Newest checkpoints to keep; older ones are deleted after a save.
    """

    def __init__(self, directory: str | os.PathLike[str], *, save_every: int, keep: int):
        self.directory = Path(directory).absolute()
        self._save_every, self._keep = save_every, keep
        self.held = Held()  # is kept beside them
        self._pending: tuple[int, int] = (0, 0)  # step and bytes of the save under way

    @cached_property
    def _orbax(self) -> Any:
        policies, preserve = ocp.training.save_decision_policies, ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=policies.FixedIntervalPolicy(self._save_every),
            preservation_policy=preserve.AnyPreservationPolicy([preserve.LatestN(self._keep), self.held]),
            cleanup_tmp_directories=True,  # what a killed save left behind
            context=saving(),
        )

    def save(self, step: int, state: PyTree, config: Mapping[str, Any], *, force: bool = False) -> bool:
        """Starts to save `state` if `step` is due; the arrays may be donated as soon as this returns.

        Args:
            step: Training steps done.
            state: Pytree of arrays of any dtype, typed random keys included.
            config: JSON-serialisable configuration of the run.
            force: Save even if the step is not due (the last step).

        Returns:
            Whether a save was started: false when not due, or when the step has been saved.

        Raises:
            UserError: The disk is full, now or in the save before this one.
        """
        with self._disk_errors():
            if not force and not self._orbax.should_save(step):
                return False
            self._orbax.wait()
            if self.latest_step() == step:
                return False
            self._pending = step, sum(x.nbytes for x in jax.tree.leaves(state))
            with raise_together():
                if self._pending[1] > self._free_bytes():
                    raise self._disk_full(_FULL_DISK[0])
            about = {"config": config, "checksums": _checksums(state)}
            return self._orbax.save_async(step, state, force=True, custom_metadata=about) is not None

    def steps(self) -> list[int]:
        """The steps with a whole checkpoint, in ascending order.

        Raises:
            UserError: The directory, or what describes a checkpoint, cannot be read.
        """
        try:
            if not self.directory.is_dir():
                return []
            return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))
        except Exception as error:
            for path in self._folders():
                with self._read_errors(path):
                    ocp.metadata(path)
            raise UserError(
                f"{self.directory}: cannot be read: {_reason(error)}", "Allow it, or put it back from a copy."
            ) from error

    def _folders(self) -> list[Path]:
        """The folders that are named as checkpoints are, whole or not, in the order of their steps."""
        found = (path for path in self.directory.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
        return sorted(found, key=lambda path: int(path.name))

    def latest_step(self) -> int | None:
        """The last step with a whole checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
        """Reads a state back, bit for bit, whatever the mesh it was saved from.

        Args:
            abstract_state: The state wanted, as arrays or `jax.ShapeDtypeStruct`; each array comes back on the
                sharding of its abstract leaf (the first local device where that has none).
            step: Which checkpoint; the latest by default.

        Returns:
            The state, of the tree and types of `abstract_state`.

        Raises:
            UserError: There is no such checkpoint, it is damaged, or it holds arrays of other names, shapes or dtypes.
        """
        path = self._path(step)
        wanted = jax.tree.map(_on_a_device, abstract_state)
        with self._read_errors(path):
            about = ocp.metadata(path)
            if about.metadata is None:
                raise ValueError("the description of its arrays is damaged")
        _check_same_arrays(path, _signatures(about.metadata), _signatures(wanted))
        with self._read_errors(path), loading():
            state, saved = ocp.load(path, wanted), about.custom_metadata["checksums"]
            if damaged := [name for name, found in _checksums(state).items() if found != saved[name]]:
                raise ValueError(f"{', '.join(damaged)}: not the values that were saved")
        return state

    def saved_config(self, step: int | None = None) -> dict[str, Any]:
        """The configuration that was saved with a step (the latest by default).

        Raises:
            UserError: There is no such checkpoint, or it is damaged.
        """
        path = self._path(step)
        with self._read_errors(path):
            config = ocp.metadata(path).custom_metadata["config"]
            if not isinstance(config, dict):
                raise ValueError(f"{shorten(config)} found for its configuration; a group of fields was wanted")
            return config

    def wait(self) -> None:
        """Returns when the save under way is on disk.

        Raises:
            UserError: The disk is full.
        """
        if "_orbax" in self.__dict__:  # something was saved
            with self._disk_errors():
                self._orbax.wait()

    def close(self) -> None:
        """Waits and ends the background threads; raises like `wait`."""
        if "_orbax" in self.__dict__:
            with self._disk_errors():
                self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        alone = jax.process_count() == 1
        if kind is None or alone or is_everywhere(error):  # else another may be gone, and closing waits for all
            self.close()

    def _path(self, step: int | None) -> Path:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            found = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(
                f"{self.directory}: no checkpoint{'' if step is None else f' of step {step}'}; {found}.",
                "Name the directory of a training run and one of its steps.",
            )
        return self.directory / str(steps[-1] if step is None else step)

    def _free_bytes(self) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.directory).free

    def _disk_full(self, reason: str) -> UserError:
        step, needed = self._pending
        return UserError(
            f"{self.directory}: {reason}: the checkpoint of step {step} needs {needed} bytes, {self._free_bytes()} "
            "are free.",
            "Free some space or keep fewer checkpoints, then run the same command: it resumes from step "
            f"{self.latest_step() or 0}.",
        )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a full disk, which reaches us as whatever the failing thread raised, into a `UserError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = next((text for text in _FULL_DISK if text in str(error)), None)
            if reason is None:
                raise
            full = self._disk_full(reason)
            raise (mark_everywhere(full) if is_everywhere(error) else full) from error

    @contextmanager
    def _read_errors(self, path: Path) -> Iterator[None]:
        """Turns any failure to read into a `UserError`: a damaged checkpoint fails in as many ways as it has files.

        Not what says nothing of the files: that a device has no room, or another process is gone.
        """
        try:
            yield
        except Exception as error:
            if not is_of_files(error):
                raise
            earlier = [other.name for other in self._folders() if other != path]
            raise UserError(
                f"{path}: the checkpoint cannot be read: {_reason(error)}",
                f"Put that directory back from a copy, or move it away to go on from "
                f"{f'step {earlier[-1]}' if earlier else 'the start'}.",
            ) from error


def _reason(error: BaseException) -> str:
    """One line of the exception at the root of a chain; Orbax wraps the file that failed in the handlers it tried."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if len(line) <= 200 else f"{line[:200]}..."


def _on_a_device(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _by_key_path(tree: PyTree) -> dict[str, Any]:
    """Key path -> leaf; equal for a state and for Orbax's description of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _signatures(tree: PyTree) -> dict[str, str]:
    """Key path -> `dtype[shape]`; a typed random key counts as the uint32 data it is stored as."""

    def signature(x: Any) -> str:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return f"{x.dtype}{list(x.shape)}"

    return {name: signature(x) for name, x in _by_key_path(tree).items()}


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _checksums(tree: PyTree) -> dict[str, int]:
    """Key path -> sum of the array's words modulo 2^32: exact, and the same under every sharding.

    They buy that a checkpoint which the disk has damaged is refused, since the files hold no checksum of their own and
    a lost block would load as other numbers. One sum is taken at a time: those of sharded arrays are collectives, and
    many at once can starve each other on a host's virtual devices.
    """
    return {name: int(_checksum(x)) for name, x in _by_key_path(tree).items()}


def _check_same_arrays(path: Path, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    differing = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        more = f" ({len(differing) - 1} more arrays differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{path}: {name} is {saved.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} in this "
            f"run{more}.",
            "Put the model, LoRA and optimizer settings back to the checkpoint's, or use another --workdir.",
        )
