"""From an entry to its rows, wherever they are, and to what identifies their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tunewright.config.schema import DataConfig
from tunewright.errors import DataError, StorageError, did_you_mean
from tunewright.registry import REQUIRED_COLUMNS, Entry, Place, check_inside, check_trainable, load_entry, parse_entry
from tunewright.trainer.data.detect import detect
from tunewright.trainer.data.readers import CHUNK, SUFFIXES, Row, is_saved_dataset, read_file, saved_files
from tunewright.trainer.data.unsupported import preference_columns

SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|valid|validation|dev|test|eval)(?![a-z])", re.IGNORECASE)
ANSWERS = ("response", "messages", "completion", "text")  # an entry that names one of them has chosen what is learnt
COLUMNAR = (".parquet", ".arrow")
PEEK = 1000  # rows looked at before anything is made of them


@dataclass(frozen=True)
class Rows:
    """The rows of an entry: they can be read again and again, always in the same order."""

    entry: Entry
    read: Callable[[], Iterator[Row]]
    identity: tuple[str, ...]  # changes when the content does
    size: int | None = None  # bytes, of files whose rows are text
    expected: int | None = None  # about so many rows, where that can be told before all are read

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def open_datasets(
    names: list[str], data: DataConfig, *, offline: bool, split: str | None = None, other_split: str | None = None
) -> list[Rows]:
    """Find several datasets and look at their first rows; what is wrong with any of them is told together.

    `split` goes before the split that an entry names, `other_split` is for entries that name none.

    Raises:
        DataError: see `load_entry`, `read_file`; or a column that the entry needs is not there.
        StorageError: something must be fetched and cannot be.
    """
    opened, problems = [], []
    for name in names:
        try:
            entry = load_entry(name, data)
            entry = replace(entry, split=split or entry.split or other_split)
            opened.append(_checked(_open(entry, data, offline=offline)))
        except (DataError, StorageError) as error:
            problems.append(error)
        except OSError as error:
            problems.append(StorageError(f"'{name}' cannot be read: {error.strerror}: {error.filename}"))
    if problems:
        raise problems[0] if len(problems) == 1 else type(problems[0])("\n".join(str(problem) for problem in problems))
    return opened


def _open(entry: Entry, data: DataConfig, *, offline: bool) -> Rows:
    cache = Path(data.cache_dir).expanduser()
    if entry.place is Place.file:
        return _open_path(entry, Path(entry.location))
    if entry.place is Place.cloud:
        from tunewright.trainer.data.cloud_files import fetch_cloud

        return _open_path(entry, fetch_cloud(entry, cache / "cloud", offline=offline))

    from tunewright.trainer.data.hub_datasets import open_hub

    return Rows(entry, *open_hub(entry, cache / "hubs", offline=offline, streaming=data.streaming))


def _open_path(entry: Entry, path: Path) -> Rows:
    if not path.exists():
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise DataError(f"{entry.where}: there is no file or folder {path}.{near}")
    saved = path.is_dir() and is_saved_dataset(path)
    paths = saved_files(path, entry.split) if saved else _files_of(path, entry)
    for file in paths:
        check_inside(entry, file)

    def read() -> Iterator[Row]:
        for file in paths:
            yield from read_file(file)

    size = sum(file.stat().st_size for file in paths) if paths and paths[0].suffix not in COLUMNAR else None
    return Rows(entry, read, tuple(_file_identity(file) for file in paths), size)


def _files_of(path: Path, entry: Entry) -> list[Path]:
    """Return the data files of a path in order of name; with a split, those that carry its name where any does."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{entry.where}: {path} is {path.suffix or 'without suffix'}; files can be {', '.join(SUFFIXES)}."
            )
        if entry.split not in (None, "train"):
            raise DataError(f"{entry.where}: {path} is one file, which has no split '{entry.split}'.")
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in SUFFIXES and not file.name.startswith(".") and not file.is_dir()
    ]
    found = [file for file in found if file.name != "dataset_info.json"]
    if not found:
        raise DataError(f"{entry.where}: the folder {path} holds no {', '.join(SUFFIXES)} file.")
    if entry.split:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(entry.split)}(?![a-z])", re.IGNORECASE)
        chosen = [file for file in found if word.search(str(file.relative_to(path)))]
        if entry.split == "train" and not any(_splits(path, file) for file in found):
            chosen = found  # a folder without splits is for training
        if not chosen:
            names = ", ".join(str(file.relative_to(path)) for file in found[:10])
            raise DataError(
                f"{entry.where}: no file in {path} carries the split '{entry.split}' in its name. It holds: {names}."
            )
        found = chosen
    elif not entry.formatting:  # a path, not an entry: what is set aside by its name is not for training
        found = [file for file in found if "train" in _splits(path, file)] or found
    kinds = sorted({file.suffix for file in found})
    if len(kinds) > 1 and kinds != [".json", ".jsonl"]:
        raise DataError(
            f"{entry.where}: the files of {path} are of several kinds: {', '.join(kinds)}. Name one file, or sort them."
        )
    return found


def _splits(folder: Path, file: Path) -> list[str]:
    return [word.lower() for word in SPLIT_WORD.findall(str(file.relative_to(folder)))]


def _file_identity(path: Path) -> str:
    """Return the digest of what a file holds; what it is called decides nothing."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _checked(rows: Rows) -> Rows:
    """Look at the first rows: are there any, what is their formatting, are the needed columns there?"""
    first = list(islice(rows, PEEK))
    entry = rows.entry
    if not first:
        raise DataError(f"{entry.where} has no rows.")
    if not entry.formatting:
        entry = _with_detected_formatting(entry, first)
    elif entry.named.isdisjoint(ANSWERS):
        check_trainable(replace(entry, columns={**entry.columns, **preference_columns(first)}))
    found = columns_of(first)
    for meaning in REQUIRED_COLUMNS.get(entry.formatting, ()):
        check_column(entry, meaning, found)
    return replace(rows, entry=entry, expected=_expected(first, rows.size))


def _expected(first: list[Row], size: int | None) -> int | None:
    """Estimate the number of rows from the first ones and the size of the files."""
    if len(first) < PEEK:
        return len(first)
    if size is None:
        return None
    text = sum(len(json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace")) for row in first)
    return max(PEEK, round(size / (text / len(first))))


def columns_of(rows: list[Row]) -> set[str]:
    return {key for row in rows for key in row}


def check_column(entry: Entry, meaning: str, found: set[str]) -> None:
    """Raise DataError unless the column with this meaning is among those found."""
    column = entry.columns[meaning]
    if column in found:
        return
    advice = did_you_mean(column, found)
    if "text" in found and meaning == "response":
        advice = ' For plain text write "formatting": "text".'
    raise DataError(
        f"{entry.where}: there is no column '{column}', which it uses as `{meaning}`.{advice} "
        f"The data has: {', '.join(sorted(found)) or 'no columns'}."
    )


def _with_detected_formatting(entry: Entry, rows: list[Row]) -> Entry:
    proposal: dict[str, Any] | None = detect(rows)
    if proposal is None:
        raise DataError(
            f"{entry.where}: the meaning of its columns is not plain: {', '.join(sorted(columns_of(rows)))}. Rename "
            f"them, or write a registry entry that says which column is the prompt and which the response."
        )
    parsed = parse_entry(entry.name, {**proposal, "file_name": entry.location}, Path("."))
    entry = replace(entry, formatting=parsed.formatting, columns=parsed.columns, tags=parsed.tags)
    check_trainable(entry)
    return entry
