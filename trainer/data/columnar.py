"""Columnar data as rows: parquet, Arrow, and what `datasets` holds, with the values that were written into them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tunewright.errors import DataError, first_line

BATCH = 1000  # rows converted at once
Reader = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: the file is broken.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                yield from rows_of(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file or stream.

    Raises:
        DataError: the file is broken.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _arrow_batches(source):
                for start in range(0, batch.num_rows, BATCH):
                    yield from rows_of(batch.slice(start, BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Arrow: {first_line(error)}") from error


def _arrow_batches(source: Any) -> Iterable[Any]:
    """Arrow has two layouts: the file, which begins with its name, and the stream, which `datasets` writes."""
    import pyarrow

    if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        return (file.get_batch(index) for index in range(file.num_record_batches))
    source.seek(0)
    return pyarrow.ipc.open_stream(source)


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch or a table, without what its columns' common type has added to them.

    A column of objects has one type, with every key that any row's object has, and null where an object had none. So a
    null in an object is left out; one in a list, in a map or in a column of JSON was written there, and stays.
    """
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        reader, values = _reader(column.type), column.to_pylist()
        columns.append((name, [reader(value) for value in values] if reader else values))
    for index in range(batch.num_rows):
        yield {name: values[index] for name, values in columns}


def _reader(kind: Any) -> Reader | None:
    """Return what makes of pyarrow's value of a type the one that was written, or None where they are the same."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _parsed if kind.extension_name == "arrow.json" else _reader(kind.storage_type)
    if types.is_struct(kind):
        fields = {field.name: _reader(field.type) for field in kind}
        return _where_not_null(
            lambda value: {key: _read(fields[key], item) for key, item in value.items() if item is not None}
        )
    if types.is_map(kind):  # pyarrow gives pairs
        inner = _reader(kind.item_type)
        return _where_not_null(lambda value: {key: _read(inner, item) for key, item in value})
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _reader(kind.value_type)
        return _where_not_null(lambda value: [_read(inner, item) for item in value]) if inner else None
    return None


def _parsed(value: str | None) -> Any:
    return None if value is None else json.loads(value)


def _where_not_null(reader: Reader) -> Reader:
    return lambda value: None if value is None else reader(value)


def _read(reader: Reader | None, value: Any) -> Any:
    return reader(value) if reader else value
