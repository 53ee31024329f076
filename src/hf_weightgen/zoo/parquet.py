"""Parquet files that are there whole or not at all. Knows files and columns, and nothing of what is in them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def list_array(lengths: Sequence[int], flat: np.ndarray) -> pa.ListArray:
    """A column of lists from all of their values one after the other, which are not copied."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.ListArray.from_arrays(pa.array(offsets).cast(pa.int32()), pa.array(flat))


def read_table(path: str | Path, columns: Iterable[str]) -> pa.Table:
    """
    Reads the named columns of one file and checks the checksums of all pages that hold them.

    Raises:
        ValueError: If the file is damaged or lacks a column; the message names the file and the remedy.
    """
    columns = list(columns)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            lacking = [name for name in columns if name not in file.schema_arrow.names]
            table = None if lacking else file.read(columns).select(columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"The shard {path} is damaged and cannot be read ({error}). Delete it: building the zoo again makes its "
            "rows anew and keeps all other shards."
        ) from error
    if lacking:
        raise ValueError(f"{path} is no shard of a zoo: it has no column {lacking[0]!r}; move it out of the folder.")
    return table


def write_tables(path: str | Path, tables: Iterable[pa.Table], schema: pa.Schema, **encoding) -> Path:
    """
    Writes tables of one schema into a file, which gets its name only when all of it is on disk.

    Args:
        path (`str` or `Path`): The file; one that is there is replaced.
        tables (`Iterable[pyarrow.Table]`): Read one after the other; each becomes a row group.
        encoding: Which columns get which encoding, see `pyarrow.parquet.ParquetWriter`.

    Raises:
        ValueError: If the tables have no row; nothing is written then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a leading dot and another suffix: no reader takes what a killed process leaves behind for a shard
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = 0
    try:
        with open(temporary, "wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True, **encoding) as writer:
                for table in tables:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
                    written += len(table)
            if not written:
                raise ValueError(f"There is no row to write into {path}; a shard needs at least one.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too must survive a power cut
        finally:
            os.close(folder)
    return path
