"""Sampling, splitting and mixing: the same under a seed, each row where it belongs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, DataError
from tunewright.trainer.data.sampling import Part, held_out_rows, mixture, training_examples


def settings(*overrides: str, names: str = "[a,b]") -> Any:
    return compose_config([f"data.names={names}", "data.eval_names=[]", *overrides]).data


def part(name: str, rows: int, num_samples: int | None = None) -> Part:
    return Part(name, np.arange(rows), rows, num_samples)


def rows_of(parts: list[Part], data: Any, seed: int = 1) -> list[list[int]]:
    return [one.rows[chosen].tolist() for one, chosen in zip(parts, training_examples(parts, data, seed), strict=True)]


@pytest.mark.parametrize(("size", "count"), [("0.25", 10), ("4", 4), ("1", 1), ("0", 0)])
def test_a_split_is_a_share_or_a_count_and_holds_each_row_once(size: str, count: int) -> None:
    data, parts = settings(f"data.eval_size={size}"), [part("a", 30), part("b", 10)]
    held = [set(np.flatnonzero(mask).tolist()) for mask in held_out_rows([30, 10], data, 1)]
    trained = rows_of(parts, data)
    assert sum(map(len, held)) == count
    for out, kept, size_of in zip(held, trained, (30, 10), strict=True):
        assert sorted([*out, *kept]) == list(range(size_of))


def test_a_split_is_the_same_under_a_seed_and_another_under_another() -> None:
    data = settings("data.eval_size=0.5")
    first, again, other = (np.concatenate(held_out_rows([30, 10], data, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_the_same_rows_are_held_out_when_some_rows_cannot_be_used() -> None:
    data = settings("data.eval_size=0.5", names="[a]")
    mask = held_out_rows([40], data, 1)[0]
    without_odd = Part("a", np.arange(0, 40, 2), 40)
    assert rows_of([without_odd], data)[0] == [row for row in range(0, 40, 2) if not mask[row]]


def test_examples_of_one_row_stay_together() -> None:
    data = settings("data.eval_size=0.5", "data.max_samples=3", names="[a]")
    three_each = Part("a", np.repeat(np.arange(10), 3), 10)
    (rows,) = rows_of([three_each], data)
    assert len(rows) == 9
    assert all(rows.count(row) == 3 for row in rows)


def test_holding_out_everything_is_an_error() -> None:
    with pytest.raises(DataError, match="holds out 40 of 40 rows"):
        held_out_rows([40], settings("data.eval_size=40"), 1)


def test_max_samples_draws_under_the_seed_and_compat_takes_the_first() -> None:
    parts = [part("a", 100), part("b", 3)]
    drawn = rows_of(parts, settings("data.max_samples=10"))
    assert [len(rows) for rows in drawn] == [10, 3]
    assert drawn[0] != list(range(10))
    assert drawn == rows_of(parts, settings("data.max_samples=10"))
    first = rows_of(parts, settings("data.max_samples=10", "data.compat=llamafactory"))
    assert first == [list(range(10)), [0, 1, 2]]


def test_num_samples_draws_and_repeats_past_the_size() -> None:
    fewer, more = rows_of([part("a", 10, num_samples=4), part("b", 4, num_samples=10)], settings())
    assert len(set(fewer)) == len(fewer) == 4
    assert len(more) == 10
    assert {more.count(row) for row in range(4)} == {2, 3}


def test_weights_of_concat_say_how_often_rows_are_used() -> None:
    half, twice = rows_of([part("a", 10), part("b", 4)], settings("data.weights=[0.5,2]"))
    assert len(set(half)) == len(half) == 5
    assert sorted(twice) == sorted([0, 1, 2, 3] * 2)


@pytest.mark.parametrize(
    ("mix", "sizes"),
    [
        ("concat", [90, 30]),
        ("interleave_once", [90, 30]),
        ("interleave_under", [30, 30]),  # drawing evenly, b is used up after 60 draws
        ("interleave_over", [90, 90]),
    ],
)
def test_interleaving_stops_where_its_name_says(mix: str, sizes: list[int]) -> None:
    data = settings(f"data.mix={mix}")
    assert mixture([90, 30], data) == sizes
    assert [len(rows) for rows in rows_of([part("a", 90), part("b", 30)], data)] == sizes


def test_interleaving_follows_the_weights() -> None:
    assert mixture([90, 30], settings("data.mix=interleave_under", "data.weights=[3,1]")) == [90, 30]
    assert mixture([90, 30], settings("data.mix=interleave_under", "data.weights=[1,3]")) == [10, 30]


def test_a_weight_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave no row of a"):
        training_examples([part("a", 30), part("b", 30)], settings("data.weights=[0.001,1]"), 1)


def test_a_share_above_nothing_holds_out_a_row_at_least() -> None:
    assert held_out_rows([30], settings("data.eval_size=0.001", names="[a]"), 1)[0].sum() == 1


def test_a_weight_for_each_dataset_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"one positive number for each of the 2 datasets"):
        mixture([1, 1], settings("data.weights=[1]"))
