"""Files as rows: JSON, JSONL, CSV, TSV, parquet, Arrow, and folders that `datasets.save_to_disk` wrote.

Rows come one after the other and are dropped by who has used them, so that memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from tunewright.errors import DataError
from tunewright.trainer.data.columnar import read_arrow, read_parquet

Row = dict[str, Any]

CHUNK = 1 << 20  # characters or bytes read at once
LARGEST_ROW = 1 << 26  # characters: JSON that does not end within this many is broken
MOST_PROBLEMS = 20  # broken lines shown of one file
LOOKED_ON = 100_000  # lines after a broken one in which others are looked for

SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        DataError: not UTF-8 (with the byte), not JSON (with line and column), not a row, or a broken columnar file.
    """
    if path.suffix in (".json", ".jsonl"):
        return _read_json(path)
    if path.suffix in (".csv", ".tsv"):
        return _read_separated(path, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix == ".arrow":
        return read_arrow(path)
    raise DataError(f"{path}: files can be {', '.join(SUFFIXES)}, or folders of datasets.save_to_disk.")


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """Return the Arrow files of a folder that `datasets.save_to_disk` wrote, in order.

    Raises:
        DataError: no such split, a damaged folder, or one that names files elsewhere.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            wanted = split or "train"
            if wanted not in splits:
                raise DataError(f"{folder} has no split '{wanted}'. It has: {', '.join(splits)}.")
            folder = folder / _plain_name(wanted, folder)
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / _plain_name(file["filename"], folder) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not as datasets.save_to_disk leaves a folder ({type(error).__name__}: {error})."
        ) from error


def _plain_name(name: str, folder: Path) -> str:
    """A folder that came from elsewhere must not make us read what lies outside of it."""
    if Path(name).name != name or name == "..":
        raise DataError(f"{folder} names '{name}', which is not one of its own files.")
    return name


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object on each line, whatever the suffix says."""
    start = b""
    with path.open("rb") as file:
        while not start and (part := file.read(CHUNK)):
            start = part.removeprefix(codecs.BOM_UTF8).lstrip()
    return _json_list(path) if start.startswith(b"[") else _json_lines(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line)."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, error, number) from error
            offset += len(line)


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError, line: int) -> DataError:
    hint = " It looks like UTF-16: save it as UTF-8." if offset == 0 and error.object[:1] in (b"\xff", b"\xfe") else ""
    return DataError(f"{path}:{line}: not UTF-8: byte {offset} of the file is 0x{error.object[error.start]:02x}.{hint}")


def _json_lines(path: Path) -> Iterator[Row]:
    problems: list[str] = []
    last = -1
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except RecursionError:
            problems.append(f"{path}:{number}: not a row: nested too deeply.")
        except json.JSONDecodeError as error:
            if number == 1 and line.strip() == "{":
                raise DataError(
                    f"{path} holds one object over several lines; write a list of rows, or a row on each line."
                ) from error
            problems.append(f"{path}:{number}:{error.colno}: not JSON: {error.msg}.")
        else:
            if isinstance(row, dict):
                if not problems:
                    yield row
            else:
                problems.append(f"{path}:{number}: expected an object, found {type(row).__name__}.")
        # Once a line is broken no row is given any more; a few more broken lines are looked for, to be told together.
        last = number + LOOKED_ON if len(problems) == 1 else last
        if len(problems) == MOST_PROBLEMS or number == last:
            problems.append("There may be more.")
            break
    if problems:
        raise DataError("\n".join(problems))


def _json_list(path: Path) -> Iterator[Row]:
    """Decode a list object by object, from a buffer that is refilled when an object does not end in it.

    Not by `ijson`: it refuses NaN, makes a question mark of half of a surrogate pair, tells no line, and takes memory
    by the square of how deep a file is nested.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _list_items(_Text(path, file))
    except UnicodeDecodeError:
        for _ in _lines(path):  # which tells the line and the byte
            pass
        raise


def _list_items(text: _Text) -> Iterator[Row]:
    text.take("[")
    for number in count():
        if text.following() == "]":
            break
        if number:
            text.take(",")
            text.following()
        row = text.decode()
        if not isinstance(row, dict):
            raise DataError(f"{text.place()}: row {number}: expected an object, found {type(row).__name__}.")
        yield row
    text.take("]")
    if text.following():
        raise DataError(f"{text.place()}: not JSON: something follows the list.")


class _Text:
    """The text of a file, held in parts, with line and column of where reading has come to."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self._file = path, file
        self._buffer, self._position = "", 0
        self._line, self._column = 1, 1

    def decode(self) -> Any:
        while True:
            try:
                value, self._position = DECODER.raw_decode(self._buffer, self._position)
                return value
            except RecursionError:
                raise DataError(f"{self.place()}: not a row: nested too deeply.") from None
            except json.JSONDecodeError as error:
                # Either the value goes on beyond the buffer, or it is broken.
                problem = DataError(f"{self.place(error.pos)}: not JSON: {error.msg}.")
            if len(self._buffer) - self._position > LARGEST_ROW or not self._read_on(len(self._buffer)):
                raise problem

    def following(self) -> str:
        """Pass white space and return the character after it, or nothing where the file ends."""
        while True:
            self._position = SPACE.match(self._buffer, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._buffer) or not self._read_on():
                return self._buffer[self._position : self._position + 1]

    def take(self, expected: str) -> None:
        if (character := self.following()) != expected:
            found = f"found '{character}'" if character else "the file ends"
            raise DataError(f"{self.place()}: not JSON: expected '{expected}', {found}.")
        self._position += 1

    def place(self, position: int | None = None) -> str:
        """Return path:line:column of a position in the buffer, by default of where reading has come to."""
        line, column = self._moved(self._position if position is None else position)
        return f"{self.path}:{line}:{column}"

    def _moved(self, position: int) -> tuple[int, int]:
        lines = self._buffer.count("\n", 0, position)
        if not lines:
            return self._line, self._column + position
        return self._line + lines, position - self._buffer.rfind("\n", 0, position)

    def _read_on(self, size: int = 0) -> bool:
        """Drop what was read from the buffer and add the next part; return whether there was one."""
        part = self._file.read(max(CHUNK, size))
        self._line, self._column = self._moved(self._position)
        self._buffer, self._position = self._buffer[self._position :] + part, 0
        return bool(part)


def _read_separated(path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)
    reader = csv.reader((line for _, line in _lines(path)), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, but the header names {len(header)}: "
                    f"{', '.join(header)}."
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: cannot be read as {path.suffix[1:].upper()}: {error}.") from error
