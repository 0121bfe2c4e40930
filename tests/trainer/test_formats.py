"""Rows of each format become the conversation they mean, or say why they cannot."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.config.schema import Compat
from tunewright.registry import Entry, parse_entry
from tunewright.trainer.data.formats import Conversation, Plain, to_conversation, unread
from tunewright.trainer.data.messages import Unusable

CALL = {"type": "function", "id": "call00000", "function": {"name": "sum", "arguments": {"a": 1}}}
CALLED = {"name": "sum", "arguments": '{"a": 1}'}
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


def flagged(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


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


@pytest.mark.parametrize(
    "flag",
    [
        {"loss": False}, {"weight": 0}, {"train": False}, {"training": False}, {"loss_scale": 0.0},
        {"train": False, "weight": 0, "loss": None},
    ],
)  # fmt: skip
def test_a_turn_can_be_left_out_of_the_loss(flag: dict[str, Any]) -> None:
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1] |= flag
    conversation = to_conversation(row, entry("openai"))
    assert isinstance(conversation, Conversation)
    assert conversation.learnt == [False, False, False, True]


def test_a_call_in_openais_older_way_is_a_tool_call_beside_its_text() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "Let me see.", "function_call": CALLED},
            {"role": "function", "name": "sum", "content": "3"},
            {"role": "assistant", "content": None, "function_call": CALLED},
        ],
        "functions": [TOOL],
    }
    conversation = to_conversation(row, entry("openai"))
    assert isinstance(conversation, Conversation)
    assert conversation.messages[1:] == [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "sum", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "call00001"}]},
    ]
    assert conversation.tools == [{"type": "function", "function": TOOL}]
    # In a ShareGPT turn it is the same.
    shared_row = shared(("human", "a"), ("gpt", "b"))
    shared_row["conversations"][1]["function_call"] = CALLED
    conversation = to_conversation(shared_row, entry("sharegpt"))
    assert isinstance(conversation, Conversation)
    assert conversation.messages[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize("formatting", ["sharegpt", "openai", "prompt_completion"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_calls_and_reasoning_of_a_turn_are_read_in_every_formatting(formatting: str, key: str) -> None:
    call = {"name": "sum", "arguments": {"a": 1}}
    role, content = ("from", "value") if formatting == "sharegpt" else ("role", "content")
    asked = {role: "user", content: "Add."}
    said = {role: "assistant", content: "Let me see.", key: "hm", "tool_calls": [{"id": "x", "function": call}]}
    rows: dict[str, dict[str, Any]] = {
        "sharegpt": {"conversations": [asked, said]},
        "openai": {"messages": [asked, said]},
        "prompt_completion": {"prompt": [asked], "completion": [said]},
    }
    conversation = to_conversation(rows[formatting], entry(formatting))
    assert isinstance(conversation, Conversation)
    made = [{**CALL, "id": "x"}]
    assert conversation.messages[1] == {
        "role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": made,
    }  # fmt: skip
    assert conversation.learnt == [False, True]


@pytest.mark.parametrize("tool", ["tool", "observation", "function", "Tool_Response"])
@pytest.mark.parametrize(
    ("system", "user", "assistant"),
    [("System", "User", "Assistant"), ("developer", "instruction", "bot"), ("SYSTEM", "prompter", "model")],
)
def test_roles_go_by_the_names_that_the_field_uses(tool: str, system: str, user: str, assistant: str) -> None:
    call = json.dumps({"name": "sum", "arguments": {"a": 1}})
    said = ((system, "s"), (user, "a"), ("tool_call", call), (tool, "3"), (assistant, "b"))
    expected = [("system", "s"), ("user", "a"), ("assistant", ""), ("tool", "3"), ("assistant", "b")]
    assert turns(to_conversation(shared(*said), entry("sharegpt"))) == expected
    assert turns(to_conversation(chat(*said), entry("openai"))) == expected
    assert "unknown role" in why(shared(*said), entry("sharegpt", Compat.llamafactory))


def test_keys_of_turns_that_nobody_reads_are_told() -> None:
    row = chat(("user", "a"), ("assistant", "b"))
    row["messages"][0] |= {"reasoning": "not an answer's", "loss": False, "refusal": None}
    row["messages"][1] |= {"reasoning": "an answer's", "learn": False, "tool_calls": [], "name": "x"}
    assert unread(row, entry("openai")) == {"reasoning", "learn"}


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
        ("openai", flagged(loss=False), "no turn is learnt"),
        ("openai", {**flagged(), "tools": [{"function": "f"}]}, "`tools` has a function without a name"),
        ("openai", {**flagged(), "functions": [{"name": 5}]}, "has a function without a name"),
        ("openai", flagged(loss_scale=0.5), "`loss_scale` of a turn must be true, false, 0 or 1"),
        ("openai", flagged(train="false"), "`train` of a turn must be true"),
        ("openai", flagged(train=True, weight=0), "`weight` and `train` of a turn contradict each other"),
        ("openai", flagged(train_detail=[{"begin_offset": 0}]), "`train_detail` marks parts of a turn"),
        ("openai", flagged(thinking="a", reasoning="b"), "`reasoning` and `thinking` of a turn say different things"),
        ("openai", flagged(reasoning=["a"]), "`reasoning` of a turn is list, not text"),
        ("openai", flagged(function_call={"arguments": "{}"}), "a function call has no name"),
        ("openai", flagged(tool_calls=[CALL], function_call=CALLED), "are both in a turn"),
        (
            "openai",
            {"messages": [{"role": "user", "content": "a", "loss": True}]},
            "`loss` of a turn asks to learn what the user says",
        ),
        ("alpaca", {"instruction": "<image>a", "output": "b", "images": ["a.png"]}, "`images` is not empty"),
        ("sharegpt", shared(("human", "a"), ("gpt", "b"), image={"path": "a.png"}), "`image` is not empty"),
        ("alpaca", {"instruction": "a", "output": "b", "kto_tag": False}, "`kto_tag` marks its answer as a bad one"),
        ("openai", chat(("user", "a"), ("assistant", "b"), label=False), "`label` marks its answer as a bad one"),
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


def test_an_entry_can_say_that_media_and_labels_do_not_matter() -> None:
    row = {"instruction": "a", "output": "b", "images": ["a.png"], "label": False}
    assert to_conversation(row, entry("alpaca", columns={"images": None, "kto_tag": ""})).answer == "b"
    named = entry("alpaca", columns={"prompt": "image", "response": "label"})
    assert to_conversation({"image": "a", "label": "b"}, named).answer == "b"
    for harmless in ({"images": []}, {"images": None}, {"label": True}, {"label": 0}):
        assert to_conversation({"instruction": "a", "output": "b", **harmless}, entry("alpaca")).answer == "b"


KEYS = ("from", "value", "role", "content", "tool_calls", "function_call", "thinking", "weight", "train_detail", "name")
said = st.sampled_from(["", "user", "gpt", "function_call", "tool", "a", "{", "[1]", '{"name": "f"}'])
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | said,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)
tools = st.lists(st.dictionaries(st.sampled_from(["function", "name"]), junk, max_size=2), max_size=2)
told = st.lists(st.dictionaries(st.sampled_from(KEYS), said | junk, min_size=2), min_size=1, max_size=3)


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt", "openai", "prompt_completion", "text"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, database=None)
def test_whatever_a_row_holds_it_is_read_or_unusable(formatting: str, data: st.DataObject) -> None:
    meaning = entry(formatting)
    columns = [*meaning.columns.values(), "images", "label", "functions"]
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(columns, told | tools | said | junk)))
    with suppress(Unusable):
        conversation = to_conversation(row, meaning)
        assert conversation.answer or isinstance(conversation, Conversation)
        unread(row, meaning)
