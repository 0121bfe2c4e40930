"""The log of every reply, and which replies are rows. Whatever is written follows from the log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tunewright.datagen.budget import taken
from tunewright.datagen.grid import FIELDS
from tunewright.errors import ConfigError, StorageError

Record = dict[str, Any]
Row = dict[str, Any]

REFUSAL = re.compile(
    r"(i'?m sorry|i am sorry|sorry|i apologi[sz]e)?[,.]?\s*(but )?(i|we) "
    r"(can'?t|cannot|can not|am unable to|'?m unable to|won'?t) (assist|help|comply|fulfil|provide|create|generate)\b",
    re.IGNORECASE,
)


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
        record = scrubbed(record, self.scrub)
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


def scrubbed(value: Any, scrub: Callable[[str], str]) -> Any:
    """Return a JSON value with every text in it scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: scrubbed(item, scrub) for key, item in value.items()}
    return [scrubbed(item, scrub) for item in value] if isinstance(value, list) else value


def object_of(record: Record) -> dict[str, Any] | str:
    """Return the JSON object of a reply, or the reason why it has none."""
    text = (record.get("content") or "").strip()
    if "error" in record:
        return "no reply"
    if record["finish_reason"] == "length":
        return "cut at max_tokens"
    if record["refusal"] or record["finish_reason"] == "content_filter" or REFUSAL.match(text):
        return "refused"
    if not text:
        return "empty"
    return _first_object(text) or "not JSON"


def row_of(record: Record, turns: int) -> Row | str:
    """Return the row of a reply, or the reason why it is none."""
    found = object_of(record)
    if isinstance(found, str):
        return found
    row = _example(found) if turns == 1 else _conversation(found)
    if isinstance(row, str):
        return row
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "broken characters"
    return "refused" if REFUSAL.match(row["output"]) else row


def score_of(record: Record) -> int | None:
    """Return the score of a judge's reply, or None when it gave none."""
    found = object_of(record)
    score = found.get("score") if isinstance(found, dict) else None
    if isinstance(score, str) and re.fullmatch(r"\s*\d(\.\d+)?\s*", score):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 1 <= score <= 5:
        return None
    return int(score)  # a 4.5 is not yet a 5


def _example(found: dict[str, Any]) -> Row | str:
    values = [found.get(name) for name in FIELDS]
    values[1] = values[1] or ""  # `input` may be left out
    if not all(isinstance(value, str) for value in values):
        return "wrong fields"
    row: Row = {name: str(value).strip() for name, value in zip(FIELDS, values, strict=True)}
    return row if row["instruction"] and row["output"] else "empty"


def _conversation(found: dict[str, Any]) -> Row | str:
    turns = found.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return "wrong fields"
    said = [[turn.get(name) for name in ("user", "assistant")] for turn in turns]
    if not all(isinstance(text, str) for exchange in said for text in exchange):
        return "wrong fields"
    exchanges = [[text.strip() for text in exchange] for exchange in said]
    if not all(text for exchange in exchanges for text in exchange):
        return "empty"
    if len(exchanges) < 2:
        return "one exchange only"
    *history, (instruction, output) = exchanges
    return {"instruction": instruction, "input": "", "output": output, "history": history}


def _first_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a reply that may think aloud before it or put it into a code fence."""
    text = re.sub(r"^<think>.*?</think>", "", text, flags=re.DOTALL)
    try:
        # strict=False: grammar-bound servers let raw line breaks through.
        found, _ = json.JSONDecoder(strict=False).raw_decode(text, max(text.find("{"), 0))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
