"""Conversations as text: what the chat template makes of them, and which characters of it are learnt.

Where an assistant turn begins and ends is the difference between what the template makes of the conversation before it
(with the generation prompt) and through it. A template that writes earlier turns differently once later ones follow
(reasoning models take the thinking out of them) gives one text for each learnt turn instead, each of them what the
model sees when it has to give that answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from tunewright.config.chat_templates import template_names
from tunewright.errors import DataError
from tunewright.trainer.data.formats import Conversation, Plain
from tunewright.trainer.data.messages import REASONING_KEYS, THOUGHT_MARKS, Message, Unusable
from tunewright.trainer.data.special_tokens import StandIns, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables of templates that say whether the model thinks before it answers.
SWITCHES = ("enable_thinking", "thinking")

Span = tuple[int, int]
_Request = tuple[list[Message], list[Any] | None, bool]  # messages, tools, with the generation prompt


@dataclass(frozen=True)
class TemplatedText:
    """A text with the [start, end) characters that are learnt, and what it was made from."""

    text: str
    spans: list[Span]
    source: Conversation | Plain
    literals: dict[int, str] = field(default_factory=dict)  # stand-in -> the string it stands for
    kept_as_text: frozenset[str] = frozenset()  # special tokens' strings in what is learnt


@dataclass(frozen=True)
class _Plan:
    """A conversation on its way to the template: what is given to it, and which of the texts it made are its own."""

    source: Conversation
    given: Conversation  # with stand-ins
    literals: dict[int, str]
    kept_as_text: frozenset[str]
    turns: list[int]  # that are learnt
    texts: slice  # for each of the turns what precedes it and what it ends, then all of it


@dataclass(frozen=True)
class Templater:
    """How conversations become text: a tokenizer's chat template, and the variables it gets."""

    tokenizer: PreTrainedTokenizerBase
    mask_history: bool
    template_kwargs: dict[str, Any]
    special_tokens_in_answers: bool = False

    def texts(self, sources: list[Conversation | Plain]) -> list[list[TemplatedText] | Unusable]:
        """Return for each source its texts (more than one where the template rewrites history), or why it has none.

        Raises:
            DataError: there is a conversation, and the tokenizer has no chat template.
        """
        requests: list[_Request] = []
        plans: list[_Plan | list[TemplatedText] | Unusable] = []
        for source in sources:
            if isinstance(source, Plain):
                plans.append([self._plain_text(source)])
                continue
            try:
                check_text(source)
                turns = self._turns(source)
            except Unusable as reason:
                plans.append(reason)
                continue
            given, literals, kept_as_text = self._stand_ins.put(source, turns)
            first = len(requests)
            requests += _requests(given, turns)
            if turns[-1] != len(given.messages) - 1:
                requests.append((given.messages, given.tools, False))
            plans.append(_Plan(source, given, literals, kept_as_text, turns, slice(first, len(requests))))
        texts = self._templated(requests)
        return [self._with_spans(plan, texts[plan.texts]) if isinstance(plan, _Plan) else plan for plan in plans]

    def _turns(self, conversation: Conversation) -> list[int]:
        """Return the positions of the turns that are learnt."""
        turns = [turn for turn, learnt in enumerate(conversation.learnt) if learnt]
        if self.mask_history:
            turns = [turn for turn in turns if turn == len(conversation.messages) - 1]
        if not turns:
            raise Unusable("no turn is learnt")
        return turns

    def _plain_text(self, source: Plain) -> TemplatedText:
        """Text as it is, begun and ended the way the tokenizer marks the beginning and the end of a text."""
        tokenizer, text = self.tokenizer, source.prompt + source.completion
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else None
        begin = bos if bos and not text.startswith(bos) else ""
        end = "" if text.rstrip().endswith(tokenizer.eos_token) else tokenizer.eos_token
        return TemplatedText(begin + text + end, [(len(begin + source.prompt), len(begin + text + end))], source)

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
                [self._with_reasoning(message) for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.template_kwargs,
            )
        )

    @cached_property
    def _stand_ins(self) -> StandIns:
        return StandIns(self.tokenizer, self.special_tokens_in_answers)

    @cached_property
    def _compiled(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self.tokenizer.get_chat_template())

    @cached_property
    def _variables(self) -> dict[str, Any]:
        known = {"tools": None, "documents": None, **self.tokenizer.special_tokens_map, **self.template_kwargs}
        return {**self._compiled.globals, **known}

    def _with_reasoning(self, message: Message) -> Message:
        """Give a message's reasoning under the names by which the template asks for it."""
        if REASONING_KEYS[0] not in message:
            return message
        rest = {key: value for key, value in message.items() if key != REASONING_KEYS[0]}
        return {**rest, **dict.fromkeys(self._reasoning_names, message[REASONING_KEYS[0]])}

    @cached_property
    def _reasoning_names(self) -> list[str]:
        names = {node.attr for node in self._syntax.find_all(nodes.Getattr)}
        names |= {node.value for node in self._syntax.find_all(nodes.Const) if isinstance(node.value, str)}
        return [name for name in REASONING_KEYS if name in names]

    @cached_property
    def _syntax(self) -> nodes.Template:
        return self._compiled.environment.parse(self.tokenizer.get_chat_template())  # type: ignore[no-any-return]

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """Return what the model is given when it has to answer the last message."""
        _require_template(self.tokenizer)
        return self._apply_library(messages, tools, prompt=True)

    # ---- from texts to spans ----------------------------------------------------------------------------------------

    def _with_spans(self, plan: _Plan, texts: list[str | TemplateError]) -> list[TemplatedText] | Unusable:
        """Find the learnt turns in the text of a conversation, or give one text for each of them."""
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
                    "the chat template writes the answer differently from its generation prompt: "
                    + self._advice(plan.given, plan.turns)
                )
            problem = self._problem(plan.given, turn, before, through)
            if problem:
                return Unusable(f"the chat template {problem}")
            stable = stable and full.startswith(through)
            spans.append((len(before), len(through)))
        if stable:
            return [TemplatedText(full, spans, plan.source, plan.literals, plan.kept_as_text)]
        parts = []
        for number, turn in enumerate(plan.turns):
            learnt = [position == turn for position in range(turn + 1)]
            source = replace(plan.source, messages=plan.source.messages[: turn + 1], learnt=learnt)
            text = str(texts[2 * number + 1])
            parts.append(TemplatedText(text, [spans[number]], source, plan.literals, plan.kept_as_text))
        return parts

    def _problem(self, given: Conversation, turn: int, before: str, through: str) -> str:
        """Return what is wrong with what a turn adds to a text, if anything is.

        The generation prompt may open what the answer goes on with, a thought: then it counts as a part of the turn.
        """
        problem = _problem(through[len(before) :], given.messages[turn])
        if problem or before.rstrip().endswith(THOUGHT_MARKS[0]):
            without_prompt = self._apply((given.messages[:turn], given.tools, False))
            if isinstance(without_prompt, str) and before.startswith(without_prompt):
                problem = _problem(through[len(without_prompt) :], given.messages[turn])
        return problem

    def _advice(self, given: Conversation, turns: list[int]) -> str:
        """Return what to write for a row whose answers do not begin as the generation prompt does: tried out."""
        for advice, templater in self._others:
            texts = templater._templated(_requests(given, turns))
            pairs = zip(texts[::2], texts[1::2], strict=True)
            if all(isinstance(before, str) and str(through).startswith(before) for before, through in pairs):
                return advice
        return "set another model.template"

    @cached_property
    def _others(self) -> list[tuple[str, Templater]]:
        """Templaters with the other values of what in a template says whether the model thinks, and how to get them."""
        others = []
        for name in sorted(find_undeclared_variables(self._syntax).intersection(SWITCHES)):
            rest = {key: value for key, value in self.template_kwargs.items() if key != name}
            if name in self.template_kwargs:
                others.append((f"leave {name} out of model.template_kwargs", replace(self, template_kwargs=rest)))
            for value in (False, True):
                if self.template_kwargs.get(name) != value:
                    advice = f"try model.template_kwargs={{{name}: {str(value).lower()}}}"
                    others.append((advice, replace(self, template_kwargs={**rest, name: value})))
        return others


def _requests(given: Conversation, turns: list[int]) -> list[_Request]:
    """Return two requests for each learnt turn: what precedes it, and what it ends."""
    requests: list[_Request] = []
    for turn in turns:
        requests.append((given.messages[:turn], given.tools, True))
        requests.append((given.messages[: turn + 1], given.tools, False))
    return requests


def _lost(text: str, conversation: Conversation) -> str:
    """Return what of a conversation, answers aside, a template has passed over without a word."""
    for message in conversation.messages:
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            return f"what the {message['role']} says"
    if not all(tool["function"].get("name", "") in text for tool in conversation.tools or ()):
        return "the tools"
    return ""


def _problem(text: str, message: Message) -> str:
    """Return what is wrong with the text of a turn, if it does not say all of its message, or thinks once too often."""
    content, reasoning = message["content"], message.get(REASONING_KEYS[0], "")
    if not _holds(text, reasoning):
        return "leaves out the reasoning of the answer: set another model.template, or write it into the answer"
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    if not _holds(text, content) or not all(name in text for name in calls):
        return "leaves out a part of the answer: set another model.template"
    mark = THOUGHT_MARKS[0]
    if content.lstrip().startswith(mark) and text.count(mark) > content.count(mark) + reasoning.count(mark):
        return f"opens a thought beside the {mark} of the answer: write that one as `{REASONING_KEYS[0]}`"
    return ""


def _holds(text: str, content: str) -> bool:
    """Templates may trim a text: spaces aside, is it there?"""
    return content in text or "".join(content.split()) in "".join(text.split())


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. Choose one with model.template: "
            f"{', '.join(template_names())}, or the path of a .jinja file."
        )
