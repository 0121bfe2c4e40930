"""The log of every reply, and which replies are rows. Whatever is written follows from the log."""

from __future__ import annotations

import json
import re
from typing import Any

from tunewright.datagen.prompts import FIELDS

Record = dict[str, Any]
Row = dict[str, Any]

REFUSAL = re.compile(
    r"(i'?m sorry|i am sorry|sorry|i apologi[sz]e)?[,.]?\s*(but )?(i|we) "
    r"(can'?t|cannot|can not|am unable to|'?m unable to|won'?t) (assist|help|comply|fulfil|provide|create|generate)\b",
    re.IGNORECASE,
)


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
