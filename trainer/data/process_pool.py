"""Processes that render and tokenise many rows. They take seconds to start, so they start before there is a tokenizer.

They are spawned: a forked process would stop for ever in a tokenizer that has begun threads of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tunewright.plugins import PLUGINS
from tunewright.ranks import die_with_parent


@contextmanager
def started_workers(count: int, warm_up: Callable[[], None], imports: Sequence[str] = ()) -> Iterator[Executor]:
    """Give a pool of so many processes, on their way up, each of which loads `imports` and begins with `warm_up`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (tuple(imports),)) as pool:
        for _ in range(count):  # a process starts with the first task that finds no idle one
            pool.submit(warm_up)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def sent(value: Any) -> Iterator[Callable[..., Any] | None]:
    """Give a function for a pool that calls `function(value, ...)`; the value goes to each process once, by a file.

    None when the value cannot be sent: a tokenizer whose code came with its model may not be there in a process.
    """
    try:
        data = pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        path = Path(folder) / "value.pickle"
        path.write_bytes(data)
        yield partial(_call, str(path))


def _begin(imports: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    PLUGINS.load(imports)


def _call(path: str, function: Callable[..., Any], *args: Any) -> Any:
    return function(_received(path), *args)


@lru_cache(maxsize=1)
def _received(path: str) -> Any:
    return pickle.loads(Path(path).read_bytes())  # written by our parent
