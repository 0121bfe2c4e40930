"""Rows of a file, and the conversation each of them means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from launch.errors import DataError, did_you_mean
from trainer.data.registry import Entry

Row = dict[str, Any]
Message = dict[str, str]


def read_rows(entry: Entry) -> list[Row]:
    """Read every row of a JSON or JSONL file.

    Raises:
        DataError: not UTF-8, not JSON (with line and column), not a list of objects, no row, or a named column missing.
    """
    try:
        text = entry.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{entry.path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}."
        ) from error
    if entry.path.suffix == ".jsonl":
        rows = [_parse(line, entry, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        rows = _parse(text, entry, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{entry.path} must hold a list of rows, found {type(rows).__name__}.")
    if not rows:
        raise DataError(f"{entry.path} has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{entry.path}, row {number}: expected an object, found {type(row).__name__}.")
    _check_columns(entry, rows)
    return rows


def _parse(text: str, entry: Entry, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{entry.path}:{line + error.lineno - 1}:{error.colno}: not JSON: {error.msg}.") from error


def _check_columns(entry: Entry, rows: Iterable[Row]) -> None:
    found = {key for row in rows for key in row}
    for meaning in ("prompt", "response", *sorted(entry.named)):
        column = entry.columns[meaning]
        if column not in found:
            raise DataError(
                f"{entry.path} has no column '{column}', which entry '{entry.name}' of {entry.registry} uses as "
                f"`{meaning}`.{did_you_mean(column, found)} It has: {', '.join(sorted(found))}."
            )


def to_messages(row: Row, columns: dict[str, str]) -> list[Message] | str:
    """Return the conversation of an alpaca row, or the reason why it cannot be used."""
    prompt, query, response, system = (row.get(columns[key]) for key in ("prompt", "query", "response", "system"))
    for meaning, value in (("prompt", prompt), ("query", query), ("response", response), ("system", system)):
        if value is not None and not isinstance(value, str):
            return f"`{columns[meaning]}` is {type(value).__name__}, not text"
    if not (response or "").strip():
        return f"`{columns['response']}` is empty"
    user = "\n".join(part for part in (prompt, query) if part)
    if not user.strip():
        return f"`{columns['prompt']}` is empty"
    messages = [{"role": "system", "content": system}] if system else []
    for turn in row.get(columns.get("history", "history")) or []:
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            return "`history` must be a list of [user, assistant] pairs of text"
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": user}, {"role": "assistant", "content": response}]
