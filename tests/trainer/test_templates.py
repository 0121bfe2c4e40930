"""The shipped chat templates: laws that the renderer relies on, over random conversations, and exact text by hand.

The renderer labels what an assistant turn adds to the text, so each template has to be prefix-stable: later messages
never change what earlier ones became, and the generation prompt is how the next assistant turn begins.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TOOL_NAMES = ["chatml", "llama3", "qwen"]
BOS, EOS = "<s>", "</s>"
MARKERS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
MARKERS["phi3"] = "<|end|>"  # the others end a turn with the tokenizer's own end-of-sequence token
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TOOL_JSON = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}'
Message = dict[str, Any]

many = settings(max_examples=40, deadline=None, database=None)
every_template = pytest.mark.parametrize("name", NAMES)
texts = st.text("ab \n\t'\"\\{}%<>é中🙂", max_size=12)
arguments = st.dictionaries(texts, texts | st.integers() | st.none(), max_size=2)


def say(role: str, content: str | None, *calls: Any) -> Message:
    """A message; each of `calls` is the arguments, a mapping or JSON, of a call that it makes."""
    functions = [{"type": "function", "id": "c", "function": {"name": "weather", "arguments": call}} for call in calls]
    return {"role": role, "content": content} | ({"tool_calls": functions} if calls else {})


SIMPLE = [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Hello"), say("user", "Bye")]


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[list[Message], list[Message] | None]:
    """Messages that the template allows, and the tools that they may call."""
    tools = [TOOL] * draw(st.integers(0, 2)) if name in TOOL_NAMES else []
    messages = [say("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(say("user", draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            calls = draw(st.lists(arguments | arguments.map(json.dumps), min_size=1, max_size=1 + (name != "llama3")))
            messages += [say("assistant", draw(texts | st.none()), *calls), *(say("tool", draw(texts)) for _ in calls)]
        messages.append(say("assistant", draw(texts)))
    return messages, tools or None


@pytest.fixture(scope="session")
def render(small_tokenizer: Any) -> Any:
    def to_text(name: str, messages: list[Message], tools: list[Message] | None = None, prompt: bool = False) -> str:
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        return small_tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    return to_text


@every_template
def test_first_line_says_what_the_template_is_for(name: str) -> None:
    first = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"\{#- .+: for .+\. -#\}", first)


@every_template
@given(data=st.data())
@many
def test_later_messages_never_change_earlier_text(name: str, render: Any, data: st.DataObject) -> None:
    messages, tools = data.draw(conversations(name))
    beginnings = [render(name, messages[:end], tools) for end in range(1, len(messages) + 1)]
    for shorter, longer in pairwise(beginnings):
        assert longer.startswith(shorter)
    rest = beginnings[-1]
    for content in (message["content"] or "" for message in messages):  # verbatim, in the order of the turns
        assert content in rest
        rest = rest[rest.index(content) + len(content) :]


@every_template
@given(data=st.data())
@many
def test_an_assistant_turn_is_its_content_and_the_end_marker(name: str, render: Any, data: st.DataObject) -> None:
    messages, tools = data.draw(conversations(name))
    marker = re.escape(MARKERS.get(name, EOS))
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        before, through = render(name, messages[:index], tools, True), render(name, messages[: index + 1], tools)
        assert through.startswith(before)
        calls = '.*"weather".*' if "tool_calls" in messages[index] else ""
        content = re.escape(messages[index]["content"] or "")
        assert re.fullmatch(f" ?{content}{calls} ?{marker}\n?", through[len(before) :], re.DOTALL)


@every_template
def test_the_end_marker_is_one_token(name: str, render: Any, small_tokenizer: Any) -> None:
    ids = small_tokenizer(render(name, SIMPLE), add_special_tokens=False)["input_ids"]
    assert small_tokenizer.convert_tokens_to_ids(MARKERS.get(name, EOS)) in ids
    assert ids.count(small_tokenizer.bos_token_id) == {"llama2": 2}.get(name, render(name, SIMPLE).startswith(BOS))


@every_template
def test_unknown_roles_and_late_system_messages_are_refused(name: str, render: Any) -> None:
    for late, reason in ((say("critic", "No"), "Unknown role 'critic'"), (say("system", ""), "can only come first")):
        with pytest.raises(TemplateError, match=reason):
            render(name, [say("user", "Hi"), late])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TOOL_NAMES)))
def test_templates_without_tools_refuse_them(name: str, render: Any) -> None:
    for last, tools in ((say("user", "Hi"), [TOOL]), (say("assistant", "", {}), None), (say("tool", "1"), None)):
        with pytest.raises(TemplateError, match="cannot render tools"):
            render(name, [say("user", "Hi"), last], tools)


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral"])
def test_folded_system_text_needs_a_user_turn(name: str, render: Any) -> None:
    for messages, prompt in (([SIMPLE[0], SIMPLE[2]], False), ([SIMPLE[0]], True)):
        with pytest.raises(TemplateError, match="follow"):
            render(name, messages, prompt=prompt)


def test_llama3_refuses_parallel_calls(render: Any) -> None:
    with pytest.raises(TemplateError, match="one tool call"):
        render("llama3", [say("user", "Hi"), say("assistant", None, {}, {})])


CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3 = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
)
ZEPHYR = "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n"
ALPACA = "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n"
EXPECTED = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "deepseek3": "<s>Be brief.<｜User｜>Hi<｜Assistant｜>Hello</s><｜User｜>Bye<｜Assistant｜>",
    "deepseek": "<s>Be brief.\n\nUser: Hi\n\nAssistant: Hello</s>User: Bye\n\nAssistant:",
    "gemma": GEMMA,
    "human_assistant": "Be brief.\nHuman: Hi\nAssistant: Hello</s>\nHuman: Bye\nAssistant:",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "llama3": LLAMA3,
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST]",
    "phi3": ZEPHYR.replace("</s>", "<|end|>"),
    "qwen": CHATML,
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:",
    "zephyr": ZEPHYR,
}


@every_template
def test_a_conversation_renders_as_written_by_hand(name: str, render: Any) -> None:
    assert render(name, SIMPLE, prompt=True) == EXPECTED[name]


def test_qwen_renders_tools_and_calls_as_qwen2_5_documents(render: Any) -> None:
    calls = say("assistant", "Let me see.", {"city": "Köln"}, '{"city": "Rom"}')
    messages = [say("user", "Rain?"), calls, say("tool", "wet"), say("tool", "dry")]
    assert render("qwen", messages, [TOOL], prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + TOOL_JSON + "\n"
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nwet\n</tool_response>\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llama3_renders_calls_as_json_and_results_under_ipython(render: Any) -> None:
    calls = say("assistant", None, {"city": "Rom"})
    text = render("llama3", [say("user", "Rain?"), calls, say("tool", '{"rain": true}')], [TOOL])
    assert "Do not use variables.\n\n" + json.dumps(TOOL, indent=4) + "\n\n<|eot_id|>" in text
    assert text.endswith(
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Rom"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"rain": true}<|eot_id|>'
    )
