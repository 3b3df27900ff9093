"""Tables of rows, in whatever files they lie; what a row means as an example is no matter here."""

from rcgrpo_jax.data.tables.arrow import Arrow
from rcgrpo_jax.data.tables.base import Container, FileTable, Row, Table, files_below, find_files
from rcgrpo_jax.data.tables.documents import Documents
from rcgrpo_jax.data.tables.parquet import Parquet
from rcgrpo_jax.data.tables.separated import Separated
from rcgrpo_jax.data.tables.webdataset import WebDataset

CONTAINERS: dict[str, Container] = {
    "parquet": Parquet(),
    "arrow": Arrow(),
    "csv": Separated(),
    "json": Documents(),
    "webdataset": WebDataset(),
}

__all__ = ["CONTAINERS", "Container", "FileTable", "Row", "Table", "files_below", "find_files"]
