"""Importing torch and what is built on it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import in a process of ours without garbage collection, then or later, of what is imported.

    It would look through a million objects again and again, for a second or two, in vain.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
