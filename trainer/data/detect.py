"""What the columns of unknown rows mean: proposed from their names and first values."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tunewright.registry import SHAREGPT_TAGS
from tunewright.trainer.data.messages import TAG_ROLES, find_role
from tunewright.trainer.data.unsupported import marked_columns

# Columns that datasets on the hubs use, each with the meaning it has in a registry; the first that is there counts.
PROMPTS = ("instruction", "prompt", "question", "query", "input", "problem", "content")
RESPONSES = ("output", "response", "answer", "completion", "target", "solution", "summary", "chosen_response")
SYSTEMS = ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "chat")


def detect(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a registry entry without its source, or None when the columns do not tell.

    Of rows that are not for supervised fine-tuning on text the entry says what they are, and nothing else.
    """
    if marks := marked_columns(rows):
        return {"columns": marks}
    found = {key for row in rows for key, value in row.items() if value is not None}
    for column in CONVERSATIONS:
        turns = next((turns for row in rows if (turns := _turns(row.get(column)))), None)
        if turns:
            return _conversation(column, turns, rows, found)
    if {"prompt", "completion"} <= found:
        return {"formatting": "prompt_completion"}
    prompt = next((name for name in PROMPTS if name in found), None)
    response = next((name for name in RESPONSES if name in found and name != prompt), None)
    if prompt and response:
        return _alpaca(prompt, response, found)
    return {"formatting": "text"} if "text" in found else None


def _turns(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and value and isinstance(value[0], dict) else None


def _conversation(
    column: str, turns: list[dict[str, Any]], rows: list[dict[str, Any]], found: set[str]
) -> dict[str, Any] | None:
    keys = {key for turn in turns for key in turn}
    role = next((key for key in ("role", "from") if key in keys), None)
    content = next((key for key in ("content", "value", "text") if key in keys), None)
    if role is None or content is None:
        return None
    names: dict[str | None, str] = {}  # role -> the name it goes by most often
    for name, _ in Counter(str(turn.get(role)) for row in rows for turn in _turns(row.get(column)) or []).most_common():
        names.setdefault(find_role(name, {}), name)
    if "user" not in names or "assistant" not in names:
        return None
    if (role, content, names["user"], names["assistant"]) == ("role", "content", "user", "assistant"):
        entry: dict[str, Any] = {"formatting": "openai"}
        defaults = {"messages": "messages"}
    else:
        entry = {"formatting": "sharegpt"}
        defaults = {"messages": "conversations"}
        tags: dict[str, str] = {"role_tag": role, "content_tag": content}
        tags |= {tag: names[meaning] for tag, meaning in TAG_ROLES.items() if meaning in names}
        if any(SHAREGPT_TAGS[tag] != name for tag, name in tags.items()):
            entry["tags"] = {**tags, "system_tag": names.get("system", "system")}
    columns = {"messages": column} if defaults["messages"] != column else {}
    columns |= {key: key for key in ("system", "tools") if key in found} if columns else {}
    # LLaMA-Factory sets every column to null that a `columns` block leaves out, so a block is written whole.
    return {**entry, **({"columns": columns} if columns else {})}


def _alpaca(prompt: str, response: str, found: set[str]) -> dict[str, Any]:
    columns = {"prompt": prompt, "response": response}
    if prompt == "instruction" and "input" in found:
        columns["query"] = "input"
    system = next((name for name in SYSTEMS if name in found), None)
    if system:
        columns["system"] = system
    if "history" in found:
        columns["history"] = "history"
    return {
        "columns": {key: columns[key] for key in ("prompt", "query", "response", "system", "history") if key in columns}
    }
