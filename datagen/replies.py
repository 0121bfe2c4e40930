"""The log of every reply, and which replies are rows. Whatever is written follows from the log."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any

from datagen.cells import FIELDS
from launch.errors import ConfigError, StorageError

Record = dict[str, Any]
Row = dict[str, str]

REFUSAL = re.compile(
    r"(i'?m sorry|i am sorry|sorry|i apologi[sz]e)?[,.]?\s*(but )?(i|we) "
    r"(can'?t|cannot|can not|am unable to|'?m unable to|won'?t) (assist|help|comply|fulfil|provide|create|generate)\b",
    re.IGNORECASE,
)


class ReplyLog:
    """An append-only file of JSON lines; the first one holds the settings that all replies belong to."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self._settings = settings
        self._file: IO[bytes] | None = None
        data = path.read_bytes() if path.exists() else b""
        lines = data.split(b"\n")
        # A process that was killed while writing leaves a torn last line, which the next append replaces.
        self._keep = len(data) - len(lines.pop())
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.records[record["id"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(f"{path}:{number} is damaged: it is not a reply that was logged here.") from error
        if self.records:
            self._check(self.records.pop("settings", {}))

    def _check(self, there: Record) -> None:
        now = {"id": "settings", **self._settings}
        table = [f"  {k}: there {there.get(k)!r}, now {now.get(k)!r}" for k in now if there.get(k) != now.get(k)]
        if table:
            raise ConfigError(
                f"{self.path} holds replies for other settings:\n" + "\n".join(table) + "\nChoose another `name`, "
                "write the settings as they were, or delete that file to start anew."
            )

    def append(self, record: Record) -> None:
        """Add a reply; it has left this process when the call returns."""
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self._keep)
            if not self._keep:
                self._write({"id": "settings", **self._settings})
        self._write(record)
        self.records[record["id"]] = record

    def _write(self, record: Record) -> None:
        assert self._file is not None
        line = json.dumps(record).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise StorageError(f"{self.path}: the disk is full. The same command continues when there is room.")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def usage(self) -> Counter[str]:
        """Return the tokens that all replies took."""
        total: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0)
        for record in self.records.values():
            total.update(record.get("usage", {}))
        return total


class Tally:
    """Rows and rejected replies, counted by reason."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.rejects: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()

    def add(self, record: Record) -> None:
        verdict = judge(record)
        if not isinstance(verdict, str):
            prompt = (verdict["instruction"], verdict["input"])
            if prompt not in self._seen:
                self._seen.add(prompt)
                self.rows.append(verdict)
                return
            verdict = "duplicate"
        self.rejects[verdict] += 1

    def reasons(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.rejects.most_common()) or "none"


def judge(record: Record) -> Row | str:
    """Return the row of a reply, or the reason why it is none."""
    text = (record.get("content") or "").strip()
    if "error" in record:
        return "no reply"
    if record["finish_reason"] == "length":
        return "cut at max_tokens"
    if record["refusal"] or record["finish_reason"] == "content_filter" or REFUSAL.match(text):
        return "refused"
    if not text:
        return "empty"
    found = _first_object(text)
    if found is None:
        return "not JSON"
    values = [found.get(name) for name in FIELDS]
    values[1] = values[1] or ""  # `input` may be left out
    if not all(isinstance(value, str) for value in values):
        return "wrong fields"
    row = {name: str(value).strip() for name, value in zip(FIELDS, values, strict=True)}
    if not row["instruction"] or not row["output"]:
        return "empty"
    if any("\ud800" <= character <= "\udfff" for value in row.values() for character in value):
        return "broken characters"
    return "refused" if REFUSAL.match(row["output"]) else row


def _first_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a reply that may think aloud before it or put it into a code fence."""
    text = re.sub(r"^<think>.*?</think>", "", text, flags=re.DOTALL)
    try:
        # strict=False: grammar-bound servers let raw line breaks through.
        found, _ = json.JSONDecoder(strict=False).raw_decode(text, max(text.find("{"), 0))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
