"""ROUGE-L between prompts, and an index that finds every earlier prompt that is near without comparing with all.

ROUGE-L F1 of texts with m and n tokens is 2 L / (m + n), where L is the length of their longest common subsequence.
F1 >= t therefore asks for L >= t (m + n) / 2, and L is at most the number of tokens that both hold, in any order. So
a near text shares at least one of any m - t m / (2 - t) + 1 tokens of a text; the index looks up the rarest ones only,
counts what is shared, and compares the few texts that are left. Nothing is estimated and nothing is missed.
"""

from __future__ import annotations

import re
import unicodedata
from array import array

import numpy as np

# Scripts that are written without spaces: a character is a token. Kana, Han, Thai, Lao, Tibetan, Burmese, Khmer.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs and accents are no letters to `re`, and must not cut a word.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
# Symbols count, since 2 + 3 is not 2 * 3; punctuation does not.
TOKEN = re.compile(
    rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[\w{MARKS}])+|[^\w\s.,;:!?'\"()\[\]{{}}`‘’“”«»…、。，！？；：「」『』—–-]"
)
EXTRA = 4  # tokens looked up beyond those that cannot be missed, so that fewer texts are left to compare
SURROGATES = 0xD800, 0x800
LAST = 0x10FFFF - 0x800


def normal(text: str) -> str:
    """Return a text without differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokens(text: str) -> list[str]:
    """Return the words of a text, or its characters in scripts without spaces; never an empty list."""
    plain = normal(text)
    return TOKEN.findall(plain) or list(plain) or [""]


class Coder:
    """Tokens as characters, so that a text of tokens is a string, which rapidfuzz compares without a conversion."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, words: list[str]) -> str:
        return "".join(self._code(word) for word in words)

    def _code(self, word: str) -> str:
        # More than a million different tokens share the last code, which can only make texts look more alike.
        number = min(self._numbers.setdefault(word, len(self._numbers)), LAST)
        start, width = SURROGATES
        return chr(number if number < start else number + width)


class Index:
    """Texts of tokens in the order in which they were added, and which of them are near a given one.

    Raises:
        ValueError: a similarity that is not above 0 and at most 1.
    """

    def __init__(self, similarity: float) -> None:
        if not 0 < similarity <= 1:
            raise ValueError(f"similarity is {similarity}, and must be above 0 and at most 1")
        self._similarity = similarity
        self._texts: list[str] = []
        self._lengths = array("q")
        # Token and how often it came before in the text -> texts; so that sharing a token twice counts twice.
        self._holders: dict[int, array[int]] = {}

    def add(self, text: str) -> None:
        """Add an encoded text."""
        number = len(self._texts)
        self._texts.append(text)
        self._lengths.append(len(text))
        for element in _elements(text):
            holders = self._holders.get(element)
            if holders is None:
                self._holders[element] = holders = array("i")
            holders.append(number)

    def near(self, text: str) -> np.ndarray:
        """Return the numbers of all added texts whose ROUGE-L F1 with an encoded text is at least the similarity."""
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import cdist

        size = len(text)
        least = int(np.ceil(size * self._similarity / (2 - self._similarity) - 1e-9))
        probed = min(size, size - least + 1 + EXTRA)
        found = (self._holders.get(element) for element in _elements(text))
        rarest = sorted((holders or array("i") for holders in found), key=len)[:probed]
        if not any(rarest):
            return np.zeros(0, np.int64)
        shared = np.bincount(np.concatenate([np.frombuffer(holders, np.int32) for holders in rarest if holders]))
        candidates = np.flatnonzero(shared)
        lengths = np.frombuffer(self._lengths, np.int64)[candidates]
        needed = np.ceil(self._similarity * (size + lengths) / 2 - 1e-9)
        possible = (shared[candidates] + (size - probed) >= needed) & (lengths >= needed)
        candidates, needed = candidates[possible], needed[possible]
        if not len(candidates):
            return np.zeros(0, np.int64)
        texts = [self._texts[number] for number in candidates]
        common = cdist([text], texts, scorer=LCSseq.similarity, score_cutoff=int(needed.min()), dtype=np.int32)[0]
        return candidates[common >= needed]


def _elements(text: str) -> list[int]:
    times: dict[str, int] = {}
    elements = []
    for character in text:
        before = times.get(character, 0)
        times[character] = before + 1
        elements.append(ord(character) | before << 21)
    return elements
