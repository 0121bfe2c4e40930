"""Rows as conversations: what alpaca, sharegpt, OpenAI, prompt/completion and plain-text rows mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunewright.config.schema import Compat
from tunewright.errors import DataError
from tunewright.plugins import PLUGINS
from tunewright.registry import OPENAI_TAGS, Entry
from tunewright.trainer.data.messages import Message, Unusable, read_turns, unread_keys
from tunewright.trainer.data.readers import Row
from tunewright.trainer.data.unsupported import bad_label, media_columns

OLDER_TOOLS = "functions"  # what OpenAI's older files call the column of tools


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and which of them are learnt."""

    messages: list[Message]
    learnt: list[bool]  # one for each message; true only for the assistant's
    tools: list[Any] | None = None

    @property
    def question(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Plain:
    """Text that no template is put around: the completion is learnt, and the end-of-text token after it."""

    prompt: str
    completion: str

    @property
    def answer(self) -> str:
        return self.completion


def to_conversation(row: Row, entry: Entry) -> Conversation | Plain:
    """Return what a row says.

    Raises:
        Unusable: it cannot be learnt from.
    """
    media, label = media_columns(row, entry), bad_label(row, entry)
    if media:
        raise Unusable(f"`{media[0]}` is not empty, and tunewright trains on text")
    if label:
        raise Unusable(f"`{label}` marks its answer as a bad one")
    return READERS.get(entry.formatting, _added)(row, entry)


def _added(row: Row, entry: Entry) -> Conversation | Plain:
    """Let a plug-in's format read a row: it may return the messages alone."""
    try:
        read = PLUGINS.formats[entry.formatting].read(row, entry)
    except Unusable:
        raise
    except Exception as error:  # somebody else's code, which this row was too much for
        raise Unusable(f"the format '{entry.formatting}' failed: {type(error).__name__}: {error}") from error
    if isinstance(read, (Conversation, Plain)):
        return read
    return _checked(*read_turns(_objects(read, "messages"), dict(OPENAI_TAGS), strict=False), None)


def _alpaca(row: Row, entry: Entry) -> Conversation:
    prompt, query, response, system = (_text(row, entry, key) for key in ("prompt", "query", "response", "system"))
    if not response.strip():
        raise Unusable(f"`{entry.columns['response']}` is empty")
    user = "\n".join(part for part in (prompt, query) if part)
    if not user.strip():
        raise Unusable(f"`{entry.columns['prompt']}` is empty")
    messages = [{"role": "system", "content": system}] if system else []
    for turn in _parsed(row, entry, "history") or []:
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise Unusable(f"`{entry.columns['history']}` must be a list of [user, assistant] pairs of text")
        if not turn[1].strip():
            raise Unusable(f"an answer in `{entry.columns['history']}` is empty")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return _conversation([*messages, {"role": "user", "content": user}, {"role": "assistant", "content": response}])


def unread(row: Row, entry: Entry) -> set[str]:
    """Return keys of a row's turns that hold something and that nobody reads."""
    strict = entry.compat is Compat.llamafactory
    keys: set[str] = set()
    for meaning in ("messages", "prompt", "completion"):
        keys |= unread_keys(_parsed(row, entry, meaning, only_lists=True), entry.tags, strict=strict)
    return keys


def _turn_by_turn(row: Row, entry: Entry) -> Conversation:
    if entry.tags["role_tag"] is None or entry.tags["content_tag"] is None:
        raise DataError(
            f"{entry.where}: `tags` names no role_tag or content_tag, and data.compat=llamafactory fills in none."
        )
    messages, flags = _messages(_turns(row, entry), entry)
    if entry.formatting == "sharegpt" and entry.compat is Compat.llamafactory:
        _check_pairs(messages)
    return _with_system(_checked(messages, flags, _tools(row, entry)), row, entry)


def _messages(turns: list[dict[str, Any]], entry: Entry) -> tuple[list[Message], list[bool]]:
    return read_turns(turns, entry.tags, strict=entry.compat is Compat.llamafactory)


def _prompt_completion(row: Row, entry: Entry) -> Conversation | Plain:
    """Text before text, without a template; or messages before messages, of which the completion is learnt."""
    prompt, completion = (_parsed(row, entry, key, only_lists=True) for key in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        messages, flags = _messages([*_objects(prompt, "prompt"), *_objects(completion, "completion")], entry)
        flags = [flag and number >= len(prompt) for number, flag in enumerate(flags)]
        return _checked(messages, flags, _tools(row, entry))
    before, after = _text(row, entry, "prompt"), _text(row, entry, "completion")
    if not after.strip():
        raise Unusable(f"`{entry.columns['completion']}` is empty")
    return Plain(before, after)


def _plain_text(row: Row, entry: Entry) -> Plain:
    text = _text(row, entry, "text")
    if not text.strip():
        raise Unusable(f"`{entry.columns['text']}` is empty")
    return Plain("", text)


READERS: dict[str, Callable[[Row, Entry], Conversation | Plain]] = {
    "alpaca": _alpaca,
    "sharegpt": _turn_by_turn,
    "openai": _turn_by_turn,  # the same with other names
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}


def _conversation(messages: list[Message]) -> Conversation:
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


def _value(row: Row, entry: Entry, key: str) -> Any:
    return row.get(entry.columns[key]) if key in entry.columns else None


def _text(row: Row, entry: Entry, key: str) -> str:
    value = _value(row, entry, key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"`{entry.columns[key]}` is {type(value).__name__}, not text")
    return value


def _parsed(row: Row, entry: Entry, key: str, *, only_lists: bool = False) -> Any:
    """Return a value that CSV files and some datasets hold as JSON text."""
    value = _value(row, entry, key)
    if not isinstance(value, str) or not value.strip():
        return value or None
    if only_lists and not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        if only_lists:
            return value
        raise Unusable(f"`{entry.columns[key]}` is text that is not JSON") from error


def _turns(row: Row, entry: Entry) -> list[dict[str, Any]]:
    turns = _parsed(row, entry, "messages")
    if not turns:
        raise Unusable(f"`{entry.columns['messages']}` is empty")
    return _objects(turns, entry.columns["messages"])


def _objects(turns: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"`{column}` must be a list of objects")
    return turns


def _tools(row: Row, entry: Entry) -> list[Any] | None:
    tools = _parsed(row, entry, "tools")
    if not tools and entry.columns.get("tools") == "tools":
        tools = row.get(OLDER_TOOLS)
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"`{entry.columns['tools']}` must be a list of functions")
    # LLaMA-Factory's files list bare functions; templates expect OpenAI's wrapping.
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for function in (tool["function"] for tool in wrapped):
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise Unusable(f"`{entry.columns['tools']}` has a function without a name")
    return wrapped


def _checked(messages: list[Message], flags: list[bool], tools: list[Any] | None) -> Conversation:
    """Refuse an order of turns that no template and no LLaMA-Factory run would take."""
    previous = None
    for position, message in enumerate(messages):
        role = message["role"]
        if role == "system" and position:
            raise Unusable("a system message that is not the first turn")
        if role == "user" and previous in ("user", "tool"):
            raise Unusable(f"broken alternation: user after {previous}")
        if role == "assistant" and previous not in ("user", "tool"):
            raise Unusable(f"broken alternation: assistant {f'after {previous}' if previous else 'first'}")
        if role == "tool" and previous not in ("tool", "assistant"):
            raise Unusable(f"broken alternation: tool {f'after {previous}' if previous else 'first'}")
        previous = role
    if previous != "assistant":
        raise Unusable(f"the last turn is the {previous}'s, not the assistant's")
    learnt = [flag and message["role"] == "assistant" for flag, message in zip(flags, messages, strict=True)]
    for message, flag in zip(messages, learnt, strict=True):
        if flag and not message["content"].strip() and not message.get("tool_calls"):
            raise Unusable("an answer is empty")
    if not any(learnt):
        raise Unusable("no turn is learnt")
    return Conversation(messages, learnt, tools)


def _check_pairs(messages: list[Message]) -> None:
    """LLaMA-Factory's rule: a user or tool turn and an assistant turn, again and again."""
    turns = [message["role"] for message in messages if message["role"] != "system"]
    asked, said = turns[0::2], turns[1::2]
    if len(asked) != len(said) or "assistant" in asked or not all(role == "assistant" for role in said):
        raise Unusable("turns are not pairs, which data.compat=llamafactory asks for")


def _with_system(conversation: Conversation, row: Row, entry: Entry) -> Conversation:
    """Put the `system` column in front, unless the conversation brings a system message of its own."""
    system = _text(row, entry, "system")
    if not system or conversation.messages[0]["role"] == "system":
        return conversation
    messages = [{"role": "system", "content": system}, *conversation.messages]
    return Conversation(messages, [False, *conversation.learnt], conversation.tools)
