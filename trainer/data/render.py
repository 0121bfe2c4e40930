"""The one renderer: conversation -> token ids and labels, through the tokenizer's own chat template.

A token carries a label when the model has to produce it itself: everything of an assistant turn after the generation
prompt, its end-of-turn token included. `templating` makes text of a conversation and `encode` tokens of the text; here
the tokens get their labels, and rows that are too long are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from tunewright.config.schema import Overlong
from tunewright.plan.method_rules import longest_row
from tunewright.trainer.data.encode import Encoded, Encoder
from tunewright.trainer.data.formats import Conversation, Plain
from tunewright.trainer.data.messages import THOUGHT_MARKS, Message, Unusable
from tunewright.trainer.data.templating import TemplatedText, Templater
from tunewright.trainer.model.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy skips
LEAST_ANSWER = 8  # tokens: a row that has room for fewer of its answer is dropped


@dataclass(frozen=True)
class Example:
    """Token ids (length,) and labels (length,) of one example, both int32."""

    input_ids: np.ndarray
    labels: np.ndarray
    scored: int  # tokens with a label, the first token aside
    truncated: bool
    ended: bool  # a token that stops generation is learnt at the end of the last learnt turn
    kept_as_text: frozenset[str] = frozenset()  # special tokens' strings in what is learnt


@dataclass(frozen=True)
class Renderer:
    """How conversations become examples: a tokenizer and the settings that matter."""

    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int  # tokens; data.cutoff_len less the method's virtual tokens
    overlong: Overlong = Overlong.truncate
    train_on_prompt: bool = False
    mask_history: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    special_tokens_in_answers: bool = False

    @classmethod
    def of(cls, config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        data = config.data
        return cls(
            tokenizer,
            longest_row(config),
            data.overlong,
            data.train_on_prompt,
            data.mask_history,
            dict(config.model.template_kwargs or {}),
            data.special_tokens_in_answers,
        )

    def render(self, sources: list[Conversation | Plain]) -> list[list[Example] | Unusable]:
        """Return for each source its examples (more than one where the template rewrites history), or why it has none.

        Raises:
            DataError: there is a conversation, and the tokenizer has no chat template.
        """
        texts = self._templater.texts(sources)
        whole = [item for items in texts if not isinstance(items, Unusable) for item in items]
        encoded = iter(self._encoder.encode(whole))
        results: list[list[Example] | Unusable] = []
        for items in texts:
            if isinstance(items, Unusable):
                results.append(items)
                continue
            examples = [self._finish(item, next(encoded)) for item in items]
            kept = [example for example in examples if not isinstance(example, Unusable)]
            reasons = [example for example in examples if isinstance(example, Unusable)]
            results.append(kept or reasons[0])
        return results

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """Return what the model is given when it has to answer the last message."""
        return self._templater.prompt(messages, tools)

    @cached_property
    def _templater(self) -> Templater:
        return Templater(self.tokenizer, self.mask_history, self.template_kwargs, self.special_tokens_in_answers)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _stop_ids(self) -> set[int]:
        return stop_ids(self.tokenizer)

    def _finish(self, item: TemplatedText, encoded: Encoded | Unusable) -> Example | Unusable:
        if isinstance(encoded, Unusable):
            return encoded
        try:
            long = len(encoded.ids) > self.cutoff_len
            example = self._shortened(item, encoded) if long else self._labelled(encoded)
        except Unusable as reason:
            return reason
        return replace(example, kept_as_text=item.kept_as_text) if item.kept_as_text else example

    def _labelled(self, encoded: Encoded, *, truncated: bool = False) -> Example:
        ids, spans = encoded.ids, encoded.spans
        learnt = [(0, len(ids))] if self.train_on_prompt else spans
        scored = sum(end - max(first, 1) for first, end in learnt)  # the first token is predicted from nothing
        if scored <= 0:
            raise Unusable("no token to learn")
        labels = np.full(len(ids), IGNORED, np.int32)
        for first, end in learnt:
            labels[first:end] = ids[first:end]
        first, end = spans[-1] if spans else (0, 0)
        ended = not self._stop_ids.isdisjoint(ids[max(first, end - 4) : end].tolist())
        return Example(ids, labels, scored, truncated, ended)

    def _shortened(self, item: TemplatedText, encoded: Encoded) -> Example:
        """Shorten a row to `cutoff_len`: its oldest exchanges go first, then the end of its last answer.

        What stays in any case: the system message, the last user turn, the assistant's header, the answer's start and
        its end-of-turn token.
        """
        if self.overlong is Overlong.drop:
            raise Unusable(f"longer than data.cutoff_len = {self.cutoff_len} tokens")
        if isinstance(item.source, Plain):
            return self._cut_answer(encoded)
        conversation = item.source
        users = [turn for turn, message in enumerate(conversation.messages) if message["role"] == "user"]
        # The fewest exchanges dropped: the length falls with each of them, so halve the range.
        low, high = 1, len(users) - 1
        fitting = None
        while low <= high:
            middle = (low + high) // 2
            shorter = self._retemplated(_since(conversation, users[middle]))
            if shorter and len(shorter.ids) <= self.cutoff_len:
                fitting, high = shorter, middle - 1
            else:
                low = middle + 1
        if fitting:
            return self._labelled(fitting, truncated=True)
        conversation = _since(conversation, users[-1])
        last = self._retemplated(conversation)
        if last is None:
            raise Unusable("no turn is learnt once the row is cut to data.cutoff_len")
        learnt = max(turn for turn, flag in enumerate(conversation.learnt) if flag)
        message = conversation.messages[learnt]
        if message.get("tool_calls"):
            raise Unusable("a tool call would be cut by data.cutoff_len")
        if message.get("reasoning_content") or THOUGHT_MARKS[1] in message["content"]:
            raise Unusable("an answer that is thought about would be cut by data.cutoff_len, from its end")
        return self._cut_answer(last)

    def _retemplated(self, conversation: Conversation) -> Encoded | None:
        """Return a shorter conversation's tokens, or None when nothing of it is learnt."""
        texts = self._templater.texts([conversation])[0]
        if isinstance(texts, Unusable):
            return None
        encoded = next(iter(self._encoder.encode(texts[-1:])))
        return None if isinstance(encoded, Unusable) else encoded

    def _cut_answer(self, encoded: Encoded) -> Example:
        ids, spans = encoded.ids, encoded.spans
        first, end = spans[-1]
        stops = [index for index in range(first, end) if int(ids[index]) in self._stop_ids]
        tail = ids[stops[-1] : end] if stops else ids[end:end]
        room = self.cutoff_len - first - len(tail)
        if room < LEAST_ANSWER:
            raise Unusable(f"the question leaves no room for an answer in data.cutoff_len = {self.cutoff_len}")
        cut = np.concatenate([ids[: first + room], tail])
        return self._labelled(Encoded(cut, [*spans[:-1], (first, len(cut))]), truncated=True)


def _since(conversation: Conversation, turn: int) -> Conversation:
    """Return the conversation from a turn on, with its system message."""
    system = 1 if conversation.messages[0]["role"] == "system" else 0
    keep = [*range(system), *range(turn, len(conversation.messages))]
    return replace(
        conversation,
        messages=[conversation.messages[index] for index in keep],
        learnt=[conversation.learnt[index] for index in keep],
    )
