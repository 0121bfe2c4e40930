"""Conversations become the template's own tokens, labelled where the assistant speaks and nowhere else."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from tunewright.config.chat_templates import template_names
from tunewright.config.schema import Overlong
from tunewright.errors import ConfigError, DataError
from tunewright.trainer.data.formats import Conversation, Plain
from tunewright.trainer.data.messages import Message, Unusable
from tunewright.trainer.data.render import IGNORED, Example, Renderer
from tunewright.trainer.model.tokenizer import install_template, set_end_of_turn

CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "tells rain", "parameters": CITY}}]
WITH_TOOLS = ("chatml", "llama3", "qwen")
# A reasoning model's template in short: the thinking of earlier turns is left out, the last turn always has some.
REASONING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The generation prompt begins the thought that an answer goes on with, as Qwen3.5's and Nemotron's do.
OPENS_A_THOUGHT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set r, c = m.reasoning_content or '', m.content %}{%- if '</think>' in c %}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<think>\n' + r + '\n</think>\n\n' + c }}{%- else %}{{ m.content }}{%- endif %}{{ '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

many = settings(max_examples=25, deadline=None, database=None)
every_template = pytest.mark.parametrize("name", template_names())
texts = st.text("ab \n<>é中🙂", min_size=1, max_size=20).filter(str.strip)


@pytest.fixture(scope="session")
def renderer(small_tokenizer: Any) -> Any:
    def make(template: str, cutoff_len: int = 100_000, **options: Any) -> Renderer:
        tokenizer = copy.deepcopy(small_tokenizer)
        if template in template_names():
            install_template(tokenizer, template)
        else:
            tokenizer.chat_template = template
        set_end_of_turn(tokenizer)
        return Renderer(tokenizer, cutoff_len, **options)

    return make


@st.composite
def conversations(draw: st.DrawFn, name: str = "chatml", most: int = 3, words: Any = texts) -> Conversation:
    """Random turns with a system message, tool calls and unlearnt answers now and then."""
    messages: list[Message] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    learnt = [False] * len(messages)
    tools = draw(st.booleans()) if name in WITH_TOOLS else False
    for _ in range(draw(st.integers(1, most))):
        messages.append({"role": "user", "content": draw(words)})
        learnt.append(False)
        if tools and draw(st.booleans()):
            function = {"name": "weather", "arguments": {"city": draw(words)}}
            call = {"type": "function", "id": "call00000", "function": function}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": draw(words), "tool_call_id": "call00000"},
            ]
            learnt += [True, False]
        messages.append({"role": "assistant", "content": draw(words)})
        learnt.append(draw(st.booleans()))
    learnt[-1] = True
    return Conversation(messages, learnt, TOOLS if tools else None)


def chat(*contents: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant by turns, all answers learnt."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


def one(renderer: Renderer, source: Conversation | Plain) -> Example:
    (examples,) = renderer.render([source])
    assert not isinstance(examples, Unusable), examples
    assert len(examples) == 1
    return examples[0]


def reason(renderer: Renderer, source: Conversation | Plain) -> str:
    (result,) = renderer.render([source])
    assert isinstance(result, Unusable)
    return str(result)


def learnt_text(renderer: Renderer, example: Example) -> str:
    return str(renderer.tokenizer.decode([int(label) for label in example.labels if label != IGNORED]))


# ---- ids and labels -------------------------------------------------------------------------------------------------


@every_template
@given(data=st.data())
@many
def test_ids_are_the_templates_and_labels_the_learnt_turns(name: str, renderer: Any, data: st.DataObject) -> None:
    conversation = data.draw(conversations(name))
    made = renderer(name)
    example = one(made, conversation)
    tokenizer, messages, tools = made.tokenizer, conversation.messages, conversation.tools
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    expected = ""
    for turn, learnt in enumerate(conversation.learnt):
        if learnt:
            before = tokenizer.apply_chat_template(
                messages[:turn], tools=tools, tokenize=False, add_generation_prompt=True
            )
            expected += tokenizer.apply_chat_template(messages[: turn + 1], tools=tools, tokenize=False)[len(before) :]
    # A token may hold the space at the end of a header together with the beginning of the answer.
    assert _without_spaces(expected) == _without_spaces(learnt_text(made, example))
    same = example.labels != IGNORED
    assert (example.labels[same] == example.input_ids[same]).all()
    assert example.ended


def _without_spaces(text: str) -> str:
    return "".join(text.split())


@every_template
def test_the_end_of_turn_token_is_learnt_and_stops_generation(name: str, renderer: Any) -> None:
    made = renderer(name)
    example = one(made, chat("a", "b"))
    assert made.tokenizer.eos_token_id in example.labels


@given(data=st.data())
@many
def test_rendering_together_is_rendering_one_by_one(renderer: Any, data: st.DataObject) -> None:
    sources = data.draw(st.lists(conversations(), min_size=2, max_size=5))
    made = renderer("chatml")
    for source, examples in zip(sources, made.render(sources), strict=True):
        assert not isinstance(examples, Unusable)
        assert examples[0].input_ids.tolist() == one(made, source).input_ids.tolist()


def test_train_on_prompt_learns_every_token(renderer: Any) -> None:
    example = one(renderer("chatml", train_on_prompt=True), chat("a", "b", system="s"))
    assert (example.labels == example.input_ids).all()


def test_mask_history_learns_the_last_answer_only(renderer: Any) -> None:
    made = renderer("chatml", mask_history=True)
    assert learnt_text(made, one(made, chat("a", "first", "b", "second"))) == "second<|im_end|>\n"


def test_a_turn_with_loss_false_is_not_learnt(renderer: Any) -> None:
    made = renderer("chatml")
    conversation = chat("a", "first", "b", "second")
    quiet = Conversation(conversation.messages, [False, False, False, True])
    assert learnt_text(made, one(made, quiet)) == "second<|im_end|>\n"


def test_plain_text_is_learnt_whole_and_ended(renderer: Any) -> None:
    made = renderer("chatml")
    made.tokenizer.eos_token = "</s>"
    assert learnt_text(made, one(made, Plain("", "some text"))) == "some text</s>"
    example = one(made, Plain("question: ", "answer"))
    assert made.tokenizer.decode(example.input_ids) == "question: answer</s>"
    assert learnt_text(made, example) == " answer</s>"


# ---- the templates of real models -----------------------------------------------------------------------------------

OF_MODELS = Path(trl.__file__).parent / "chat_templates"
# Refused: their generation prompt begins a thought that their answers do not have.
THINKING = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano")
WHOLE = (
    "cohere", "cohere2", "gemma3", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5",
    "qwen3", "qwen3_5_nothink", "qwen3_instruct_2507",
)  # fmt: skip


def of_model(name: str) -> Any:
    """A small tokenizer with the chat template of a real model and the markers that it writes."""
    template = (OF_MODELS / f"{name}.jinja").read_text(encoding="utf-8")
    markers = sorted(set(re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>", template)))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a b"], 400, special_tokens=["<s>", "</s>", *markers])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=markers
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", WHOLE)
def test_the_template_of_a_model_gives_its_own_ids_and_labels_from_its_generation_prompt(name: str) -> None:
    tokenizer = of_model(name)
    conversation = chat("Hi there", "Hello you", "Bye", "So long", system="Be brief.")
    made = copy.deepcopy(tokenizer)
    set_end_of_turn(made)
    (examples,) = Renderer(made, 10_000).render([conversation])
    assert not isinstance(examples, Unusable)
    for example, end in zip(examples, (5,) if len(examples) == 1 else (3, 5), strict=True):
        messages = conversation.messages[:end]
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert example.input_ids.tolist() == expected
        assert example.labels[len(before) :].tolist() == expected[len(before) :]
        first = (example.labels != IGNORED).sum() == len(expected) - len(before)
        assert first == (len(examples) > 1)
        assert example.ended


@pytest.mark.parametrize(
    "name",
    ["gptoss", "lfm2_v2", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_instruct_2507"],
)
def test_the_template_of_a_model_learns_its_tool_calls(name: str) -> None:
    tokenizer = of_model(name)
    call = {"type": "function", "id": "call00000", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "wet", "tool_call_id": "call00000", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ]
    made = copy.deepcopy(tokenizer)
    set_end_of_turn(made)
    renderer = Renderer(made, 10_000)
    (examples,) = renderer.render([Conversation(messages, [False, True, False, True], TOOLS)])
    assert not isinstance(examples, Unusable)
    learnt = "".join(learnt_text(renderer, example) for example in examples)
    assert re.search("weather.*Rome|Rome.*weather", learnt, re.DOTALL)
    assert learnt.count("It rains.") == 1
    assert "wet" not in learnt
    expected = tokenizer.apply_chat_template(messages, tools=TOOLS, return_dict=False)
    assert examples[-1].input_ids.tolist() == expected


@pytest.mark.parametrize("name", THINKING)
def test_a_model_that_thinks_is_refused_unless_it_is_told_not_to(name: str) -> None:
    said = reason(Renderer(of_model(name), 10_000), chat("Hi there", "Hello you"))
    knows = name.startswith("nemotron")
    advice = "try model.template_kwargs={enable_thinking: false}" if knows else "set another model.template"
    assert said.endswith(f"differently from its generation prompt: {advice}")
    if knows:
        assert one(Renderer(of_model(name), 10_000, template_kwargs={"enable_thinking": False}), chat("a", "b"))


# ---- reasoning ------------------------------------------------------------------------------------------------------

HOW_MANY = {"role": "user", "content": "What is 2 + 3?"}
THOUGHT = "Two and three are added."


def thinking(text: str = "It is 5.", reasoning: str = THOUGHT) -> Conversation:
    """A question, and an answer that was thought about: beside it, or within it."""
    answer = {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {})}
    return Conversation([HOW_MANY, answer], [False, True])


IN_THE_TEXT = thinking(f"<think>\n{THOUGHT}\n</think>\n\nIt is 5.", "")


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("qwen3", f"<think>\n{THOUGHT}\n</think>\n\nIt is 5.<|im_end|>\n"),
        ("qwen3_5_think", f"{THOUGHT}\n</think>\n\nIt is 5.<|im_end|>\n"),
        ("qwen3_6", f"{THOUGHT}\n</think>\n\nIt is 5.<|im_end|>\n"),
        ("nemotron_3_nano", f"{THOUGHT}\n</think>\nIt is 5.<|im_end|>\n"),
        ("nemotron_3_super", f"{THOUGHT}\n</think>\nIt is 5.<|im_end|>\n"),
        ("glm4moe", f"\n<think>{THOUGHT}</think>\nIt is 5."),
        ("lfm2_2_5", f"<think>{THOUGHT}</think>It is 5.<|im_end|>\n"),  # by the name thinking
        ("gemma4_v5", f"<|channel>thought\n{THOUGHT}\n<channel|>It is 5.<turn|>\n"),  # by the name reasoning
        ("gptoss", f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>It"),
    ],
)
def test_reasoning_is_learnt_where_the_template_writes_it(name: str, learnt: str) -> None:
    made = Renderer(of_model(name), 10_000)
    assert learnt_text(made, one(made, thinking())).startswith(learnt)
    if name.startswith(("qwen", "nemotron", "glm")):  # these read it out of the text too
        assert _without_spaces(learnt_text(made, one(made, IN_THE_TEXT))) == _without_spaces(learnt)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "gemma3", "qwen3_instruct_2507"])
def test_reasoning_that_a_template_leaves_out_refuses_the_row(name: str) -> None:
    made = Renderer(of_model(name), 10_000)
    assert "leaves out the reasoning of the answer: set another" in reason(made, thinking())
    # What is not learnt may go: templates take it out of earlier turns themselves.
    earlier = Conversation([*thinking().messages, *chat("a", "b").messages], [False, False, False, True])
    assert one(made, earlier)


def test_a_thought_in_the_answer_is_not_learnt_behind_an_empty_one() -> None:
    made = Renderer(of_model("qwen3_8"), 10_000)  # opens a thought and does not look for one in the text
    assert "opens a thought beside the <think> of the answer: write that one as" in reason(made, IN_THE_TEXT)
    assert learnt_text(made, one(made, thinking())).startswith(THOUGHT)


@pytest.mark.parametrize(
    ("name", "given", "conversation", "advice"),
    [
        ("qwen3", {"enable_thinking": False}, IN_THE_TEXT, "leave enable_thinking out of model.template_kwargs"),
        ("qwen3", {"enable_thinking": False}, thinking(), "leave enable_thinking out of model.template_kwargs"),
        ("qwen3_5_nothink", {}, thinking(), "try model.template_kwargs={enable_thinking: true}"),
        (
            "nemotron_3_nano",
            {"enable_thinking": True},
            chat("a", "b"),
            "try model.template_kwargs={enable_thinking: false}",
        ),
    ],
)
def test_the_advice_for_an_answer_unlike_its_prompt_has_been_tried(
    name: str, given: dict[str, Any], conversation: Conversation, advice: str
) -> None:
    said = reason(Renderer(of_model(name), 10_000, template_kwargs=given), conversation)
    assert said.endswith(f"differently from its generation prompt: {advice}")
    value = re.search(r"enable_thinking: (\w+)", said)
    followed = {"enable_thinking": value[1] == "true"} if value else {}
    assert one(Renderer(of_model(name), 10_000, template_kwargs=followed), conversation)


def test_a_prompt_that_opens_a_thought_gives_the_ids_of_the_template(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = OPENS_A_THOUGHT
    learnt = [417, 70, 2287, 201, 4097, 201, 201, 22, 358, 331, 2, 201]
    question = {"role": "user", "content": "2+2?"}
    within = {"content": "<think>\nadd them\n</think>\n\n4 it is"}
    for answer in (within, {"content": "4 it is", "reasoning_content": "add them"}):
        conversation = Conversation([question, {"role": "assistant", **answer}], [False, True])
        example = one(Renderer(tokenizer, 1000), conversation)
        assert example.input_ids.tolist() == [1, 280, 201, 20, 13, 20, 33, 2, 201, 1, 282, 201, 4096, 201, *learnt]
        assert example.labels.tolist() == [IGNORED] * 14 + learnt


# ---- special tokens in text -----------------------------------------------------------------------------------------


@given(before=texts, after=texts, role=st.sampled_from(["system", "user", "assistant"]))
@many
def test_special_tokens_in_text_stay_text(renderer: Any, before: str, after: str, role: str) -> None:
    made = renderer("chatml")
    said = {"system": "s", "user": "u", "assistant": "a"} | {role: f"{before}<|im_end|><s>{after}"}
    conversation = chat(said["user"], said["assistant"], system=said["system"])
    example = one(made, conversation)
    end, bos = made.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<s>"])
    assert (example.input_ids == end).sum() == 3  # one for each turn, and none from the text
    assert bos not in example.input_ids
    tokenizer = made.tokenizer
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    learnt = tokenizer.decode(example.labels[example.labels != IGNORED])
    assert "".join(learnt.split()) == "".join((said["assistant"] + "<|im_end|>").split())


@pytest.mark.parametrize("as_tokens", [False, True])
def test_special_tokens_of_ones_own_in_an_answer(tiny_tokenizer: Any, as_tokens: bool) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|name|>", "<|/name|>"]})
    made = Renderer(tokenizer, 1000, special_tokens_in_answers=as_tokens)
    example = one(made, chat("Mark <|name|> in: Ann went home.", "<|name|>Ann<|/name|> went home."))
    learnt = [label for label in example.labels.tolist() if label != IGNORED]
    as_text = [30, 94, 1884, 94, 32, 1016, 80, 30, 94, 17, 1884, 94, 32, 951, 745, 16, 2, 201]
    assert learnt == ([4096, 1016, 80, 4097, 951, 745, 16, 2, 201] if as_tokens else as_text)
    assert 4096 not in example.input_ids[: -len(learnt)]  # a user makes no tokens
    assert example.kept_as_text == (set() if as_tokens else {"<|name|>", "<|/name|>"})
    # The template's own never come from a text.
    ended = one(made, chat("a", "<|name|>x<|im_end|>\n"))
    assert (ended.input_ids == 2).sum() == 2
    assert "<|im_end|>" in ended.kept_as_text
    assert (4096 in ended.input_ids) == as_tokens


def test_the_borders_of_a_thought_are_tokens_where_the_template_reads_them(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = OPENS_A_THOUGHT
    example = one(Renderer(tokenizer, 1000), chat("Say <think>.", "<think>\nhm\n</think>\n\nb"))
    assert ((example.input_ids == 4096).sum(), (example.input_ids == 4097).sum()) == (1, 1)
    assert example.kept_as_text == set()


def test_special_tokens_in_plain_text_are_tokens(renderer: Any) -> None:
    made = renderer("chatml")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    assert one(made, Plain("", text)).input_ids.tolist() == made.tokenizer(text)["input_ids"]


# ---- templates that rewrite or refuse -------------------------------------------------------------------------------


def test_a_template_that_rewrites_history_gives_an_example_for_each_answer(renderer: Any) -> None:
    made = renderer(REASONING)
    conversation = chat("a", "first", "b", "second")
    (examples,) = made.render([conversation])
    assert [learnt_text(made, example) for example in examples] == [
        "<think>\n\n</think>\n\nfirst<|im_end|>",
        "<think>\n\n</think>\n\nsecond<|im_end|>",
    ]
    for example, end in zip(examples, (2, 4), strict=True):
        expected = made.tokenizer.apply_chat_template(conversation.messages[:end], return_dict=False)
        assert example.input_ids.tolist() == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            REASONING.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
            "leaves out a part of the answer",
        ),
        (REASONING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}"), "differently"),
        ("{{ raise_exception('no such role') }}", "refuses it: no such role"),
    ],
)
def test_a_template_that_would_be_mismasked_is_refused(renderer: Any, template: str, said: str) -> None:
    assert said in reason(renderer(template), chat("a", "<think>hm</think>b"))


def test_a_template_that_leaves_out_a_tool_call_is_refused(renderer: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    prompted = template + "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    assert "leaves out a part of the answer" in reason(renderer(prompted), Conversation(messages, [False, True]))


@pytest.mark.parametrize(
    ("leaves", "said"),
    [("m.role != 'system'", "what the system says"), ("m.role != 'user'", "what the user says"), ("true", "the tools")],
)
def test_a_template_that_passes_over_something_is_refused(renderer: Any, leaves: str, said: str) -> None:
    template = "{% for m in messages if " + leaves + " %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    conversation = chat("question", "answer", system="rules")
    given = Conversation(conversation.messages, conversation.learnt, TOOLS if leaves == "true" else None)
    assert f"leaves out {said}: set another model.template" in reason(renderer(template), given)


def test_without_a_template_the_error_names_the_setting(small_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"model\.template"):
        Renderer(small_tokenizer, 100).render([chat("a", "b")])


def test_a_template_whose_markers_are_no_tokens_is_refused_with_those_that_fit(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"<start_of_turn> are not tokens.*fit it: .*chatml"):
        install_template(copy.deepcopy(tiny_tokenizer), "gemma")


def test_the_templates_end_of_turn_becomes_the_end_token(small_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(small_tokenizer)
    install_template(tokenizer, "llama3")
    set_end_of_turn(tokenizer)
    assert tokenizer.eos_token == "<|eot_id|>"


# ---- truncation -----------------------------------------------------------------------------------------------------


@every_template
@given(data=st.data())
@many
def test_a_cut_row_keeps_system_question_header_and_end(name: str, renderer: Any, data: st.DataObject) -> None:
    conversation = data.draw(
        conversations(name, most=4, words=st.text("XYZ ", min_size=1, max_size=30).filter(str.strip))
    )
    made = renderer(name)
    whole = one(made, conversation).input_ids
    cutoff = data.draw(st.integers(16, max(16, len(whole) - 1)))
    short = renderer(name, cutoff)
    (result,) = short.render([conversation])
    if isinstance(result, Unusable):
        assert len(whole) > cutoff
        return
    (example,) = result
    assert len(example.input_ids) <= cutoff
    assert (example.labels[1:] != IGNORED).any()
    assert example.truncated == (len(whole) > cutoff)
    assert example.ended
    tokenizer, messages, tools = made.tokenizer, conversation.messages, conversation.tools
    text = tokenizer.decode(example.input_ids)
    system = messages[:1] if messages[0]["role"] == "system" else []
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
    rest = [*system, *messages[last:]]
    prompt = tokenizer.apply_chat_template(rest[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
    answer = tokenizer.apply_chat_template(rest, tools=tools, tokenize=False)[len(prompt) :]
    assert all(message["content"] in text for message in system)
    kept = prompt[prompt.rindex(messages[last]["content"]) :]  # the last question to the header of the last answer
    said = text[text.rindex(kept) + len(kept) :]
    end = tokenizer.eos_token + answer.rpartition(tokenizer.eos_token)[2]
    assert said.endswith(end)
    assert answer.startswith(said.removesuffix(end))
    assert len(said) > len(end)


def test_old_turns_go_first(renderer: Any) -> None:
    conversation = chat("old question", "old answer", "new question", "new answer", system="rules")
    whole = len(one(renderer("chatml"), conversation).input_ids)
    made = renderer("chatml", whole - 1)
    example = one(made, conversation)
    shorter = chat("new question", "new answer", system="rules")
    assert example.input_ids.tolist() == one(made, shorter).input_ids.tolist()
    assert example.truncated


def test_as_few_turns_as_possible_go(renderer: Any) -> None:
    conversation = chat(*[f"turn {number}" for number in range(12)])
    shorter = chat(*[f"turn {number}" for number in range(4, 12)])
    made = renderer("chatml", len(one(renderer("chatml"), shorter).input_ids))
    assert made.tokenizer.decode(one(made, conversation).input_ids).count("turn") == 8


def test_a_long_answer_loses_its_end_and_keeps_its_end_token(renderer: Any) -> None:
    made = renderer("chatml", 60)
    example = one(made, chat("question", "word " * 200))
    text = made.tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\nword word")
    assert text.endswith("<|im_end|>\n")
    assert len(example.input_ids) == 60


def test_a_question_that_fills_the_cutoff_drops_the_row(renderer: Any) -> None:
    assert "no room for an answer" in reason(renderer("chatml", 60), chat("word " * 200, "answer"))


def test_a_tool_call_is_never_cut(renderer: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x" * 300}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    whole = Conversation(messages, [False, True])
    length = len(one(renderer("chatml"), whole).input_ids)
    assert "a tool call would be cut" in reason(renderer("chatml", length - 1), whole)


@pytest.mark.parametrize("within", [False, True])
def test_an_answer_is_not_cut_off_its_reasoning(within: bool) -> None:
    conversation = IN_THE_TEXT if within else thinking()
    length = len(one(Renderer(of_model("qwen3"), 10_000), conversation).input_ids)
    said = reason(Renderer(of_model("qwen3"), length - 1), conversation)
    assert "an answer that is thought about would be cut by data.cutoff_len" in said


def test_the_call_before_an_unlearnt_answer_is_not_cut_either(renderer: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x" * 300}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "wet"},
        {"role": "assistant", "content": "b"},
    ]
    assert "a tool call would be cut" in reason(
        renderer("chatml", 100), Conversation(messages, [False, True, False, False])
    )


def test_overlong_drop_drops(renderer: Any) -> None:
    made = renderer("chatml", 30, overlong=Overlong.drop)
    assert "longer than data.cutoff_len = 30" in reason(made, chat("question", "word " * 200))


def test_labels_of_the_cached_type(renderer: Any) -> None:
    example = one(renderer("chatml"), chat("a", "b"))
    assert (example.input_ids.dtype, example.labels.dtype) == (np.int32, np.int32)
