"""Rows of Parquet files, as hubs give data sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

from rcgrpo_jax.data.tables.base import Container, Row
from rcgrpo_jax.errors import UserError, reason

_BATCH = 8  # rows in memory at a time: pictures of a megabyte or more are among them
_BUFFER = 2**20  # bytes: with a buffer, pages are read one after another and not whole columns


class Parquet(Container):
    """Parquet, by pyarrow. A part that is damaged costs the rest of its row group."""

    suffixes = (".parquet",)
    form = "a Parquet file"

    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        pa, _ = load_pyarrow()
        parquet = _open(file)
        known = parquet.schema_arrow.names
        names = [name for name in known if columns is None or name in columns]
        number = 0
        for group in range(parquet.num_row_groups):
            end = number + parquet.metadata.row_group(group).num_rows
            if end <= start:
                number = end
                continue
            try:
                for batch in parquet.iter_batches(_BATCH, [group], names, use_threads=False):
                    if number + len(batch) > start:
                        for offset, cells in enumerate(batch.to_pylist(), start=number):
                            if offset >= start:
                                yield Row(f"{file.name}, row {offset}", cells, file.parent)
                    number += len(batch)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                for offset in range(max(number, start), end):
                    yield Row(f"{file.name}, row {offset}", fault=reason(error))
            number = end

    def columns(self, file: Path) -> list[str]:
        return list(_open(file).schema_arrow.names)

    def count(self, file: Path) -> int:
        return _open(file).metadata.num_rows


@lru_cache(maxsize=1)
def load_pyarrow():
    """pyarrow and its Parquet, which only those need who read such files."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "Parquet and Arrow files are read by pyarrow, which is not installed.", "Run pip install -e '.[data]'."
        ) from None
    return pa, pq


def _open(file: Path):
    pa, pq = load_pyarrow()
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as Parquet ({reason(error)}); a whole file was wanted.",
            "It may have been cut short: download it again, or move it away.",
        ) from None
