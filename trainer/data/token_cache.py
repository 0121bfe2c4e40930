"""Token ids on disk, opened by every rank as memory-mapped Arrow files.

Each dataset has a folder of its own, whose name is a digest of everything that decides what is in it: nothing stale is
ever opened, and a second start with nothing changed makes nothing. Sampling, splits and mixtures are not among it; they
are worked out when the cache is opened (see `sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from tunewright.config.schema import DataConfig
from tunewright.trainer.data.outcome import Outcome, dropped_lines
from tunewright.trainer.data.packing import pack
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.data.sampling import Part, held_out_rows, training_examples
from tunewright.trainer.data.sources import Rows
from tunewright.trees import digest, plain

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "eval")
SAMPLE = 1000  # rows of a streamed dataset that are checked before training


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

    def scored(self) -> np.ndarray:
        """Return the tokens with a label of each example (examples,), all but its first, which nothing predicts.

        They were counted for each row when the cache was made. Only where a row has more than one example are the
        labels read once more.
        """
        if (np.diff(self.part.rows) > 0).all():
            return self.table()["scored"].to_numpy()[self.part.rows]  # type: ignore[no-any-return]
        chunks = _arrow(self.folder / "tokens.arrow").column("labels").chunks
        return np.concatenate([np.zeros(0, np.int32), *map(_learnt, chunks)])

    def tokens(self) -> Any:
        """Open the same as a pyarrow table, without `datasets`."""
        return _arrow(self.folder / "tokens.arrow")

    def largest_id(self) -> int:
        """Return the largest token id of all examples, -1 where there are none."""
        import pyarrow.compute

        column = _arrow(self.folder / "tokens.arrow").column("input_ids")
        return max((pyarrow.compute.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=-1)

    def table(self) -> Any:
        """Open the table of the rows read, see `tokenization.ROWS`, as a pyarrow table."""
        return _arrow(self.folder / "rows.arrow")

    @cached_property
    def part(self) -> Part:
        chunks = _arrow(self.folder / "tokens.arrow").column("row").chunks
        # pyarrow's own conversion would import pandas, for a quarter of a second.
        rows = [np.frombuffer(one.buffers()[1], np.int64)[one.offset : one.offset + len(one)] for one in chunks]
        row = np.concatenate([np.zeros(0, np.int64), *rows])
        return Part(self.name, row, self.outcome.read, self.rows.entry.num_samples)


def _learnt(labels: Any) -> np.ndarray:
    """Count the labels of each row of an Arrow array of lists, none of them empty, all but each row's first."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(labels).to_numpy()
    starts = np.cumsum(lengths) - lengths
    learnt = labels.flatten().to_numpy() != IGNORED
    learnt[starts] = False
    return np.add.reduceat(learnt, starts, dtype=np.int32)  # type: ignore[no-any-return]


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
        chosen = {name: plain(getattr(self.data, name)) for name in names}
        folders = [[cached.folder.name for cached in group] for group in (self.train, self.held_out)]
        return digest([folders, chosen, self.seed])

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

    def places(self, split: str, examples: Sequence[int]) -> list[tuple[str, int]]:
        """Return (dataset, row in it, counted from 0) of examples of a split, by their numbers in `open`."""
        chosen = [(cached, numbers) for cached, numbers in self.chosen(split) if len(numbers)]
        ends = np.cumsum([len(numbers) for _, numbers in chosen])
        found = []
        for example in examples:
            part = int(np.searchsorted(ends, example, side="right"))
            cached, numbers = chosen[part]
            number = numbers[example - int(ends[part]) + len(numbers)]
            found.append((cached.name, int(cached.part.rows[number])))
        return found

    def lengths(self, split: str) -> np.ndarray:
        """Return the tokens of each example of a split (examples,), in the order of `open`."""
        parts = [cached.lengths()[examples] for cached, examples in self.chosen(split)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def scored(self, split: str) -> np.ndarray:
        """Return the tokens with a label of each example of a split (examples,), in the order of `open`."""
        parts = [cached.scored()[examples] for cached, examples in self.chosen(split)]
        return np.concatenate([np.zeros(0, np.int32), *parts])

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
