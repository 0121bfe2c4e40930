"""Conversations as text: what the chat template makes of them, and which characters of it are learnt.

Where an assistant turn begins and ends is the difference between what the template makes of the conversation before it
(with the generation prompt) and through it. A template that writes earlier turns differently once later ones follow
(reasoning models take the thinking out of them) gives one text for each learnt turn instead, each of them what the
model sees when it has to give that answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from launch.errors import DataError
from launch.templates import template_names
from trainer.data.formats import Conversation, Message, Plain, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for special-token strings in a text while the template works on it: characters of a private-use plane.
STAND_INS = 0xF0000
UNUSABLE_TEXT = re.compile("[\ud800-\udfff\U000f0000-\U0010ffff]")

Span = tuple[int, int]
_Request = tuple[list[Message], list[Any] | None, bool]  # messages, tools, with the generation prompt


@dataclass(frozen=True)
class Drawn:
    """A text with the [start, end) characters that are learnt, and what it was made from."""

    text: str
    spans: list[Span]
    source: Conversation | Plain
    literals: dict[int, str] = field(default_factory=dict)  # stand-in -> the string it stands for


@dataclass(frozen=True)
class _Plan:
    """A conversation on its way to the template: what is given to it, and which of the texts it made are its own."""

    source: Conversation
    given: Conversation  # with stand-ins
    literals: dict[int, str]
    turns: list[int]  # that are learnt
    texts: slice  # for each of the turns what precedes it and what it ends, then all of it


@dataclass(frozen=True)
class Drawer:
    """How conversations become text: a tokenizer's chat template, and the variables it gets."""

    tokenizer: PreTrainedTokenizerBase
    mask_history: bool
    template_kwargs: dict[str, Any]

    def draw(self, sources: list[Conversation | Plain]) -> list[list[Drawn] | Unusable]:
        """Return for each source its texts (more than one where the template rewrites history), or why it has none.

        Raises:
            DataError: there is a conversation, and the tokenizer has no chat template.
        """
        requests: list[_Request] = []
        plans: list[_Plan | list[Drawn] | Unusable] = []
        for source in sources:
            if isinstance(source, Plain):
                plans.append([self._draw_plain(source)])
                continue
            try:
                _check_text(source)
                turns = self._turns(source)
            except Unusable as reason:
                plans.append(reason)
                continue
            given, literals = self._without_specials(source)
            last, first = len(given.messages) - 1, len(requests)
            for turn in turns:
                requests.append((given.messages[:turn], given.tools, True))
                requests.append((given.messages[: turn + 1], given.tools, False))
            if turns[-1] != last:
                requests.append((given.messages, given.tools, False))
            plans.append(_Plan(source, given, literals, turns, slice(first, len(requests))))
        texts = self._templated(requests)
        return [_drawn(plan, texts[plan.texts]) if isinstance(plan, _Plan) else plan for plan in plans]

    def _turns(self, conversation: Conversation) -> list[int]:
        """Return the positions of the turns that are learnt."""
        turns = [turn for turn, learnt in enumerate(conversation.learnt) if learnt]
        if self.mask_history:
            turns = [turn for turn in turns if turn == len(conversation.messages) - 1]
        if not turns:
            raise Unusable("no turn is learnt")
        return turns

    def _draw_plain(self, source: Plain) -> Drawn:
        """Text as it is, begun and ended the way the tokenizer marks the beginning and the end of a text."""
        tokenizer, text = self.tokenizer, source.prompt + source.completion
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else None
        begin = bos if bos and not text.startswith(bos) else ""
        end = "" if text.rstrip().endswith(tokenizer.eos_token) else tokenizer.eos_token
        return Drawn(begin + text + end, [(len(begin + source.prompt), len(begin + text + end))], source)

    def _templated(self, requests: list[_Request]) -> list[str | TemplateError]:
        """Return for each request what the template makes of it, or why it refuses."""
        if requests:
            _require_template(self.tokenizer)
        return [self._apply(request) for request in requests]

    def _apply(self, request: _Request) -> str | TemplateError:
        messages, tools, prompt = request
        try:
            if not tools and all(len(message) == 2 for message in messages):
                # What `apply_chat_template` does, without the copies that it makes of every message, and without
                # Jinja's of all its globals: three quarters of the time for messages of a role and a text.
                given = {**self._variables, "messages": messages, "add_generation_prompt": prompt}
                return "".join(self._compiled.root_render_func(self._compiled.new_context(given, shared=True)))
            return self._apply_library(messages, tools, prompt=prompt)
        except TemplateError as error:
            return error
        except TypeError as error:  # a template that adds up text and null, for example
            return TemplateError(str(error))

    def _apply_library(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
            )
        )

    @cached_property
    def _compiled(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self.tokenizer.get_chat_template())

    @cached_property
    def _variables(self) -> dict[str, Any]:
        known = {"tools": None, "documents": None, **self.tokenizer.special_tokens_map, **self.template_kwargs}
        return {**self._compiled.globals, **known}

    def _without_specials(self, conversation: Conversation) -> tuple[Conversation, dict[int, str]]:
        """Put stand-ins where a text says what is a special token, so that it stays text."""
        found: dict[str, int] = {}

        def replaced(value: Any) -> Any:
            if isinstance(value, str):
                return self._specials.sub(lambda match: chr(found.setdefault(match[0], STAND_INS + len(found))), value)
            if isinstance(value, list):
                return [replaced(item) for item in value]
            if isinstance(value, dict):
                return {key: replaced(item) for key, item in value.items()}
            return value

        simple = not conversation.tools and all(len(message) == 2 for message in conversation.messages)
        if simple and not any(self._specials.search(message["content"]) for message in conversation.messages):
            return conversation, {}
        given = Conversation(replaced(conversation.messages), conversation.learnt, replaced(conversation.tools))
        return given, {stand_in: text for text, stand_in in found.items()}

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """Return what the model is given when it has to answer the last message."""
        _require_template(self.tokenizer)
        return self._apply_library(messages, tools, prompt=True)

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return special_strings(self.tokenizer)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the strings that the tokenizer takes for special tokens, the longest first."""
    strings = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    strings = sorted({*strings, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")


def _drawn(plan: _Plan, texts: list[str | TemplateError]) -> list[Drawn] | Unusable:
    """Find the learnt turns in the text of a conversation, or draw one text for each of them."""
    for text in texts:
        if isinstance(text, TemplateError):
            return Unusable(f"the chat template refuses it: {text}")
    full = str(texts[-1])
    lost = _lost(full, plan.given)
    if lost:
        named = " (chatml, llama3 and qwen render tools)" if lost == "the tools" else ""
        return Unusable(f"the chat template leaves out {lost}: set another model.template{named}")
    spans, stable = [], True
    for number, turn in enumerate(plan.turns):
        before, through = str(texts[2 * number]), str(texts[2 * number + 1])
        if not through.startswith(before):
            return Unusable(
                "the chat template writes the answer differently from its generation prompt: try "
                "model.template_kwargs={enable_thinking: false}, or another model.template"
            )
        if not _says(through[len(before) :], plan.given.messages[turn]):
            return Unusable("the chat template leaves out a part of the answer: set another model.template")
        stable = stable and full.startswith(through)
        spans.append((len(before), len(through)))
    if stable:
        return [Drawn(full, spans, plan.source, plan.literals)]
    drawn = []
    for number, turn in enumerate(plan.turns):
        learnt = [position == turn for position in range(turn + 1)]
        part = replace(plan.source, messages=plan.source.messages[: turn + 1], learnt=learnt)
        drawn.append(Drawn(str(texts[2 * number + 1]), [spans[number]], part, plan.literals))
    return drawn


def _lost(text: str, conversation: Conversation) -> str:
    """Return what of a conversation, answers aside, a template has passed over without a word."""
    for message in conversation.messages:
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            return f"what the {message['role']} says"
    if not all(tool["function"].get("name", "") in text for tool in conversation.tools or ()):
        return "the tools"
    return ""


def _says(text: str, message: Message) -> bool:
    """Tell whether the text of a turn holds all of what the message says, and its calls."""
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return _holds(text, message["content"]) and all(name in text for name in calls)


def _holds(text: str, content: str) -> bool:
    """Templates may trim a text: spaces aside, is it there?"""
    return content in text or "".join(content.split()) in "".join(text.split())


def _check_text(conversation: Conversation) -> None:
    for message in conversation.messages:
        if UNUSABLE_TEXT.search(message["content"]):
            raise Unusable("half of a surrogate pair, or a character of the private-use planes, is in the text")


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. Choose one with model.template: "
            f"{', '.join(template_names())}, or the path of a .jinja file."
        )
