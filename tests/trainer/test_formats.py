"""Rows of each format become the conversation they mean, or say why they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.schema import Compat
from trainer.data.formats import Conversation, Plain, Unusable, to_conversation
from trainer.data.registry import Entry, parse_entry

CALL = {"type": "function", "id": "call00000", "function": {"name": "sum", "arguments": {"a": 1}}}
TOOL = {"name": "sum", "description": "adds"}


def entry(formatting: str, compat: Compat = Compat.none, **blocks: Any) -> Entry:
    return parse_entry("x", {"file_name": "a.json", "formatting": formatting, **blocks}, Path("r.json"), compat)


def turns(conversation: Conversation | Plain) -> list[tuple[str, str]]:
    assert isinstance(conversation, Conversation)
    return [(message["role"], message["content"]) for message in conversation.messages]


def shared(*said: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in said], **columns}


def chat(*said: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said], **columns}


def why(row: dict[str, Any], meaning: Entry) -> str:
    with pytest.raises(Unusable) as caught:
        to_conversation(row, meaning)
    return str(caught.value)


def test_alpaca_with_system_and_history() -> None:
    row = {
        "instruction": "Say hello.",
        "input": "Loudly.",
        "output": "HELLO",
        "system": "Be brief.",
        "history": [["Hi", "Yes?"]],
    }
    assert turns(to_conversation(row, entry("alpaca"))) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Say hello.\nLoudly."),
        ("assistant", "HELLO"),
    ]


def test_sharegpt_with_tools_calls_and_results() -> None:
    call = json.dumps({"name": "sum", "arguments": {"a": 1}})
    row = shared(
        ("human", "Add."), ("function_call", call), ("observation", "3"), ("gpt", "It is 3."), tools=json.dumps([TOOL])
    )
    conversation = to_conversation(row, entry("sharegpt"))
    assert isinstance(conversation, Conversation)
    assert conversation.messages == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert conversation.learnt == [False, True, False, True]
    assert conversation.tools == [{"type": "function", "function": TOOL}]


def test_a_leading_system_message_goes_before_the_system_column() -> None:
    row = shared(("system", "own"), ("human", "a"), ("gpt", "b"), system="column")
    assert turns(to_conversation(row, entry("sharegpt")))[0] == ("system", "own")
    with_column = shared(("human", "a"), ("gpt", "b"), system="column")
    assert turns(to_conversation(with_column, entry("sharegpt")))[0] == ("system", "column")


def test_openai_messages_with_tool_calls_parts_and_null_content() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Add"}, {"type": "text", "text": " it."}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "3", "tool_call_id": "x"},
            {"role": "assistant", "content": "3"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    conversation = to_conversation(row, entry("openai"))
    assert isinstance(conversation, Conversation)
    assert [role for role, _ in turns(conversation)] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns(conversation)[1][1] == "Add it."
    assert conversation.messages[2]["tool_calls"] == [{**CALL, "id": "x"}]
    assert "refusal" not in conversation.messages[2]


def test_no_system_prompt_is_made_up() -> None:
    row = chat(("user", "a"), ("assistant", "b"))
    assert turns(to_conversation(row, entry("openai"))) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}])
def test_a_turn_can_be_left_out_of_the_loss(flag: dict[str, Any]) -> None:
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1] |= flag
    conversation = to_conversation(row, entry("openai"))
    assert isinstance(conversation, Conversation)
    assert conversation.learnt == [False, False, False, True]


def test_prompt_and_completion_as_text_and_as_messages() -> None:
    meaning = entry("prompt_completion")
    assert to_conversation({"prompt": "a", "completion": "b"}, meaning) == Plain("a", "b")
    asked = chat(("user", "a"), ("assistant", "b"), ("user", "c"))["messages"]
    row = {"prompt": asked, "completion": chat(("assistant", "d"))["messages"]}
    conversation = to_conversation(row, meaning)
    assert isinstance(conversation, Conversation)
    assert conversation.learnt == [False, False, False, True]


def test_text_is_plain() -> None:
    assert to_conversation({"text": "a"}, entry("text")) == Plain("", "a")


@pytest.mark.parametrize(
    ("formatting", "row", "reason"),
    [
        ("alpaca", {"instruction": "a", "output": ""}, "`output` is empty"),
        ("alpaca", {"instruction": "a", "output": None}, "`output` is empty"),
        ("alpaca", {"instruction": "a", "output": 3}, "`output` is int, not text"),
        ("alpaca", {"instruction": " ", "output": "b"}, "`instruction` is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c", ""]]}, "an answer in `history` is empty"),
        ("openai", chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), "an answer is empty"),
        ("openai", {"messages": [{"role": "user", "content": "a", "loss": "no"}]}, "`loss` of a turn must be true"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["only"]]}, "`history` must be a list of"),
        ("sharegpt", shared(), "`conversations` is empty"),
        ("sharegpt", {"conversations": "not json"}, "text that is not JSON"),
        ("sharegpt", {"conversations": ["a"]}, "must be a list of objects"),
        ("sharegpt", shared(("human", "a"), ("robot", "b")), 'unknown role "robot"'),
        ("sharegpt", shared(("human", "a"), ("gpt", None)), "`value` is null, not text"),
        ("sharegpt", shared(("human", "a")), "the last turn is the user's"),
        ("sharegpt", shared(("gpt", "a"), ("human", "b"), ("gpt", "c")), "alternation: assistant first"),
        ("sharegpt", shared(("human", "a"), ("human", "b"), ("gpt", "c")), "alternation: user after user"),
        ("sharegpt", shared(("human", "a"), ("gpt", "b"), ("gpt", "c")), "alternation: assistant after assistant"),
        ("sharegpt", shared(("human", "a"), ("system", "b"), ("gpt", "c")), "a system message that is not the first"),
        ("sharegpt", shared(("observation", "a"), ("gpt", "b")), "alternation: tool first"),
        ("sharegpt", shared(("human", "a"), ("function_call", "sum(1)"), ("gpt", "b")), "a function call is not JSON"),
        ("sharegpt", shared(("human", "a"), ("function_call", "{}"), ("gpt", "b")), "a function call has no name"),
        ("sharegpt", shared(("human", "a"), ("gpt", " ")), "an answer is empty"),
        ("sharegpt", shared(("human", "a"), ("gpt", "b"), tools="sum"), "text that is not JSON"),
        ("openai", chat(("user", "a"), ("critic", "b")), 'unknown role "critic"'),
        ("openai", chat(("user", "a"), ("assistant", None)), "`content` is null, not text"),
        ("openai", chat(("user", [{"type": "image_url"}]), ("assistant", "b")), "parts that are not text"),
        (
            "openai",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
            "no turn is learnt",
        ),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("text", {"text": "  "}, "`text` is empty"),
    ],
)
def test_an_unusable_row_says_why(formatting: str, row: dict[str, Any], reason: str) -> None:
    assert reason in why(row, entry(formatting))


def test_tags_name_other_roles() -> None:
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "ask", "assistant_tag": "tell", "system_tag": "rule"}
    row = {"conversations": [{"who": who, "said": who.upper()} for who in ("rule", "ask", "tell")]}
    conversation = to_conversation(row, entry("sharegpt", tags=tags))
    assert turns(conversation) == [("system", "RULE"), ("user", "ASK"), ("assistant", "TELL")]


def test_compat_drops_what_llamafactory_drops() -> None:
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    with_system = shared(("system", "s"), ("human", "a"), ("gpt", "b"))
    assert to_conversation(with_system, entry("sharegpt", tags=tags))
    assert "unknown role" in why(with_system, entry("sharegpt", Compat.llamafactory, tags=tags))
    results = ("observation", "1"), ("observation", "2")
    two_results = shared(("human", "a"), ("function_call", '{"name": "f"}'), *results, ("gpt", "b"))
    assert to_conversation(two_results, entry("sharegpt"))
    assert "turns are not pairs" in why(two_results, entry("sharegpt", Compat.llamafactory))
