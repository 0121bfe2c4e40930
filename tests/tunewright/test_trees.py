"""Texts of nested values are found, and changed, wherever they are."""

from __future__ import annotations

from omegaconf import OmegaConf

from tunewright.config.schema import Mix
from tunewright.trees import flatten, map_texts, plain, texts_in

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


def test_a_tree_is_flattened_to_dotted_keys() -> None:
    tree = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": "x"}, 3], "f": {}}
    assert dict(flatten(tree)) == {"a.b": 1, "a.c": [1, 2], "d.0.e": "x", "d.1": 3}


def test_a_configurations_values_become_pythons_own() -> None:
    tree = OmegaConf.create({"a": [1, {"b": None}], "c": Mix.concat, "d": "text"})
    found = plain(tree)
    assert found == {"a": [1, {"b": None}], "c": "concat", "d": "text"}
    assert type(found) is dict
    assert type(found["a"]) is list
    assert type(found["a"][1]) is dict
