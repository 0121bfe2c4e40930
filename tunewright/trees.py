"""Values as JSON holds them: mappings and lists, with texts at their ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any


def map_texts(tree: Any, change: Callable[[str], str]) -> Any:
    """Return mappings and lists with every text in them changed; keys stay."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_texts(value, change) for key, value in tree.items()}
    return [map_texts(value, change) for value in tree] if isinstance(tree, (list, tuple)) else tree


def texts_in(tree: Any, *, keys: bool = False) -> Iterator[str]:
    """Yield every text of mappings and lists in its order, with `keys` those of the keys too."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += reversed([*(item if keys else ()), *item.values()])
        elif isinstance(item, (list, tuple)):
            waiting += reversed(item)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (keys joined by dots, value) for each leaf of nested mappings; lists without mappings are leaves."""
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(tree: Any) -> str:
    """Return 16 characters that stand for a value; the order of keys decides nothing."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return lists, mappings and choices of a configuration as Python's own."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
