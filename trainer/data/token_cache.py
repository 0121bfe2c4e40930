"""Token ids on disk: made once, before ranks start, and opened by every rank as memory-mapped Arrow files.

Each dataset has a folder of its own, whose name is a digest of everything that decides what is in it: nothing stale is
ever opened, and a second start with nothing changed makes nothing. Sampling, splits and mixtures are not among it; they
are worked out when the cache is opened (see `select`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from omegaconf import DictConfig

from tunewright.config.chat_templates import template_text
from tunewright.config.schema import DataConfig
from tunewright.errors import DataError
from tunewright.files import write_json, written_aside
from tunewright.plan.rules import longest_row
from tunewright.trainer.data.packing import pack
from tunewright.trainer.data.sampling import Part, held_out_rows, training_examples
from tunewright.trainer.data.sources import Rows, open_datasets
from tunewright.trainer.data.tokenization import Outcome, no_row_left, tokenize

if TYPE_CHECKING:
    from datasets import Dataset

    from tunewright.trainer.data.render import Renderer

FORMAT = 5  # raise it when the meaning of the cached columns changes
OUTCOME_NAME = "outcome.json"
SPLITS = ("train", "eval")
PROCESSES_FROM = 20_000  # rows
SAMPLE = 1000  # rows of a streamed dataset that are checked before training
Progress = Callable[[str, int, int | None], None]  # (dataset, rows done, about how many in all)


@dataclass(frozen=True)
class CachedDataset:
    """The tokens of one dataset."""

    rows: Rows
    folder: Path
    outcome: Outcome

    @property
    def name(self) -> str:
        return self.rows.entry.name

    def examples(self) -> Dataset:
        """Open columns `row`, `input_ids` and `labels`."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / "tokens.arrow"))

    def lengths(self) -> np.ndarray:
        """Return the tokens of each example (examples,), without reading the tokens themselves."""
        import pyarrow.compute

        column = _arrow(self.folder / "tokens.arrow").column("input_ids")
        return np.asarray(pyarrow.compute.list_value_length(column), np.int64)

    def tokens(self) -> Any:
        """Open the same as a pyarrow table, without `datasets`."""
        return _arrow(self.folder / "tokens.arrow")

    def largest_id(self) -> int:
        """Return the largest token id of all examples, -1 where there are none."""
        import pyarrow.compute

        column = _arrow(self.folder / "tokens.arrow").column("input_ids")
        return max((pyarrow.compute.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=-1)

    def table(self) -> Any:
        """Open the table of the rows read, see `tokens.ROWS`, as a pyarrow table."""
        return _arrow(self.folder / "rows.arrow")

    @cached_property
    def part(self) -> Part:
        chunks = _arrow(self.folder / "tokens.arrow").column("row").chunks
        # pyarrow's own conversion would import pandas, for a quarter of a second.
        rows = [np.frombuffer(one.buffers()[1], np.int64)[one.offset : one.offset + len(one)] for one in chunks]
        row = np.concatenate([np.zeros(0, np.int64), *rows])
        return Part(self.name, row, self.outcome.read, self.rows.entry.num_samples)


def _arrow(path: Path) -> Any:
    """Open an Arrow stream as a table that lies in the file; without `datasets`, whose import takes half a second."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()


@dataclass(frozen=True)
class TokenCache:
    """The tokens of all datasets of a configuration, ready to be dealt into train and eval."""

    train: list[CachedDataset]
    held_out: list[CachedDataset]  # of `data.eval_names` or `data.eval_split`
    data: DataConfig
    seed: int

    @property
    def fingerprint(self) -> str:
        """A digest of the rows that train and are held out."""
        names = ("max_samples", "eval_size", "mix", "weights", "streaming", "shuffle_buffer")
        chosen = {name: _plain(getattr(self.data, name)) for name in names}
        folders = [[cached.folder.name for cached in group] for group in (self.train, self.held_out)]
        return _digest([folders, chosen, self.seed])

    def chosen(self, split: str) -> list[tuple[CachedDataset, np.ndarray]]:
        """Return the datasets of a split, each with the numbers of its examples."""
        if split == "train":
            examples = training_examples([cached.part for cached in self.train], self.data, self.seed)
            return list(zip(self.train, examples, strict=True))
        if self.data.eval_names or self.data.eval_split:
            return [(cached, np.arange(len(cached.part.rows))) for cached in self.held_out]
        masks = held_out_rows([cached.part.read for cached in self.train], self.data, self.seed)
        return [
            (cached, np.flatnonzero(mask[cached.part.rows])) for cached, mask in zip(self.train, masks, strict=True)
        ]

    def open(self, split: str) -> Dataset | None:
        """Open a split: columns `input_ids` and `labels`, lists of int32. None when the split is empty."""
        from datasets import concatenate_datasets

        parts = [(cached.examples(), examples) for cached, examples in self.chosen(split) if len(examples)]
        if not parts:
            return None
        starts = np.cumsum([0, *(len(dataset) for dataset, _ in parts)])
        order = np.concatenate([start + examples for start, (_, examples) in zip(starts[:-1], parts, strict=True)])
        whole = concatenate_datasets([dataset for dataset, _ in parts]).remove_columns("row")
        return whole if len(order) == len(whole) and (order == np.arange(len(whole))).all() else whole.select(order)

    def lengths(self, split: str) -> np.ndarray:
        """Return the tokens of each example of a split (examples,), in the order of `open`."""
        parts = [cached.lengths()[examples] for cached, examples in self.chosen(split)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def counts(self, split: str) -> tuple[int, int, int]:
        """Return (examples, tokens, tokens with a label) of a split."""
        examples = tokens = scored = 0
        for cached, chosen in self.chosen(split):
            table = cached.table()
            rows, times = np.unique(cached.part.rows[chosen], return_counts=True)
            examples += len(chosen)
            # A row of several examples holds the sum of their tokens, and is sampled with all of them.
            each = np.bincount(cached.part.rows, minlength=cached.part.read)[rows]
            tokens += int((table["tokens"].to_numpy()[rows] * times / each).sum())
            scored += int((table["scored"].to_numpy()[rows] * times / each).sum())
        return examples, tokens, scored


def epoch_size(cache: TokenCache, config: DictConfig) -> tuple[int, int]:
    """Return what an epoch's steps are counted in: (rows, or the packs that training makes of them; their tokens)."""
    lengths = cache.lengths("train")
    packs = pack(lengths, config.data.cutoff_len, config.train.seed) if config.data.packing else lengths
    return len(packs), int(lengths.sum())


def cache_key(rows: Rows, config: DictConfig, model_path: Path | None, limit: int | None = None) -> str:
    """Return the digest of everything that decides a dataset's tokens, without importing torch or transformers."""
    data, model = config.data, config.model
    settings = {
        "format": FORMAT,
        "rows": [rows.identity, rows.entry.meaning(), limit],
        "render": [
            longest_row(config),
            *(
                _plain(data[key])
                for key in ("overlong", "train_on_prompt", "mask_history", "special_tokens_in_answers")
            ),
        ],
        "template": [
            model.template,
            model.template and template_text(model.template),
            dict(model.template_kwargs or {}),
        ],
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": _tokenizer_files(model_path) if model_path else None,
    }
    return _digest(settings)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return getattr(value, "value", list(value) if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _tokenizer_files(model_path: Path) -> list[str]:
    digests = []
    for pattern in (
        "*token*",
        "*vocab*",
        "merges.txt",
        "*template*",
        "special_tokens_map.json",
        "*.model",
        "*.tiktoken",
    ):
        for file in sorted(model_path.glob(pattern)):
            if file.is_file():
                digests.append(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    return digests


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
            return tokenize(
                rows,
                renderer,
                folder,
                threads=thread_count(config),
                processes=processes if _is_large(rows) and limit is None else None,
                limit=limit,
                progress=lambda done: progress(rows.entry.name, done, rows.expected),
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


def dropped_lines(outcome: Outcome) -> list[str]:
    """Return a line for each reason of dropping rows, with row numbers and the beginning of one row."""
    lines = []
    for index in np.argsort(outcome.dropped)[::-1]:
        shown = outcome.excerpts[index]
        numbers = ", ".join(str(one["row"]) for one in shown)
        more = ", ..." if outcome.dropped[index] > len(shown) else ""
        what = "row" if outcome.dropped[index] == 1 else "rows"
        lines.append(f"  dropped {outcome.dropped[index]:,}: {outcome.reasons[index]} ({what} {numbers}{more})")
        lines.append(f"    {shown[0]['text']}")
    return lines


def describe(cache: TokenCache) -> list[str]:
    """Return lines that say what was kept and what was dropped, and why."""
    lines = []
    for cached in (*cache.train, *cache.held_out):
        outcome = cached.outcome
        share = outcome.scored / max(outcome.tokens, 1)
        cut = f", {outcome.truncated:,} cut" if outcome.truncated else ""
        lines.append(
            f"{cached.name}: {outcome.kept:,} of {outcome.read:,} rows{cut}, {outcome.tokens:,} tokens, {share:.0%} of "
            f"them learnt, longest {outcome.longest}"
        )
        lines += dropped_lines(outcome)
    return lines


def as_json(cache: TokenCache) -> dict[str, Any]:
    """Return what a run's manifest says about its data."""
    parts = {}
    for cached in (*cache.train, *cache.held_out):
        outcome = cached.outcome
        dropped = dict(zip(outcome.reasons, outcome.dropped, strict=True))
        parts[cached.name] = {
            "tokens_folder": cached.folder.name,
            "read": outcome.read,
            "kept": outcome.kept,
            "truncated": outcome.truncated,
            "dropped": dropped,
        }
    counts = {}
    for split in SPLITS:
        examples, tokens, scored = cache.counts(split)
        counts[split] = {"examples": examples, "tokens": tokens, "scored_tokens": scored}
    return {"fingerprint": cache.fingerprint, "datasets": parts, **counts}
