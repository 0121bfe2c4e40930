"""Token caches are found or made: once, before ranks start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from omegaconf import DictConfig

from tunewright.errors import DataError
from tunewright.files import write_json, written_aside
from tunewright.space import OTHER_CACHE, storing
from tunewright.trainer.data.cache_key import cache_key
from tunewright.trainer.data.outcome import Outcome, dropped_lines, no_row_left
from tunewright.trainer.data.sources import Rows, open_datasets
from tunewright.trainer.data.token_cache import SAMPLE, CachedDataset, TokenCache
from tunewright.trainer.data.tokenization import tokenize

if TYPE_CHECKING:
    from tunewright.trainer.data.render import Renderer

OUTCOME_NAME = "outcome.json"
PROCESSES_FROM = 20_000  # rows
Progress = Callable[[str, int, int | None], None]  # (dataset, rows done, about how many in all)


def open_rows(config: DictConfig) -> tuple[list[Rows], list[Rows]]:
    """Find the datasets that train and those that are held out, and look at their first rows.

    Raises:
        DataError, StorageError: see `sources.open_datasets`; what is wrong with any of them is told together.
    """
    data = config.data
    count = len(data.names)
    if data.eval_split and not data.eval_names:
        held = open_datasets(list(data.names), data, offline=config.offline, split=data.eval_split)
        return open_datasets(list(data.names), data, offline=config.offline, other_split="train"), held
    rows = open_datasets([*data.names, *data.eval_names], data, offline=config.offline)
    return rows[:count], rows[count:]


def find_cache(config: DictConfig, model_path: Path) -> TokenCache | None:
    """Return the finished cache of a configuration, or None when a part of it is not there.

    Raises:
        DataError: see `build_cache`.
    """
    found = find_unchecked(config, model_path)
    return _checked(found) if found else None


def find_unchecked(config: DictConfig, model_path: Path) -> TokenCache | None:
    """Return the same, also of data that cannot be trained on: for `tunewright data`, which shows what is wrong."""
    train, held = open_rows(config)
    limit = SAMPLE if config.data.streaming else None
    keys = [*(cache_key(rows, config, model_path, limit) for rows in train)]
    keys += [cache_key(rows, config, model_path) for rows in held]
    found = [_find(rows, _root(config) / key) for rows, key in zip((*train, *held), keys, strict=True)]
    if any(cached is None for cached in found):
        return None
    parts = [cached for cached in found if cached is not None]
    return TokenCache(parts[: len(train)], parts[len(train) :], config.data, config.train.seed)


def wants_processes(config: DictConfig) -> bool:
    """Tell whether some dataset is so large that processes would save more time than they take to start."""
    return thread_count(config) > 1 and any(_is_large(rows) for group in open_rows(config) for rows in group)


def thread_count(config: DictConfig) -> int:
    return int(config.data.workers or len(os.sched_getaffinity(0)))


def _is_large(rows: Rows) -> bool:
    return rows.expected is None or rows.expected >= PROCESSES_FROM


def build_cache(
    config: DictConfig,
    model_path: Path,
    renderer: Renderer,
    progress: Progress = lambda name, done, expected: None,
    processes: Executor | None = None,
) -> TokenCache:
    """Tokenise every dataset that is not cached. Safe to call from several processes at once.

    Raises:
        DataError: a file is broken, no row is left, or more than `data.max_dropped` of the rows cannot be used.
    """

    def built(rows: Rows, limit: int | None) -> CachedDataset:
        def write(folder: Path) -> Outcome:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done = count
                progress(rows.entry.name, count, rows.expected)

            def in_all() -> int | None:
                """Return about how many bytes all rows take, by those that were written."""
                total = limit or rows.expected
                written = sum(file.stat().st_size for file in folder.glob("*"))
                return written * total // done if done and total else None

            with storing(folder.parent, f"The tokens of {rows.entry.name}", needed=in_all, advice=lambda: OTHER_CACHE):
                return tokenize(
                    rows,
                    renderer,
                    folder,
                    threads=thread_count(config),
                    processes=processes if _is_large(rows) and limit is None else None,
                    limit=limit,
                    progress=advance,
                )

        key = cache_key(rows, config, model_path, limit)
        return _find(rows, _root(config) / key) or _build(rows, _root(config) / key, write)

    train, held = open_rows(config)
    limit = SAMPLE if config.data.streaming else None
    parts = [*(built(rows, limit) for rows in train), *(built(rows, None) for rows in held)]
    return _checked(TokenCache(parts[: len(train)], parts[len(train) :], config.data, config.train.seed))


def _root(config: DictConfig) -> Path:
    return Path(config.data.cache_dir).expanduser() / "tokens"


def _find(rows: Rows, folder: Path) -> CachedDataset | None:
    try:
        outcome = Outcome(**json.loads((folder / OUTCOME_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return CachedDataset(rows, folder, outcome)


def _build(rows: Rows, folder: Path, write: Callable[[Path], Outcome]) -> CachedDataset:
    """Let `write` fill a folder aside, and give it its name once it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        found = _find(rows, folder)  # another process may have made it meanwhile
        if found:
            return found
        with written_aside(folder) as staging:
            outcome = write(staging)
            write_json(staging / OUTCOME_NAME, asdict(outcome))
    return CachedDataset(rows, folder, outcome)


def _checked(cache: TokenCache) -> TokenCache:
    """Refuse data of which too much cannot be used; all such datasets are told together."""
    problems = []
    for cached in (*cache.train, *cache.held_out):
        outcome = cached.outcome
        if not outcome.kept:
            problems.append(str(no_row_left(cached.name, outcome)))
        elif outcome.kept < outcome.read * (1 - cache.data.max_dropped):
            problems.append(
                f"{outcome.read - outcome.kept:,} of {outcome.read:,} rows of {cached.name} cannot be used, more than "
                f"data.max_dropped = {cache.data.max_dropped:.0%}:\n" + "\n".join(dropped_lines(outcome))
            )
        elif outcome.unended == outcome.kept and not cache.data.train_on_prompt:
            problems.append(
                f"In no row of {cached.name} the model would learn to stop: the chat template ends an answer with "
                f"nothing that stops generation. Choose another one with model.template."
            )
    if problems:
        raise DataError("\n".join(problems))
    if not any(len(examples) for _, examples in cache.chosen("train")):
        raise DataError(f"Nothing of {', '.join(cached.name for cached in cache.train)} is left to train on.")
    return cache
