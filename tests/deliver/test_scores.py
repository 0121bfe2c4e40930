"""Intervals of shares, held against published values."""

from __future__ import annotations

import pytest

from tunewright.deliver.scores import told_apart, wilson


@pytest.mark.parametrize(
    ("right", "rows", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_is_the_published_one(right: int, rows: int, expected: tuple[float, float]) -> None:
    assert wilson(right, rows) == pytest.approx(expected, abs=5e-5)


def test_an_interval_ends_at_none_and_at_all() -> None:
    assert wilson(0, 80)[0] == 0
    assert wilson(80, 80)[1] == 1


def test_an_interval_of_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows"):
        wilson(0, 0)


@pytest.mark.parametrize(
    ("first_alone", "second_alone", "apart"),
    [
        (0, 0, False),
        (5, 0, False),  # 2 / 2^5 = 0.0625
        (6, 0, True),  # 2 / 2^6 = 0.03125
        (7, 4, False),
        (1, 9, True),  # 2 * 11 / 2^10 = 0.0215
        (2, 9, False),  # 2 * 67 / 2^11 = 0.0654
    ],
)
def test_two_models_are_told_apart_by_the_rows_they_answer_differently(
    first_alone: int, second_alone: int, apart: bool
) -> None:
    pairs = [(True, False)] * first_alone + [(False, True)] * second_alone + [(True, True)] * 100
    assert told_apart(pairs) is apart
