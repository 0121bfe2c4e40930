"""Texts of nested values are found, and changed, wherever they are."""

from __future__ import annotations

from tunewright.trees import map_texts, texts_in

TREE = {"a": ["x", 1, None, {"b": "y"}], "c": ("z",), "d": True}


def test_every_text_is_changed_and_nothing_else() -> None:
    assert map_texts(TREE, str.upper) == {"a": ["X", 1, None, {"b": "Y"}], "c": ["Z"], "d": True}
    assert map_texts("x", str.upper) == "X"


def test_texts_come_in_their_order() -> None:
    assert list(texts_in(TREE)) == ["x", "y", "z"]
    assert sorted(texts_in(TREE, keys=True)) == ["a", "b", "c", "d", "x", "y", "z"]


def test_depth_is_no_limit_to_finding() -> None:
    deep: object = "end"
    for _ in range(100_000):
        deep = [deep]
    assert list(texts_in(deep)) == ["end"]
