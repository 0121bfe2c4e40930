"""One turn of a row as a message: who speaks, what is said, thought and called, and whether it is learnt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

# A message of a chat template: role and content, and where they are used reasoning_content, tool_calls, ...
Message = dict[str, Any]
Tags = dict[str, str | None]

CALL = "call"  # the role of a turn that is nothing but a function call; its message is the assistant's
# What the field calls its speakers, in any case, beside the names that an entry's `tags` give.
ROLES = {
    name: role
    for role, names in {
        "system": ("system", "developer"),
        "user": ("user", "human", "prompter", "instruction"),
        "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "response"),
        "tool": ("tool", "observation", "function", "ipython", "tool_response", "function_response"),
        CALL: ("function_call", "tool_call"),
    }.items()
    for name in names
}
TAG_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool",
    "function_tag": CALL,
}  # fmt: skip
# Flags of whole turns: ms-swift's loss and loss_scale, OpenAI's weight, axolotl's train and training.
FLAGS = ("loss", "loss_scale", "weight", "train", "training")
PARTIAL_FLAGS = ("train_detail", "training_detail")
# What a model thinks before it answers; inside the product it goes by the first of these names.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THOUGHT_MARKS = ("<think>", "</think>")  # around it, where it is a part of the answer
SAID_BY_ASSISTANT = (*REASONING_KEYS, "tool_calls", "function_call")
READ = ("name", "tool_call_id", *FLAGS, *PARTIAL_FLAGS)


class Unusable(Exception):
    """Why a row cannot be used; rows are counted by this text, so it does not depend on the row."""


def read_turns(turns: Iterable[dict[str, Any]], tags: Tags, *, strict: bool) -> tuple[list[Message], list[bool]]:
    """Return the messages of a row's turns, and for each of them whether the row lets it be learnt.

    With `strict` roles have the names of the tags alone.

    Raises:
        Unusable: a turn cannot be read.
    """
    messages: list[Message] = []
    flags: list[bool] = []
    calls = 0
    for turn in turns:
        role = _role(turn, tags, strict=strict)
        message = _message(turn, role, tags["content_tag"] or "content", calls)
        calls += len(message.get("tool_calls", ()))
        messages.append(message)
        flags.append(_is_learnt(turn, message["role"]))
    _answer_calls(messages)
    return messages, flags


def unread_keys(turns: Any, tags: Tags, *, strict: bool) -> set[str]:
    """Return keys of turns that hold something and that nobody reads."""
    found: set[str] = set()
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            known = {tags["role_tag"], tags["content_tag"], *READ}
            if find_role(turn.get(tags["role_tag"] or "role"), tags, strict=strict) in ("assistant", CALL):
                known.update(SAID_BY_ASSISTANT)
            found.update(key for key, value in turn.items() if key not in known and value not in (None, "", [], {}))
    return found


def find_role(name: Any, tags: Tags, *, strict: bool = False) -> str | None:
    """Return the role that a name stands for, or None for a name that nobody knows."""
    if not isinstance(name, str):
        return None
    for tag, role in TAG_ROLES.items():
        if tags.get(tag) == name:
            return role
    return None if strict else ROLES.get(name.strip().lower())


def _role(turn: dict[str, Any], tags: Tags, *, strict: bool) -> str:
    role_tag = tags["role_tag"] or "role"
    if role_tag not in turn:
        raise Unusable(f"a turn has no `{role_tag}`")
    role = find_role(turn[role_tag], tags, strict=strict)
    if role is None:
        shown = json.dumps(turn[role_tag], ensure_ascii=False, default=str)
        raise Unusable(f"unknown role {shown}; `tags` can name it")
    return role


def _message(turn: dict[str, Any], role: str, content_tag: str, calls: int) -> Message:
    """Return the message of a turn; `calls` is how many calls came before it."""
    if role == CALL:
        content = _content(turn.get(content_tag), content_tag)
        message: Message = {"role": "assistant", "content": "", "tool_calls": _calls_of_text(content, calls)}
    else:
        called = _called(turn, calls) if role == "assistant" else []
        message = {"role": role, "content": _content(turn.get(content_tag), content_tag, allow_null=bool(called))}
        if called:
            message["tool_calls"] = called
    if message["role"] == "assistant" and (reasoning := _reasoning(turn)):
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = turn[key]
    return message


def _content(value: Any, key: str, *, allow_null: bool = False) -> str:
    if isinstance(value, str):
        return value
    if value is None and allow_null:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value}
        if kinds <= {"text"}:
            return "".join(str(part.get("text", "")) for part in value)
        raise Unusable(f"`{key}` holds parts that are not text")
    raise Unusable(f"`{key}` is {'null' if value is None else type(value).__name__}, not text")


def _reasoning(turn: dict[str, Any]) -> str:
    said = {key: turn[key] for key in REASONING_KEYS if turn.get(key)}
    for key, text in said.items():
        if not isinstance(text, str):
            raise Unusable(f"`{key}` of a turn is {type(text).__name__}, not text")
    if len(set(said.values())) > 1:
        raise Unusable(f"{_named(said)} of a turn say different things")
    text = next(iter(said.values()), "")
    return text if text.strip() else ""


def _is_learnt(turn: dict[str, Any], role: str) -> bool:
    """Tell whether the flags of a turn let it be learnt; a flag that asks for what is not done is refused."""
    for key in PARTIAL_FLAGS:
        if turn.get(key):
            raise Unusable(f"`{key}` marks parts of a turn, and a turn is learnt whole or not at all")
    said = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    for key, value in said.items():
        if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
            raise Unusable(f"`{key}` of a turn must be true, false, 0 or 1")
    if len({bool(value) for value in said.values()}) > 1:
        raise Unusable(f"{_named(said)} of a turn contradict each other")
    if any(said.values()) and role != "assistant":
        raise Unusable(f"{_named(said)} of a turn asks to learn what the {role} says; only answers are learnt")
    return all(said.values())


def _named(keys: Iterable[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


# ---- calls ----------------------------------------------------------------------------------------------------------


def _called(turn: dict[str, Any], before: int) -> list[dict[str, Any]]:
    """Return the calls beside an assistant's text: OpenAI's tool_calls, or its older function_call."""
    calls = turn.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = _json(calls, "`tool_calls` is text that is not JSON")
    if calls and not isinstance(calls, list):
        raise Unusable("`tool_calls` must be a list")
    made = [_call(call) for call in calls or ()]
    older = turn.get("function_call")
    if isinstance(older, str) and older.strip():
        older = _json(older, "`function_call` is text that is not JSON")
    if older and made:
        raise Unusable("`tool_calls` and `function_call` are both in a turn")
    return [{**_call(older), "id": _made_id(before)}] if older else made


def _calls_of_text(content: str, before: int) -> list[dict[str, Any]]:
    calls = _json(content, "a function call is not JSON")
    calls = calls if isinstance(calls, list) else [calls]
    return [{**_call(call), "id": _made_id(before + number)} for number, call in enumerate(calls)]


def _call(call: Any) -> dict[str, Any]:
    """Return a call as OpenAI's, its arguments as an object: that is what templates write as JSON."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a function call has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", "the arguments of a function call are not JSON")
    ids = {"id": call["id"]} if call.get("id") else {}
    arguments = {} if arguments is None else arguments
    return {"type": "function", **ids, "function": {"name": function["name"], "arguments": arguments}}


def _made_id(number: int) -> str:
    return f"call{number:05d}"  # some templates (Mistral's) want an id, of nine characters


def _json(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unusable(problem) from error


def _answer_calls(messages: list[Message]) -> None:
    """Give tool messages the id of the call they answer, in order."""
    waiting: list[str] = []
    for message in messages:
        waiting += [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        if message["role"] == "tool" and waiting:
            answered = waiting.pop(0)
            message.setdefault("tool_call_id", answered)
