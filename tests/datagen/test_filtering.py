"""Which rows are kept: ROUGE-L against its definition, the index against comparing everything."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from tunewright.datagen.filtering import Filter, Row, Rules
from tunewright.datagen.rouge import Coder, Index, tokens
from tunewright.errors import ConfigError

SIMILARITIES = st.sampled_from([0.2, 0.35, 0.5, 0.6, 0.7, 0.85, 0.9, 1.0])
WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14)
TEXTS = st.lists(WORDS, max_size=25)


def common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, as the textbook has it."""
    lengths = [0] * (len(other) + 1)
    for left in one:
        before = 0
        for number, right in enumerate(other, 1):
            before, lengths[number] = (
                lengths[number],
                before + 1 if left == right else max(lengths[number], lengths[number - 1]),
            )
    return lengths[-1]


def rouge_l_f1(one: list[str], other: list[str]) -> float:
    """ROUGE-L as Lin (2004) defines it, with beta = 1."""
    shared = common(one, other)
    if not shared:
        return 0.0
    precision, recall = shared / len(one), shared / len(other)
    return 2 * precision * recall / (precision + recall)


def row(instruction: str, given: str = "", output: str = "An answer.", **more: object) -> Row:
    return {"instruction": instruction, "input": given, "output": output, **more}


def verdicts(rows: list[Row], **rules: Any) -> list[str | None]:
    row_filter = Filter(Rules(**rules))
    return [row_filter.take(item) for item in rows]


@given(WORDS, WORDS)
def test_rouge_l_is_what_its_definition_says(one: list[str], other: list[str]) -> None:
    assert math.isclose(Indel.normalized_similarity(one, other), rouge_l_f1(one, other), abs_tol=1e-12)


@settings(deadline=None, max_examples=300)
@given(TEXTS, WORDS, SIMILARITIES)
def test_the_index_finds_exactly_what_comparing_with_everything_finds(
    texts: list[list[str]], asked: list[str], similarity: float
) -> None:
    coder, index = Coder(), Index(similarity)
    for text in texts:
        index.add(coder.encode(text))
    near = [number for number, text in enumerate(texts) if rouge_l_f1(asked, text) >= similarity - 1e-9]
    assert index.near(coder.encode(asked)).tolist() == near


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(0, 60), min_size=20, max_size=60), min_size=2, max_size=12), SIMILARITIES)
def test_the_index_finds_long_texts_whose_changes_are_spread_out(texts: list[list[int]], similarity: float) -> None:
    words = [[str(number) for number in text] for text in texts]
    # Each with every third word changed, which leaves about two thirds in common.
    words += [[word if place % 3 else f"{word}x" for place, word in enumerate(text)] for text in words]
    coder, index = Coder(), Index(similarity)
    for number, text in enumerate(words):
        near = [other for other in range(number) if rouge_l_f1(text, words[other]) >= similarity - 1e-9]
        assert index.near(coder.encode(text)).tolist() == near
        index.add(coder.encode(text))


@settings(deadline=None, max_examples=100)
@given(TEXTS, SIMILARITIES)
def test_what_is_kept_is_what_comparing_with_every_kept_row_keeps(texts: list[list[str]], similarity: float) -> None:
    kept: list[list[str]] = []
    expected: list[str | None] = []
    for text in texts:
        if text in kept:
            expected.append("duplicate")
        elif similarity < 1 and any(rouge_l_f1(text, other) >= similarity - 1e-9 for other in kept):
            expected.append("near-duplicate")
        else:
            kept.append(text)
            expected.append(None)
    assert verdicts([row(" ".join(text)) for text in texts], similarity=similarity) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What's 2+3? A well-known Café", ["what", "s", "2", "+", "3", "a", "well", "known", "café"]),
        ("今天天气怎么样？ok", ["今", "天", "天", "气", "怎", "么", "样", "ok"]),
        ("ひらカタ", ["ひ", "ら", "カ", "タ"]),
        ("안녕 하세요", ["안녕", "하세요"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ＡＢＣ　Ｄ", ["abc", "d"]),
        ("?!", ["?", "!"]),
        ("", [""]),
    ],
)
def test_tokens_are_words_or_characters_where_there_are_no_spaces(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


def test_more_words_than_two_bytes_can_number_stay_apart() -> None:
    coder = Coder()
    codes = coder.encode([str(number) for number in range(70000)])
    assert len(set(codes)) == 70000
    assert not any("\ud800" <= code <= "\udfff" for code in codes)


def test_duplicates_and_near_duplicates_are_refused_and_not_remembered() -> None:
    rows = [
        row("Write a poem about the sea in four lines"),
        row("  write a POEM about the sea in four lines "),
        row("Write a poem about the sea in five lines"),  # 8 of 9 words
        row("Write a long sad poem about the cold sea in exactly five lines"),  # 8 of 9 and of 13
        row("Write a long sad poem about the cold wide sea in exactly five or six lines"),  # 8 of 9 and of 16
        row("用四行写一首关于大海的诗"),
        row("用五行写一首关于大海的诗"),
        row("请解释一下什么是光合作用"),
    ]
    near = "near-duplicate"
    assert verdicts(rows) == [None, "duplicate", near, near, None, None, near, None]
    assert verdicts(rows, similarity=1) == [None, "duplicate", None, None, None, None, None, None]
    assert verdicts(rows, similarity=0.9) == [None, "duplicate", None, None, None, None, near, None]


def test_at_similarity_one_only_equal_prompts_are_refused() -> None:
    rows = [row("Let's eat, grandma!"), row("Let's eat grandma!"), row("Let's eat GRANDMA!")]
    assert verdicts(rows, similarity=1) == [None, None, "duplicate"]
    assert verdicts(rows, similarity=0.99) == [None, "near-duplicate", "near-duplicate"]


def test_the_input_counts_and_a_conversation_is_known_by_its_first_turn() -> None:
    long = "Say in one word whether the customer is content."
    texts = ("The parcel came two weeks late and everything in it was broken into pieces, never again.", "Great!")
    assert verdicts([row(long, text) for text in texts]) == [None, None]
    turns = [[["Which is the highest mountain of Europe?", "Mont Blanc."]], [["Name a river in Asia.", "The Mekong."]]]
    rows = [row("And how high is it?", history=history) for history in turns]
    assert verdicts([*rows, row("Why?", history=turns[0]), row("And how high is it?")]) == [
        None,
        None,
        "duplicate",
        None,
    ]


def test_length_rules_hold_for_every_answer() -> None:
    rules = {"min_output": 3, "max_output": 6}
    rows = [
        row(f"{word} " * 3, output=output)
        for word, output in zip("abcde", ("ab", "abc", " ", "abcdefg", "abcdef "), strict=True)
    ]
    assert verdicts(rows, **rules) == ["too short", None, "empty", "too long", None]
    assert verdicts([row("Go on", output="fine", history=[["x y z", "far too long"]])], **rules) == ["too long"]
    assert verdicts([row(" ", "\n")]) == ["empty"]


@pytest.mark.parametrize(
    ("language", "output", "verdict"),
    [
        ("en", "The sea is deep, and the boat on it is small and old.", None),
        ("en", "Das Meer ist tief, und das Boot darauf ist klein und alt.", "wrong language"),
        ("de", "Das Meer ist tief, und das Boot darauf ist klein und alt.", None),
        ("zh-CN", "大海很深，海上的小船又旧又小，没有人知道它要去哪里，也没有人知道它从哪里来。", None),
        ("zh", "The sea is deep, and the boat on it is small and old.", "wrong language"),
        ("de", "Paris", None),
        ("de", "```python\nfor number in range(10):\n    print(the_number_of_things(number))\n```", None),
        ("de", '{"satz": "Das Meer ist tief, und das Boot darauf ist klein und alt."}', None),
        ("en", '{"satz": "Das Meer ist tief, und das Boot darauf ist klein und alt."}', "wrong language"),
        ("de", "3.14159, 2.71828, 1.41421, 1.61803, 0.57721", None),
        ("nb", "Havet er dypt, og båten som ligger på det er liten og gammel.", None),
    ],
)
def test_answers_are_in_the_language_asked_for(language: str, output: str, verdict: str | None) -> None:
    assert verdicts([row("Describe it.", output=output)], language=language) == [verdict]


def test_a_language_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"language.*en, de or zh"):
        verdicts([], language="englsh")


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, tunewright.datagen.filtering, tunewright.datagen.split, tunewright.datagen.documents; "
    code += "heavy = {'torch', 'py3langid', 'pypdf', 'rapidfuzz'}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(sorted(heavy & sys.modules.keys()))"],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n"
