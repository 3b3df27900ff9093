"""Encoders run once: their results lie on disk under the hash of what went in."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from rcgrpo_jax.data.buckets import NONE, Fitted, Size, make_buckets
from rcgrpo_jax.data.example import Source, stamp_of
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.encoding.index import READING, KnownExample, read_index, write_index
from rcgrpo_jax.encoding.prefetch import read_ahead
from rcgrpo_jax.errors import UserError, mark_everywhere
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.whole import whole_file

logger = logging.getLogger(__name__)
EXAMPLE = {"pixels", "mask", "target", "instruction", "caption"}  # what an entry holds beside the encodings
PIXELS_AT_ONCE = 2**20  # of the pictures that are encoded together: 4 of 512 x 512
MOST_AT_ONCE = 16  # of small ones: the last of a bucket are filled up to the number
_SAME_DATA = "Give every process the same data, or one folder that all see."


class Entry(NamedTuple):
    """What the file of an example holds beside its encodings."""

    pictures: dict[str, np.ndarray]  # `pixels` and, where there is one, `target`, uint8 [H, W, 3]; `mask`, uint8 [H, W]
    texts: dict[str, str]  # `instruction`, and `caption` where it is kept


class EncodedSource:
    """Examples with their encodings, each computed once and kept in a folder.

    Several processes share the work; where they share the folder too, each example is encoded by one of them.

    The file of an example is named by a hash of its pixels, mask, target and instruction (what its bucket keeps of
    them), its caption where that is kept, of the editor's `encoding_key`, and of the size, so that changed inputs never
    meet old results. Beside them lies an index by path, size and time of the examples' files: a start reads none that
    has been encoded and is unchanged.

    Args:
        source: The examples.
        editor: Encoders; not touched if everything is in the cache.
        size: (height, width) that images and masks are resized to, or with buckets: whose area they get.
        folder: The cache; created if missing.
        validate: Called with what is known of each example; raises if it cannot be used.
        progress: Called after each example with (done, all).
        captions: Whether entries hold the captions, which every example must have then.
        buckets: A value of `data.buckets`.

    Attributes:
        known: What is known of this process' own examples, by index.
        made: How many entries this process has encoded.

    Raises:
        UserError: If an example cannot be read or differs between processes, or the cache cannot be written.
    """

    def __init__(
        self,
        source: Source,
        editor: Editor,
        size: tuple[int, int],
        folder: str | Path,
        validate: Callable[[KnownExample], None] = lambda _: None,
        progress: Callable[[int, int], None] = lambda *_: None,
        captions: bool = False,
        buckets: str = NONE,
    ):
        self.folder, self._editor, self._captions = Path(folder), editor, captions
        self._buckets, self._kind = make_buckets(buckets, size), buckets
        self._at_once = max(1, min(PIXELS_AT_ONCE // (size[0] * size[1]), MOST_AT_ONCE, len(source)))
        self.known: dict[int, KnownExample] = {}
        self.made = 0
        sizes = distributed.gather(np.array([len(source)]))
        if sizes.min() < sizes.max():
            apart = UserError(
                f"data: the processes find different numbers of examples, {', '.join(map(str, sizes))}.", _SAME_DATA
            )
            raise mark_everywhere(apart)
        own, counted = distributed.local_job_range(len(source)), itertools.count(1)

        def count(indices: Sequence[int]) -> None:
            for _ in indices:
                progress(next(counted), len(own))

        hashes, places = np.zeros((len(source), 16), np.uint8), np.zeros(len(source), np.int32)
        with distributed.raise_together():
            self.known = self._find(source, own, validate)
            for index, known in self.known.items():
                hashes[index] = np.frombuffer(bytes.fromhex(known.entry), np.uint8)
                places[index] = self._buckets.sizes.index(known.size)
            self._remove_damaged()
        hashes, self._places = map(distributed.sum_over_processes, (hashes, places))  # a row is one process' own
        self._names = [row.tobytes().hex() for row in hashes]
        lacking = np.zeros(len(source), np.int32)
        with distributed.raise_together():
            lacking[self._absent()] = 1
        lacking = distributed.sum_over_processes(lacking)  # how many processes lack it: they may have a disk each
        if lacking.any():
            with distributed.raise_together():
                _make_folder(self.folder)
            editor.load_encoders()  # also where nothing is missing: the others' reading waits for it
        missing = sorted(np.flatnonzero(lacking == jax.process_count()), key=self._places.__getitem__)
        missing = [missing[job] for job in distributed.local_job_range(len(missing))]
        count(own[len(missing) :])
        with distributed.raise_together():
            self._encode(source, missing, count)
        with distributed.raise_together():  # those of the others, where they have disks of their own
            self._encode(source, self._absent())

    def _settings(self, *sizes: Size) -> list:
        """What entries of these sizes depend on besides their examples."""
        return [*self._editor.encoding_key, *map(list, sizes), *["captions"] * self._captions]

    def _find(self, source: Source, own: range, validate: Callable[[KnownExample], None]) -> dict[int, KnownExample]:
        """What is known of this process' examples; those whose files are as they were before are not read."""
        sizes = self._buckets.sizes
        settings = [READING, *self._settings(*sizes), *[self._kind] * self._buckets.crops]
        settings = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        index = read_index(self.folder, settings)

        def find(i: int) -> tuple[str | None, KnownExample]:
            stamp = stamp_of(source, i)
            known = index.get(stamp) if stamp else None
            if known is None or known.size not in sizes:
                example = source[i]
                about = (example.instruction, example.has_target, example.flawed, example.has_caption)
                fitted = self._buckets.fit(example)
                known = KnownExample(self._hash(fitted), example.name, *about, fitted.size, fitted.cut, fitted.lost)
            return stamp, known

        stamped, found = {}, {}
        for i, (stamp, known) in zip(own, read_ahead(find, own), strict=True):
            validate(known)
            if stamp:
                stamped[stamp] = known
            found[i] = known
        if stamped.items() - index.items():
            index = read_index(self.folder, settings)  # again: other runs may have written meanwhile
            write_index(self.folder, settings, jax.process_index(), index | stamped)
        return found

    def _hash(self, fitted: Fitted) -> str:
        """Names an example's entry."""
        example = fitted.example
        texts = [example.instruction, *[example.caption] * self._captions]
        digest = hashlib.sha256(json.dumps([*texts, *self._settings(fitted.size)]).encode())
        for array in (example.image, example.mask, example.target):
            if array is not None:
                digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]

    def _remove_damaged(self) -> None:
        """Removes this process' own entries that were cut short, as copies are: they are made anew."""
        from safetensors import SafetensorError, safe_open

        def check(name: str) -> None:
            try:
                safe_open(self._file(name), framework="np")  # compares the length with that of the tensors
            except FileNotFoundError:
                pass
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged (%s), and is made anew", self._file(name), error)
                with suppress(OSError):  # a cache for reading alone: its reader says so
                    self._file(name).unlink()

        for _ in read_ahead(check, sorted({known.entry for known in self.known.values()})):
            pass

    def _absent(self) -> list[int]:
        """The examples that have no entry here yet; of equal ones the first."""
        present = {file.name for file in os.scandir(self.folder)} if self.folder.is_dir() else set()
        first = {name: index for index, name in reversed([*enumerate(self._names)])}
        return sorted(index for name, index in first.items() if self._file(name).name not in present)

    def _encode(
        self, source: Source, indices: Sequence[int], done: Callable[[Sequence[int]], None] = lambda _: None
    ) -> None:
        """Encodes examples, bucket by bucket and always the same number together: a compilation a bucket."""
        order = sorted(indices, key=self._places.__getitem__)
        entries = read_ahead(lambda index: self._entry(source, index), order)
        for _, own in itertools.groupby(order, key=self._places.__getitem__):
            own = [*own]
            for start in range(0, len(own), self._at_once):
                chunk = own[start : start + self._at_once]
                self._write([self._names[index] for index in chunk], [next(entries) for _ in chunk])
                self.made += len(chunk)
                done(chunk)

    def _entry(self, source: Source, index: int) -> Entry:
        """What an example's entry holds beside the encodings."""
        fitted = self._buckets.fit(source[index])
        if self._hash(fitted) != self._names[index]:
            raise UserError(f"data: example {index} has changed, or is another on another process.", _SAME_DATA)
        example, size = fitted.example, fitted.size
        mask = np.round(255 * resize_mask(example.mask, size)).astype(np.uint8)
        pictures = {"pixels": resize_image(example.image, size), "mask": mask}
        if example.target is not None:
            pictures["target"] = resize_image(example.target, size)
        texts = {"instruction": example.instruction} | ({"caption": example.caption} if self._captions else {})
        return Entry(pictures, texts)

    @property
    def buckets(self) -> dict[Size, Int[np.ndarray, " n"]]:
        """The examples of each bucket that has any, by index; those of all processes."""
        found = {size: np.flatnonzero(self._places == place) for place, size in enumerate(self._buckets.sizes)}
        return {size: indices for size, indices in found.items() if len(indices)}

    @property
    def digest(self) -> str:
        """A hash of all examples in order: equal for runs that see the same data."""
        return hashlib.sha256(" ".join(self._names).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int) -> Path:
        """The file of an example."""
        return self._file(self._names[index])

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, index: int) -> dict:
        from safetensors import SafetensorError, safe_open

        file = self.file(index)
        try:
            with safe_open(file, framework="np") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                mask = np.asarray(tensors["mask"], np.float32) / (255 if tensors["mask"].dtype == np.uint8 else 1)
                return tensors | stored.metadata() | {"mask": mask}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: unreadable cache entry ({error}).", "Remove the file; it is made anew.") from None

    def _write(self, names: Sequence[str], entries: Sequence[Entry]) -> None:
        """Encodes examples together, filled up to the usual number by the last, and writes an entry for each."""
        filled = [*entries, *entries[-1:] * (self._at_once - len(entries))]
        pixels = np.stack([entry.pictures["pixels"] for entry in filled])
        encoded = self._editor.encode(pixels, [entry.texts["instruction"] for entry in filled])
        encoded = {name: np.asarray(x) for name, x in encoded.items()}
        for row, (name, entry) in enumerate(zip(names, entries, strict=True)):
            self._save(self._file(name), {key: x[row] for key, x in encoded.items()} | entry.pictures, entry.texts)

    def _save(self, file: Path, tensors: Mapping[str, np.ndarray], texts: dict[str, str]) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        in_order = {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # safetensors reads raw memory
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as partial:  # another run may write the same entry
                save_file(in_order, partial, metadata=texts)
        except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
            raise _unwritable(file, error) from None


def _make_folder(folder: Path) -> None:
    """Makes the cache, and refuses one that cannot be written to, before the encoders are loaded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"data.cache: {path} cannot be written ({error}).", "Free disk space, or set data.cache elsewhere."
    )
