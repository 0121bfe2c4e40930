"""Text as token ids, and the learnt characters as learnt tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright.errors import DataError
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.special_tokens import special_strings
from tunewright.trainer.data.templating import Span, TemplatedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST_HEADER = 32  # characters between a special token and a span
MOST_HEADERS = 1000


@dataclass(frozen=True)
class Encoded:
    """Token ids (length,) int32, and the [first, end) tokens of each learnt span."""

    ids: np.ndarray
    spans: list[Span]


@dataclass(frozen=True)
class Encoder:
    """How texts become tokens."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, items: list[TemplatedText]) -> Iterator[Encoded | Unusable]:
        """Yield the tokens of each text, or why they cannot be made.

        Raises:
            DataError: the tokenizer does not tell which characters its tokens cover.
        """
        encodings = iter(self._encodings([item.text for item in items if not item.literals]))
        for item in items:
            if item.literals:
                yield self._encode_literally(item)
            elif self.tokenizer.is_fast:
                ids = np.array(next(encodings).ids, np.int32)
                spans = self._spans_by_specials(ids, item)
                yield Encoded(ids, spans) if spans is not None else self._encode_with_offsets(item)
            else:
                encoding = next(encodings)
                spans = [self._slow_tokens_of(encoding, item.text, span) for span in item.spans]
                yield Encoded(np.array(encoding, np.int32), spans)

    def _encodings(self, texts: list[str]) -> Iterable[Any]:
        if not texts:
            return []
        if self.tokenizer.is_fast:  # without offsets, which cost an eighth of the time
            return self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # type: ignore[no-any-return]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def _encode_with_offsets(self, item: TemplatedText) -> Encoded:
        encoding = self.tokenizer.backend_tokenizer.encode(item.text, add_special_tokens=False)
        spans = [_tokens_of(encoding, item.text, span) for span in item.spans]
        return Encoded(np.array(encoding.ids, np.int32), spans)

    def _spans_by_specials(self, ids: np.ndarray, item: TemplatedText) -> list[Span] | None:
        """Find spans without offsets, or return None where that is not certain.

        A tokenizer cuts a text at its special tokens, so these are at the same places in the text and in the ids. From
        the last of them before a span it is a few characters to the span, which have to be a few whole tokens.
        """
        places = [match.span() for match in self._specials.finditer(item.text)]
        tokens = np.flatnonzero(self._is_special[ids])
        if len(places) != len(tokens):
            return None
        spans = []
        for start, end in item.spans:
            first, last = (self._token_by_specials(ids, item.text, at, places, tokens) for at in (start, end))
            if first is None or last is None:
                return None
            spans.append((first, last))
        return spans

    def _token_by_specials(
        self, ids: np.ndarray, text: str, position: int, places: list[Span], tokens: np.ndarray
    ) -> int | None:
        if position == len(text):
            return len(ids)
        before = bisect_right(places, position, key=lambda place: place[1])
        begin, token = (places[before - 1][1], int(tokens[before - 1]) + 1) if before else (0, 0)
        header = text[begin:position]
        if not header:
            return token
        if len(header) > LONGEST_HEADER:
            return None
        known = self._headers.get(header)
        if known is None:
            known = self.tokenizer(header, add_special_tokens=False)["input_ids"]
            if len(self._headers) < MOST_HEADERS:  # without special tokens around turns, users' words are among them
                self._headers[header] = known
        return token + len(known) if ids[token : token + len(known)].tolist() == known else None

    def _slow_tokens_of(self, ids: list[int], text: str, span: Span) -> Span:
        """A tokenizer in Python does not tell which characters a token covers: compare with the ids of the prefix."""
        ends = []
        for position in span:
            prefix = self.tokenizer(text[:position], add_special_tokens=False)["input_ids"]
            if ids[: len(prefix)] != prefix:
                raise DataError(
                    f"The tokenizer of {self.tokenizer.name_or_path} is written in Python and does not tell where its "
                    f"tokens begin, so the answer's tokens cannot be told apart. Use a model that has a tokenizer.json."
                )
            ends.append(len(prefix))
        return ends[0], ends[1]

    def _encode_literally(self, item: TemplatedText) -> Encoded | Unusable:
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
            for start, end in ((begin + start, begin + end) for start, end in offsets):
                learnt.append(
                    any(first < end <= last and _belongs(item.text, start, first) for first, last in item.spans)
                )
        bare = item.text.translate(dict.fromkeys(item.literals))
        if self._pieces(bare) != self.tokenizer(bare, add_special_tokens=False)["input_ids"]:
            return Unusable("a special token's string is in the text, which this tokenizer cannot keep as text")
        return Encoded(np.array(ids, np.int32), _runs(learnt))

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

    @cached_property
    def _headers(self) -> dict[str, list[int]]:
        """Ids of what stands between special tokens and spans: a few texts such as "assistant" and a line's end."""
        return {}

    @cached_property
    def _is_special(self) -> np.ndarray:
        """A flag (ids,) for each id of the vocabulary."""
        special = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        flags = np.zeros(max(len(self.tokenizer), *special, 0) + 1, bool)
        flags[special] = True
        return flags

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return special_strings(self.tokenizer)


def _tokens_of(encoding: Any, text: str, span: Span) -> Span:
    """Return the [first, end) tokens of a span of characters."""
    start, end = span
    first = _token_at(encoding, start, len(text))
    if first < len(encoding) and not _belongs(text, encoding.token_to_chars(first)[0], start):
        first += 1
    # A token that begins before `end` and goes on after it is the one found there, so it stays out.
    return first, _token_at(encoding, end, len(text))


def _belongs(text: str, token_start: int, start: int) -> bool:
    """Tell whether a token that covers character `start` belongs to the span that begins there.

    Where a prompt ends with a space, many tokenizers put that into one token with the answer's first word.
    """
    return token_start >= start or text[token_start:start].isspace()


def _token_at(encoding: Any, position: int, length: int) -> int:
    """Return the first token at or after a character; normalisers may have dropped the character itself."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return len(encoding)


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
