"""The log of every reply: whatever is written follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tunewright.datagen.budget import taken
from tunewright.errors import ConfigError, StorageError
from tunewright.trees import map_texts

Record = dict[str, Any]


class ReplyLog:
    """An append-only file of JSON lines; the first one holds the settings that all replies belong to.

    Each request is noted before it is sent, so that one whose reply never arrived still counts against a budget.
    """

    def __init__(self, path: Path, scrub: Callable[[str], str] = str) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.scrub = scrub
        self._forgotten: list[Record] = []
        self._file: IO[bytes] | None = None
        data = path.read_bytes() if path.exists() else b""
        lines = data.split(b"\n")
        # A process that was killed while writing leaves a torn last line, which the next append replaces.
        self._keep = len(data) - len(lines.pop())
        sent: dict[str, Record] = {}  # requests without a reply
        self.orphans: list[Record] = []  # such of earlier processes
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                key = record["id"]
                if record.get("sent"):
                    sent[key] = record
                    continue
                if key == "process":
                    self.orphans += sent.values()
                    sent.clear()
                    continue
                sent.pop(key, None)
                if "error" in self.records.get(key, {}):  # asked again since; what it cost still counts
                    self._forgotten.append(self.records[key])
                self.records[key] = record
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise StorageError(f"{path}:{number} is damaged: it is not a reply that was logged here.") from error
        self.orphans += sent.values()
        self._first = [{"id": "process"}] if sent else []  # written before anything else
        self._there = self.records.pop("settings", {})

    def begin(self, settings: Record) -> None:
        """Say what the replies belong to.

        Raises:
            ConfigError: those that are there belong to something else.
        """
        there, now = self._there, {"id": "settings", **settings}
        if self._keep == 0:
            self._first = [now]
            return
        table = [f"  {k}: there {there.get(k)!r}, now {now.get(k)!r}" for k in now if there.get(k) != now.get(k)]
        if not table:
            return
        if all(key.startswith("plan-") for key in self.records):  # a plan was made, and nothing else yet
            self._first.append(now)
            return
        raise ConfigError(
            f"{self.path} holds replies for other settings:\n" + "\n".join(table) + "\nChoose another `name`, "
            "write the settings as they were, or delete that file to start anew."
        )

    def append(self, record: Record) -> None:
        """Add a reply; it has left this process when the call returns."""
        record = map_texts(record, self.scrub)
        self._write(record)
        self.records[record["id"]] = record

    def note_sent(self, key: str, lost: dict[str, int], tries: int, **more: Any) -> None:
        """Note that a request is about to be sent, and what all of its tries without an answer may have cost."""
        self._write({"id": key, "sent": True, "lost": lost, "tries": tries, **more})

    def _write(self, record: Record) -> None:
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self._keep)
            for first in self._first:
                self._write(first)
        line = json.dumps(record).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise StorageError(f"{self.path}: the disk is full. The same command continues when there is room.")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def forget_errors(self, *, last_only: bool = False) -> None:
        """Let requests that no reply came for be asked again; what they may have cost is still counted.

        With `last_only` those are kept that were followed by a reply, which may build on them.
        """
        for key in reversed(list(self.records)):
            if "error" in self.records[key]:
                self._forgotten.append(self.records.pop(key))
            elif last_only:
                return

    def spent(self) -> tuple[int, int]:
        """Return (prompt tokens, reply tokens) of all replies, at worst where nobody knows."""
        counts = [taken(record) for record in self.replies()]
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    def requests(self) -> int:
        """Return how many requests were sent for the replies, repeated ones included."""
        return sum(int(record.get("tries", 0)) for record in self.replies())

    def replies(self) -> list[Record]:
        """Return everything that a reply or an error was logged for."""
        return [*self.records.values(), *self._forgotten]
