"""Which rows pass: no duplicates, nothing close to what is there, the right language and length.

Rows are offered in a fixed order, so what is kept follows from the rows alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tunewright.datagen.rouge import Coder, Index, normal, tokens
from tunewright.errors import ConfigError, did_you_mean
from tunewright.trees import texts_in

Row = dict[str, Any]

LEAST_LETTERS = 20  # what is shorter is guessed wrongly too often
MARGIN = 2.3  # natural logarithm of ten: another language must be ten times likelier
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`]*`|https?://\S+", re.DOTALL)
# Written forms that are told apart badly, or that nobody who names the first one wants to lose.
KIN = {
    "ar": {"arz", "ary"},
    "bs": {"hr", "sr"},
    "en": {"pcm"},
    "hr": {"bs", "sr"},
    "id": {"ms"},
    "ms": {"id"},
    "nn": {"no"},
    "no": {"nn"},
    "sr": {"bs", "hr"},
    "zh": {"yue", "wuu"},
}
NO_LANGUAGE = "zxx"


@dataclass(frozen=True)
class Rules:
    """What a row must keep to."""

    similarity: float = 0.7  # ROUGE-L F1 from which prompts are near duplicates; 1: only equal ones are refused
    language: str | None = None  # ISO 639-1 code of the answers, such as en or zh-CN
    min_output: int = 1  # characters of an answer
    max_output: int | None = None


class Filter:
    """Takes rows one after the other and remembers what it took.

    Raises:
        ConfigError: nobody knows the language.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._language = _known_language(rules.language) if rules.language else None
        self._seen: set[tuple[str, str]] = set()
        self._coder = Coder()
        self._index = Index(rules.similarity)

    def take(self, row: Row) -> str | None:
        """Take a row and return None, or return the reason why it is refused."""
        prompt = opening(row)
        answers = [turn[1] for turn in row.get("history") or []] + [row["output"]]
        reason = self._unfit(prompt, answers)
        if reason:
            return reason
        key = normal(prompt[0]), normal(prompt[1])
        if key in self._seen:
            return "duplicate"
        text = self._coder.encode(prompt_tokens(prompt)) if self._rules.similarity < 1 else ""
        if text and len(self._index.near(text)):
            return "near-duplicate"
        if self._language and not is_in(self._language, "\n".join(answers)):
            return "wrong language"
        self._seen.add(key)
        if text:
            self._index.add(text)
        return None

    def _unfit(self, prompt: tuple[str, str], answers: list[str]) -> str | None:
        lengths = [len(answer.strip()) for answer in answers]
        if not "".join(prompt).strip() or not min(lengths):
            return "empty"
        if min(lengths) < self._rules.min_output:
            return "too short"
        if self._rules.max_output is not None and max(lengths) > self._rules.max_output:
            return "too long"
        return None


def opening(row: Row) -> tuple[str, str]:
    """Return what a row is compared by: instruction and input, or the first user turn of a conversation."""
    history = row.get("history")
    return (history[0][0], "") if history else (row["instruction"], row["input"])


def prompt_tokens(prompt: tuple[str, str]) -> list[str]:
    """Return the tokens by which prompts are compared."""
    return tokens("\n".join(prompt))


def is_in(language: str, text: str) -> bool:
    """Tell whether a text can be in a language (as py3langid names it); of code, figures and a few letters all can."""
    import py3langid

    try:  # the marks of JSON would be taken for Latin
        said = json.loads(text) if text.strip()[:1] in ("{", "[") else text
    except (ValueError, RecursionError):
        said = text
    plain = CODE.sub(" ", "\n".join(texts_in(said)))
    if sum(map(str.isalpha, plain)) < LEAST_LETTERS:
        return True
    ranked = py3langid.rank(plain)
    accepted = {language, NO_LANGUAGE, *KIN.get(language, ())}
    return ranked[0][1] - next(score for code, score in ranked if code in accepted) < MARGIN


def _known_language(language: str) -> str:
    import py3langid

    code = re.split(r"[-_]", language.strip().lower())[0]
    code = {"nb": "no"}.get(code, code)
    known = sorted({name for name, _ in py3langid.rank("a")} - {NO_LANGUAGE})
    if code not in known:
        raise ConfigError(
            f"`language` is {language!r}: write the code of a language such as en, de or zh."
            f"{did_you_mean(code, known)} Known are: {', '.join(known)}."
        )
    return code
