"""Strings of special tokens in what people and models say: they stay text, and never become the tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from tunewright.trainer.data.formats import Conversation
from tunewright.trainer.data.messages import THOUGHT_MARKS, Unusable
from tunewright.trees import map_texts, texts_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for special-token strings in a text while the template works on it: characters of a private-use plane.
STAND_INS = 0xF0000
UNUSABLE_TEXT = re.compile("[\ud800-\udfff\U000f0000-\U0010ffff]")


@dataclass(frozen=True)
class StandIns:
    """Characters in place of special tokens' strings, while the chat template works on a text."""

    tokenizer: PreTrainedTokenizerBase
    special_tokens_in_answers: bool

    def put(self, conversation: Conversation, turns: list[int]) -> tuple[Conversation, dict[int, str], frozenset[str]]:
        """Put stand-ins where a text says what is a special token.

        Returns what the template is given, the stand-ins, and the strings they stand for in the learnt turns.
        """
        simple = not conversation.tools and all(len(message) == 2 for message in conversation.messages)
        if simple and not any(self._specials.search(message["content"]) for message in conversation.messages):
            return conversation, {}, frozenset()
        found: dict[str, int] = {}

        def replaced(value: Any, specials: re.Pattern[str]) -> Any:
            def stand_in(match: re.Match[str]) -> str:
                return chr(found.setdefault(match[0], STAND_INS + len(found)))

            return map_texts(value, partial(specials.sub, stand_in))

        messages = [
            replaced(message, self._specials_of_answers if message["role"] == "assistant" else self._specials)
            for message in conversation.messages
        ]
        given = Conversation(messages, conversation.learnt, replaced(conversation.tools, self._specials))
        learnt = "".join(text for turn in turns for text in texts_in(messages[turn], keys=True))
        kept_as_text = frozenset(text for text, stand_in in found.items() if chr(stand_in) in learnt)
        return given, {stand_in: text for text, stand_in in found.items()}, kept_as_text

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return special_strings(self.tokenizer)

    @cached_property
    def _specials_of_answers(self) -> re.Pattern[str]:
        """Strings that stay text in an answer: with special_tokens_in_answers those that the template writes itself.

        What a template takes for the borders of a thought are such borders, where they are special tokens too.
        """
        template = str(self.tokenizer.chat_template)
        strings = _special_strings(self.tokenizer) - {mark for mark in THOUGHT_MARKS if mark in template}
        if self.special_tokens_in_answers:
            named = {token for token in self.tokenizer.special_tokens_map.values() if isinstance(token, str)}
            strings = {token for token in strings if token in named or token in template}
        return _any_of(strings)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the strings that the tokenizer takes for special tokens, the longest first."""
    return _any_of(_special_strings(tokenizer))


def _special_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")


def check_text(conversation: Conversation) -> None:
    if any(UNUSABLE_TEXT.search(text) for text in texts_in([conversation.messages, conversation.tools], keys=True)):
        raise Unusable("half of a surrogate pair, or a character of the private-use planes, is in the text")
