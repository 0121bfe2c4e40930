"""Held-out rows: whole clusters, as many as asked for, and never close to a row for training."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from tunewright.datagen.filtering import Row, opening, prompt_tokens
from tunewright.datagen.rouge import normal
from tunewright.datagen.split import CHUNK, Split, split

SHARE, SIMILARITY = 0.1, 0.6
TEXT = st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=8).map(" ".join)
ROWS = st.lists(
    st.builds(lambda instruction, given: {"instruction": instruction, "input": given, "output": "x"}, TEXT, TEXT),
    max_size=20,
)


def rows_of(count: int, seed: int = 0) -> list[Row]:
    """Rows of which every fourth is the one before with a word changed."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for number in range(count):
        words = [f"w{draw.randrange(3000)}" for _ in range(draw.randint(6, 20))]
        if number % 4 == 3:
            words = [*rows[-1]["instruction"].split()[:-1], "changed"]
        rows.append({"instruction": " ".join(words), "input": "", "output": str(number)})
    return rows


def similarity(one: Row, other: Row) -> float:
    return Indel.normalized_similarity(prompt_tokens(opening(one)), prompt_tokens(opening(other)))


@settings(deadline=None, max_examples=100)
@given(ROWS, st.integers(0, 3), st.sampled_from([0.3, 0.6, 0.8, 1.0]), st.sampled_from([0.0, 0.1, 0.3, 0.5]))
def test_clusters_never_straddle(rows: list[Row], seed: int, threshold: float, share: float) -> None:
    parts = split(rows, share, seed, threshold)
    assert sorted(parts.train + parts.test) == list(range(len(rows)))
    assert (parts.train, parts.test) == (sorted(parts.train), sorted(parts.test))
    pairs = {(left, right): similarity(rows[left], rows[right]) for left in parts.train for right in parts.test}
    instructions = [normal(row["instruction"]) for row in rows]
    assert not {instructions[left] for left in parts.train} & {instructions[right] for right in parts.test}
    if parts.pair is None:
        assert not parts.test
        assert parts.highest == 0
    else:
        assert parts.highest == max(pairs.values()) == pairs[parts.pair]
        assert parts.highest < threshold
        assert parts.train


@settings(deadline=None, max_examples=60)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_and_of_their_keys_does_not_matter(rows: list[Row], draw: random.Random) -> None:
    def held(items: list[Row]) -> list[str]:
        return sorted(str(opening(items[number])) for number in split(items, 0.3, 1, SIMILARITY).test)

    before = held(rows)
    shuffled = [dict(reversed(row.items())) for row in rows]
    draw.shuffle(shuffled)
    assert held(shuffled) == before


def test_a_tenth_is_held_out_under_a_seed() -> None:
    rows = rows_of(400)
    parts = split(rows, SHARE, 1, SIMILARITY)
    assert len(parts.test) == 40
    assert split(rows, SHARE, 1, SIMILARITY) == parts
    others = split(rows, SHARE, 2, SIMILARITY).test
    assert len(others) == 40
    assert len(set(others) & set(parts.test)) < 20


def test_new_rows_move_few_of_the_others() -> None:
    rows = rows_of(440)
    before, after = (set(split(some, SHARE, 1, SIMILARITY).test) for some in (rows[:400], rows))
    assert len(before - after) <= 10  # of 40; drawing anew would move about 36


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_most_alike_pair_is_found_among_many_chunks(seed: int) -> None:
    rows = rows_of(320, seed)
    parts = split(rows, 0.5, seed, 0.9)
    assert len(parts.test) > 2 * CHUNK
    prompts = [prompt_tokens(opening(row)) for row in rows]
    pairs = {
        (left, right): Indel.normalized_similarity(prompts[left], prompts[right])
        for left in parts.train
        for right in parts.test
    }
    assert parts.pair is not None
    assert parts.highest == max(pairs.values()) == pairs[parts.pair]


def row(instruction: str, given: str = "", **more: object) -> Row:
    return {"instruction": instruction, "input": given, "output": "x", **more}


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        ([], 0),
        ([row("one")], 0),
        ([row("one two"), row("three four")], 1),
        ([row("Classify this.", f"text {number}") for number in range(30)], 0),  # one cluster is everything
        ([row("Classify.", f"{number}") for number in range(30)] + [row("x y", str(n)) for n in range(5)], 5),
        ([row(f"Say the word {word}.", history=[["Hello!", "Hi."]]) for word in "abcd"], 0),
        ([row("And why?", history=[[f"{word} {word}", "Hi."]]) for word in "abcd"], 1),
    ],
    ids=["none", "one", "two", "one-cluster", "no-cluster-fits", "one-opening", "openings"],
)
def test_small_and_unequal_sets(rows: list[Row], held: int) -> None:
    parts = split(rows, SHARE, 42, SIMILARITY)
    assert len(parts.test) == held
    assert len(parts.train) == len(rows) - held


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    # Neighbours share five of six words, the ends share none.
    words = [f"word{number}" for number in range(30)]
    chain = [row(" ".join(words[start : start + 6])) for start in range(24)]
    alone = row("something else altogether")
    assert split([*chain, alone], 0.5, 1, 0.8).test == [24]


@pytest.mark.parametrize(("share", "threshold"), [(1.0, 0.5), (-0.1, 0.5), (0.1, 0), (0.1, 1.5)])
def test_numbers_out_of_range_are_refused(share: float, threshold: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        split([row("a b"), row("c d")], share, 1, threshold)


def test_the_result_is_plain_data() -> None:
    parts = split(rows_of(40), SHARE, 1, SIMILARITY)
    assert isinstance(parts, Split)
    assert {type(number) for number in [*parts.train, *parts.test, *(parts.pair or ())]} == {int}
    assert type(parts.highest) is float
