"""Rows as conversations: what alpaca, sharegpt, OpenAI, prompt/completion and plain-text rows mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.errors import DataError
from launch.schema import Compat
from trainer.data.files import Row
from trainer.data.registry import Entry

# A message of a chat template: role and content, and where they are used tool_calls, tool_call_id, name, ...
Message = dict[str, Any]


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


class Unusable(Exception):
    """Why a row cannot be used; rows are counted by this text, so it does not depend on the row."""


def to_conversation(row: Row, entry: Entry) -> Conversation | Plain:
    """Return what a row says.

    Raises:
        Unusable: it cannot be learnt from.
    """
    return READERS[entry.formatting](row, entry)


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


def _sharegpt(row: Row, entry: Entry) -> Conversation:
    tags = entry.tags
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if role_tag is None or content_tag is None:
        raise DataError(
            f"{entry.where}: `tags` names no role_tag or content_tag, and data.compat=llamafactory fills in none."
        )
    messages: list[Message] = []
    flags, calls = [], 0
    for turn in _turns(row, entry):
        if role_tag not in turn:
            raise Unusable(f"a turn has no `{role_tag}`")
        role = turn[role_tag]
        content = _content(turn.get(content_tag), content_tag, allow_null=bool(turn.get("tool_calls")))
        message: Message
        if role == tags["user_tag"]:
            message = {"role": "user", "content": content}
        elif role == tags["assistant_tag"]:
            message = {"role": "assistant", "content": content}
            if turn.get("tool_calls"):
                message["tool_calls"] = _tool_calls(turn["tool_calls"])
        elif tags["system_tag"] is not None and role == tags["system_tag"]:
            message = {"role": "system", "content": content}
        elif role == tags["observation_tag"]:
            message = {"role": "tool", "content": content}
        elif role == tags["function_tag"]:
            made = _function_calls(content, calls)
            calls += len(made)
            message = {"role": "assistant", "content": "", "tool_calls": made}
        else:
            raise Unusable(f"unknown role {json.dumps(role, ensure_ascii=False)}; `tags` can name it")
        messages.append(message)
        flags.append(_is_learnt(turn))
    _answer_calls(messages)
    if entry.compat is Compat.llamafactory:
        _check_pairs(messages)
    return _with_system(_checked(messages, flags, _tools(row, entry)), row, entry)


def _openai(row: Row, entry: Entry) -> Conversation:
    """Messages of OpenAI's chat API, with the keys that chat templates know and without those that are null."""
    tags = entry.tags
    names = {
        tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["observation_tag"]: "tool",
        tags["system_tag"]: "system", "developer": "system", "function": "tool",
    }  # fmt: skip
    messages, flags = [], []
    for turn in _turns(row, entry):
        role = turn.get(tags["role_tag"] or "role")
        if role is None or role not in names:
            raise Unusable(f"unknown role {json.dumps(role, ensure_ascii=False)}; `tags` can name it")
        content_tag = tags["content_tag"] or "content"
        content = _content(turn.get(content_tag), content_tag, allow_null=bool(turn.get("tool_calls")))
        message: Message = {"role": names[role], "content": content}
        if turn.get("tool_calls"):
            message["tool_calls"] = _tool_calls(turn["tool_calls"])
        for key in ("name", "tool_call_id", "reasoning_content"):
            if turn.get(key) is not None:
                message[key] = turn[key]
        messages.append(message)
        flags.append(_is_learnt(turn))
    return _with_system(_checked(messages, flags, _tools(row, entry)), row, entry)


def _prompt_completion(row: Row, entry: Entry) -> Conversation | Plain:
    """Text before text, without a template; or messages before messages, of which the completion is learnt."""
    prompt, completion = (_parsed(row, entry, key, only_lists=True) for key in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        flags = [*(False for _ in prompt), *(_is_learnt(turn) for turn in completion)]
        messages = [
            {"role": turn.get("role"), "content": _content(turn.get("content"), "content")}
            for turn in (*prompt, *completion)
        ]
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
    "sharegpt": _sharegpt,
    "openai": _openai,
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
    column = entry.columns["messages"]
    if not turns:
        raise Unusable(f"`{column}` is empty")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"`{column}` must be a list of objects")
    return turns


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


def _is_learnt(turn: dict[str, Any]) -> bool:
    """`loss: false`, or `weight: 0` as OpenAI's fine-tuning files say it, leaves a turn out."""
    for key in ("loss", "weight"):
        if turn.get(key) not in (None, True, False):  # 0 and 1 are equal to these
            raise Unusable(f"`{key}` of a turn must be true, false, 0 or 1")
    return turn.get("loss") not in (False,) and turn.get("weight") not in (False,)


def _tools(row: Row, entry: Entry) -> list[Any] | None:
    tools = _parsed(row, entry, "tools")
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"`{entry.columns['tools']}` must be a list of functions")
    # LLaMA-Factory's files list bare functions; templates expect OpenAI's wrapping.
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _function_calls(content: str, before: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
    except ValueError as error:
        raise Unusable("a function call is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unusable("a function call has no name")
    # Some templates (Mistral's) want an id of nine characters.
    return [
        {
            "type": "function",
            "id": f"call{before + number:05d}",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for number, call in enumerate(calls)
    ]


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """OpenAI's tool calls, their arguments as an object: that is what templates write as JSON."""
    if not isinstance(calls, list):
        raise Unusable("`tool_calls` must be a list")
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("a tool call has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise Unusable("the arguments of a tool call are not JSON") from error
        ids = {"id": call["id"]} if call.get("id") else {}
        made.append({"type": "function", **ids, "function": {"name": function["name"], "arguments": arguments}})
    return made


def _answer_calls(messages: list[Message]) -> None:
    """Give tool messages the id of the call they answer, in order."""
    waiting: list[str] = []
    for message in messages:
        waiting += [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        if message["role"] == "tool" and waiting:
            message.setdefault("tool_call_id", waiting.pop(0))


def _checked(messages: list[Message], flags: list[bool], tools: list[Any] | None) -> Conversation:
    """Refuse an order of turns that no template and no LLaMA-Factory run would take."""
    previous = None
    for position, message in enumerate(messages):
        role = message["role"]
        if role not in ("system", "user", "assistant", "tool"):
            raise Unusable(
                f"unknown role {json.dumps(role, ensure_ascii=False)}; it can be system, user, assistant or tool"
            )
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
