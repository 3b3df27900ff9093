"""Rows of Arrow files, as the library `datasets` saves them and some hub repositories have them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rcgrpo_jax.data.tables.base import Container, Row
from rcgrpo_jax.data.tables.parquet import load_pyarrow
from rcgrpo_jax.errors import UserError, reason

_ROWS = 8  # made Python objects at a time: pictures of a megabyte or more are among them
_FILE = b"ARROW1"  # how the file format begins; the stream format has no such mark


class Arrow(Container):
    """Arrow's streams and files, by pyarrow. A part that is damaged ends the file: streams have no index."""

    suffixes = (".arrow",)
    form = "an Arrow file"

    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        number = 0
        with _open(file) as batches:
            for batch in batches:
                names = [name for name in batch.schema.names if columns is None or name in columns]
                kept = batch.select(names)
                for offset in range(max(0, start - number), len(batch), _ROWS):
                    for row, cells in enumerate(kept.slice(offset, _ROWS).to_pylist(), start=number + offset):
                        yield Row(f"{file.name}, row {row}", cells, file.parent)
                number += len(batch)

    def columns(self, file: Path) -> list[str]:
        with _open(file) as batches:
            return next((list(batch.schema.names) for batch in batches), [])

    def count(self, file: Path) -> int:
        with _open(file) as batches:
            return sum(map(len, batches))


@contextmanager
def _open(file: Path) -> Iterator[Iterator]:
    """The record batches of a file, mapped into memory and not read into it.

    Raises:
        UserError: It is no Arrow file, or damaged.
    """
    pa, _ = load_pyarrow()
    try:
        with pa.memory_map(str(file)) as source:
            is_file = source.read(len(_FILE)) == _FILE
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            yield (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as Arrow ({reason(error)}); a whole file was wanted.",
            "It may have been cut short: download it again, or move it away.",
        ) from None
