"""What tells that rows are not for supervised fine-tuning on text: media, rejected answers, answers marked as bad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.registry import Entry
from tunewright.trainer.data.readers import Row

# The columns that hold media, for each meaning of a registry, where an entry does not name them.
MEDIA = {"images": ("images", "image"), "videos": ("videos", "video"), "audios": ("audios", "audio")}
LABELS = ("kto_tag", "label")
BAD = (False, "false", "False")  # CSV knows no booleans


def media_columns(row: Row, entry: Entry) -> list[str]:
    """Return the columns of a row that hold media, unless the entry says that they do not matter."""
    return [
        column
        for meaning, columns in MEDIA.items()
        if meaning not in entry.without
        for column in columns
        if _holds_media(row.get(column)) and column not in entry.columns.values()
    ]


def _holds_media(value: Any) -> bool:
    return any(value) if isinstance(value, list) else isinstance(value, (str, dict)) and bool(value)


def bad_label(row: Row, entry: Entry) -> str | None:
    """Return the column that marks the answer of a row as a bad one, unless the entry says that it does not matter."""
    if "kto_tag" in entry.without:
        return None
    return next((name for name in LABELS if _is_bad(row.get(name)) and name not in entry.columns.values()), None)


def _is_bad(value: Any) -> bool:
    return isinstance(value, (bool, str)) and value in BAD


def marked_columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return {meaning: column} of what in some rows is not for supervised fine-tuning on text."""
    found: dict[str, str] = preference_columns(rows)
    for meaning, columns in MEDIA.items():
        for column in columns:
            if any(_holds_media(row.get(column)) for row in rows):
                found[meaning] = column
    for column in LABELS:
        if any(_is_bad(row.get(column)) for row in rows):
            found["kto_tag"] = column
    return found


def preference_columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return {meaning: column} of answers that were rejected and, beside them, of those that were chosen."""
    filled = {column: None for row in rows for column, value in row.items() if isinstance(value, (str, list, dict))}
    found: dict[str, str] = {}
    for meaning in ("rejected", "chosen"):
        found.update((meaning, column) for column in filled if meaning in column.split("_"))
    return found if "rejected" in found else {}
