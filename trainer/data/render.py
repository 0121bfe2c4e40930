"""The one renderer: conversation -> token ids and labels, through the tokenizer's own chat template.

A token carries a label when the model has to produce it itself: everything of an assistant turn after the generation
prompt, its end-of-turn token included. Where a turn begins and ends is the difference between what the template makes
of the conversation before it and through it. A template that writes earlier turns differently once later ones follow
(reasoning models take the thinking out of them) gives one example for each learnt turn instead, each of them what the
model sees when it has to give that answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from launch.errors import DataError
from launch.schema import DataConfig, ModelConfig, Overlong
from launch.templates import template_names
from trainer.data.formats import Conversation, Message, Plain, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy skips
LEAST_ANSWER = 8  # tokens: a row that has room for fewer of its answer is dropped
# Stand for special-token strings in a text while the template works on it: characters of a private-use plane.
STAND_INS = 0xF0000
UNUSABLE_TEXT = re.compile("[\ud800-\udfff\U000f0000-\U0010ffff]")

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids (length,) and labels (length,) of one example, both int32."""

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool = False
    ended: bool = True  # a token that stops generation is learnt at the end of the last learnt turn


@dataclass(frozen=True)
class _Drawn:
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
class Renderer:
    """How conversations become examples: a tokenizer and the settings that matter."""

    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int
    overlong: Overlong = Overlong.truncate
    train_on_prompt: bool = False
    mask_history: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        return cls(
            tokenizer,
            data.cutoff_len,
            data.overlong,
            data.train_on_prompt,
            data.mask_history,
            dict(model.template_kwargs or {}),
        )

    def render(self, sources: list[Conversation | Plain]) -> list[list[Example] | Unusable]:
        """Return for each source its examples (more than one where the template rewrites history), or why it has none.

        Raises:
            DataError: there is a conversation, and the tokenizer has no chat template.
        """
        drawn = self._draw(sources)
        whole = [item for items in drawn if not isinstance(items, Unusable) for item in items]
        encoded = iter(self._encode(whole))
        results: list[list[Example] | Unusable] = []
        for items in drawn:
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
        _require_template(self.tokenizer)
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        )

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        strings = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        strings = sorted({*strings, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    @cached_property
    def _stop_ids(self) -> set[int]:
        return {self.tokenizer.eos_token_id}

    # ---- text -----------------------------------------------------------------------------------------------------

    def _draw(self, sources: list[Conversation | Plain]) -> list[list[_Drawn] | Unusable]:
        requests: list[tuple[list[Message], Any, bool]] = []
        plans: list[_Plan | list[_Drawn] | Unusable] = []
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

    def _draw_plain(self, source: Plain) -> _Drawn:
        """Text as it is, begun and ended the way the tokenizer marks the beginning and the end of a text."""
        tokenizer, text = self.tokenizer, source.prompt + source.completion
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else None
        begin = bos if bos and not text.startswith(bos) else ""
        end = "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
        # A space between the two is in one token with the completion's first word.
        return _Drawn(begin + text + end, [(len(begin + source.prompt.rstrip()), len(begin + text + end))], source)

    def _templated(self, requests: list[tuple[list[Message], Any, bool]]) -> list[str | TemplateError]:
        """Render many (messages, tools, generation prompt?), those without tools in one call."""
        texts: list[str | TemplateError] = [""] * len(requests)
        if requests:
            _require_template(self.tokenizer)
        for prompt in (False, True):
            simple = [index for index, (_, tools, wants) in enumerate(requests) if wants is prompt and not tools]
            try:
                made = self._apply([requests[index][0] for index in simple], None, prompt) if simple else []
                for index, text in zip(simple, made, strict=True):
                    texts[index] = text
            except (TemplateError, TypeError):  # one of them: find out which
                for index in simple:
                    texts[index] = self._apply_one(*requests[index])
        for index, request in enumerate(requests):
            if request[1]:
                texts[index] = self._apply_one(*request)
        return texts

    def _apply(self, conversations: list[list[Message]], tools: Any, prompt: bool) -> list[str]:
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            conversations, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
        )

    def _apply_one(self, messages: list[Message], tools: Any, prompt: bool) -> str | TemplateError:
        try:
            return self._apply([messages], tools, prompt)[0]
        except TemplateError as error:
            return error
        except TypeError as error:  # a template that adds up text and null, for example
            return TemplateError(str(error))

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

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def _encode(self, items: list[_Drawn]) -> Iterator[tuple[np.ndarray, list[Span]]]:
        """Yield for each item its ids (length,) and the [first, end) tokens of each span."""
        plain = [item.text for item in items if not item.literals]
        encodings = iter(self._encodings(plain))
        for item in items:
            if item.literals:
                yield self._encode_literally(item)
                continue
            encoding = next(encodings)
            if self.tokenizer.is_fast:
                yield np.array(encoding.ids, np.int32), [_tokens_of(encoding, item.text, span) for span in item.spans]
            else:
                yield (
                    np.array(encoding, np.int32),
                    [self._slow_tokens_of(encoding, item.text, span) for span in item.spans],
                )

    def _encodings(self, texts: list[str]) -> Iterable[Any]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)  # type: ignore[no-any-return]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def _slow_tokens_of(self, ids: list[int], text: str, span: Span) -> Span:
        """A tokenizer in Python does not tell which characters a token covers: compare with the ids of the prefix."""
        ends = []
        for position in span:
            prefix = self.tokenizer(text[:position], add_special_tokens=False)["input_ids"]
            if ids[: len(prefix)] != prefix:
                raise DataError(
                    f"The tokenizer of {self.tokenizer.name_or_path} is written in Python and does not tell where its "
                    f"tokens "
                    f"begin, so the answer's tokens cannot be told apart. Use a model that has a tokenizer.json."
                )
            ends.append(len(prefix))
        return ends[0], ends[1]

    def _encode_literally(self, item: _Drawn) -> tuple[np.ndarray, list[Span]]:
        """Encode a text in which stand-ins become their strings without becoming special tokens.

        The tokenizer itself splits a text at its special tokens and encodes what is between them one by one; so it is
        done here, except that only the template's special tokens count.
        """
        ids: list[int] = []
        learnt: list[bool] = []
        position = 0
        parts = re.split(f"({self._specials.pattern})", item.text)
        for index, part in enumerate(parts):
            begin, position = position, position + len(part)
            if not part:
                continue
            if index % 2:
                new = [self.tokenizer.convert_tokens_to_ids(part)]
                offsets = [(0, len(part))]
            else:
                encoding = self.tokenizer(
                    part.translate(item.literals),
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                )
                new, offsets = encoding["input_ids"], _shrunk(encoding["offset_mapping"], part, item.literals)
            ids += new
            for start, end in offsets:
                learnt.append(any(first <= begin + start and begin + end <= last for first, last in item.spans))
        bare = item.text.translate(dict.fromkeys(item.literals))
        if self._pieces(bare) != self.tokenizer(bare, add_special_tokens=False)["input_ids"]:
            raise Unusable("a special token's string is in the text, which this tokenizer cannot keep as text")
        return np.array(ids, np.int32), _runs(learnt)

    def _pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(re.split(f"({self._specials.pattern})", text)):
            if part:
                ids += (
                    [self.tokenizer.convert_tokens_to_ids(part)]
                    if index % 2
                    else self.tokenizer(part, add_special_tokens=False)["input_ids"]
                )
        return ids

    # ---- examples -------------------------------------------------------------------------------------------------

    def _finish(self, item: _Drawn, encoded: tuple[np.ndarray, list[Span]]) -> Example | Unusable:
        ids, spans = encoded
        if len(ids) > self.cutoff_len:
            try:
                return self._shortened(item, ids, spans)
            except Unusable as reason:
                return reason
        return self._labelled(ids, spans)

    def _labelled(self, ids: np.ndarray, spans: list[Span], truncated: bool = False) -> Example | Unusable:
        labels = np.full_like(ids, IGNORED)
        for first, end in [(0, len(ids))] if self.train_on_prompt else spans:
            labels[first:end] = ids[first:end]
        if (labels[1:] == IGNORED).all():  # the first token is predicted from nothing
            return Unusable("no token to learn")
        ended = bool(spans) and any(int(token) in self._stop_ids for token in ids[spans[-1][0] : spans[-1][1]][-4:])
        return Example(ids, labels, truncated, ended)

    def _shortened(self, item: _Drawn, ids: np.ndarray, spans: list[Span]) -> Example | Unusable:
        """Shorten a row to `cutoff_len`: its oldest exchanges go first, then the end of its last answer.

        What stays in any case: the system message, the last user turn, the assistant's header, the answer's start and
        its end-of-turn token.
        """
        if self.overlong is Overlong.drop:
            raise Unusable(f"longer than data.cutoff_len = {self.cutoff_len} tokens")
        if isinstance(item.source, Conversation):
            users = [turn for turn, message in enumerate(item.source.messages) if message["role"] == "user"]
            # The fewest exchanges dropped: the length falls with each of them, so halve the range.
            low, high = 1, len(users) - 1
            fitting = None
            while low <= high:
                middle = (low + high) // 2
                shorter = self._redrawn(_since(item.source, users[middle]))
                if shorter is not None and len(shorter[0]) <= self.cutoff_len:
                    fitting, high = shorter, middle - 1
                else:
                    low = middle + 1
            if fitting is not None:
                return self._labelled(*fitting, truncated=True)
            if len(users) > 1:
                last = self._redrawn(_since(item.source, users[-1]))
                if last is None:
                    raise Unusable("no turn is learnt once it is cut to data.cutoff_len")
                ids, spans = last
            if item.source.messages[-1].get("tool_calls"):
                raise Unusable("a tool call would be cut by data.cutoff_len")
        return self._cut_answer(ids, spans)

    def _redrawn(self, conversation: Conversation) -> tuple[np.ndarray, list[Span]] | None:
        drawn = self._draw([conversation])[0]
        if isinstance(drawn, Unusable):
            return None
        return next(iter(self._encode(drawn[-1:])))

    def _cut_answer(self, ids: np.ndarray, spans: list[Span]) -> Example | Unusable:
        first, end = spans[-1]
        stops = [index for index in range(first, end) if int(ids[index]) in self._stop_ids]
        tail = ids[stops[-1] : end] if stops else ids[end:end]
        room = self.cutoff_len - first - len(tail)
        if room < LEAST_ANSWER:
            raise Unusable(f"the question leaves no room for an answer in data.cutoff_len = {self.cutoff_len}")
        cut = np.concatenate([ids[: first + room], tail])
        return self._labelled(cut, [*spans[:-1], (first, len(cut))], truncated=True)


def _drawn(plan: _Plan, texts: list[str | TemplateError]) -> list[_Drawn] | Unusable:
    """Find the learnt turns in the text of a conversation, or draw one text for each of them."""
    for text in texts:
        if isinstance(text, TemplateError):
            return Unusable(f"the chat template refuses it: {text}")
    full = str(texts[-1])
    spans, stable = [], True
    for number, turn in enumerate(plan.turns):
        before, through = str(texts[2 * number]), str(texts[2 * number + 1])
        if not through.startswith(before):
            return Unusable(
                "the chat template writes the answer differently from its generation prompt; see model.template"
            )
        if not _says(through[len(before) :], plan.given.messages[turn]):
            return Unusable("the chat template leaves out a part of the answer; see model.template")
        stable = stable and full.startswith(through)
        spans.append((len(before), len(through)))
    if stable:
        return [_Drawn(full, spans, plan.source, plan.literals)]
    drawn = []
    for number, turn in enumerate(plan.turns):
        learnt = [position == turn for position in range(turn + 1)]
        part = replace(plan.source, messages=plan.source.messages[: turn + 1], learnt=learnt)
        drawn.append(_Drawn(str(texts[2 * number + 1]), [spans[number]], part, plan.literals))
    return drawn


def _says(text: str, message: Message) -> bool:
    """Tell whether the text of a turn holds all of what the message says, spaces aside."""
    content = message["content"]
    return content in text or "".join(content.split()) in "".join(text.split())


def _check_text(conversation: Conversation) -> None:
    for message in conversation.messages:
        if UNUSABLE_TEXT.search(message["content"]):
            raise Unusable("half of a surrogate pair, or a character of the private-use planes, is in the text")


def _since(conversation: Conversation, turn: int) -> Conversation:
    """Return the conversation from a turn on, with its system message."""
    system = 1 if conversation.messages[0]["role"] == "system" else 0
    keep = [*range(system), *range(turn, len(conversation.messages))]
    return replace(
        conversation,
        messages=[conversation.messages[index] for index in keep],
        learnt=[conversation.learnt[index] for index in keep],
    )


def _tokens_of(encoding: Any, text: str, span: Span) -> Span:
    """Return the [first, end) tokens that lie in a span of characters as a whole."""
    start, end = span
    first = _token_at(encoding, start, len(text))
    if first < len(encoding.ids) and encoding.token_to_chars(first)[0] < start:
        first += 1
    # A token that begins before `end` and goes on after it is the one found there, so it stays out.
    return first, _token_at(encoding, end, len(text))


def _token_at(encoding: Any, position: int, length: int) -> int:
    """Return the first token at or after a character; normalisers may have dropped the character itself."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _shrunk(offsets: list[Span], part: str, literals: dict[int, str]) -> list[Span]:
    """Map offsets in a text with strings back to the text with one character in place of each."""
    where: list[int] = []
    for index, character in enumerate(part):
        where += [index] * len(literals.get(ord(character), "x"))
    where.append(len(part))
    return [(where[start], where[end - 1] + 1 if end > start else where[start]) for start, end in offsets]


def _runs(flags: list[bool]) -> list[Span]:
    """Return the [first, end) runs of true flags."""
    edges = np.flatnonzero(np.diff(np.array([False, *flags, False], np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. Choose one with model.template: "
            f"{', '.join(template_names())}, or the path of a .jinja file."
        )
