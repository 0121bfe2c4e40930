"""Rows that repeat others: within datasets, and held-out rows that are known from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.launch.data.report import Overlap, Pair, Repeats
from tunewright.trainer.data.minhash import PERMUTATIONS, similar_pairs
from tunewright.trainer.data.token_cache import CachedDataset, TokenCache

LISTED = 1000  # rows and pairs of one kind that a report holds; all are counted


@dataclass(frozen=True)
class RowGroup:
    """Kept rows of several datasets behind one another."""

    names: list[str]
    dataset: np.ndarray  # (rows,) index into names
    row: np.ndarray  # (rows,) number in its dataset
    digest: np.ndarray  # (rows,) uint64
    question: np.ndarray  # (rows,) uint64
    sketch: np.ndarray  # (rows, PERMUTATIONS) uint32

    def repeats(self, rows: np.ndarray, others: np.ndarray, of: RowGroup | None = None) -> Repeats:
        """Name positions (n,) of this group and positions (n,) of another, by default of this one too."""
        of = of or self
        pairs = zip(rows[:LISTED].tolist(), others[:LISTED].tolist(), strict=True)
        named = [Pair(*self._place(row), *of._place(other)) for row, other in pairs]
        return Repeats(len(rows), named)

    def _place(self, position: int) -> tuple[str, int]:
        return self.names[self.dataset[position]], int(self.row[position])


def label(cached: CachedDataset) -> str:
    """Return the dataset's name, with the split that `data.eval_split` or the registry picks of it."""
    entry = cached.rows.entry
    return f"{entry.name} ({entry.split})" if entry.split else entry.name


def row_table(cached: CachedDataset) -> dict[str, np.ndarray]:
    """Return the columns of `tokenization.ROWS` as arrays (rows,), the sketches as (rows, PERMUTATIONS)."""
    table = cached.table()
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "sketch"}
    sketches = [
        np.frombuffer(chunk.buffers()[1], np.uint32).reshape(-1, PERMUTATIONS)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table["sketch"].chunks
    ]
    columns["sketch"] = np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *sketches])
    return columns


def stacked(
    datasets: Sequence[CachedDataset], tables: Sequence[dict[str, np.ndarray]], rows: Sequence[np.ndarray]
) -> RowGroup:
    """Put the given rows of several datasets behind one another."""

    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(table[name][chosen] for table, chosen in zip(tables, rows, strict=True))])

    return RowGroup(
        names=[label(cached) for cached in datasets],
        dataset=np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows]),
        row=np.concatenate([np.zeros(0, np.int64), *rows]),
        digest=joined("digest", np.zeros(0, np.uint64)),
        question=joined("question", np.zeros(0, np.uint64)),
        sketch=joined("sketch", np.zeros((0, PERMUTATIONS), np.uint32)),
    )


def used_rows(cache: TokenCache, split: str) -> RowGroup:
    """Return the rows that a split uses, each of them once."""
    chosen = cache.chosen(split)
    rows = [np.unique(cached.part.rows[examples]) for cached, examples in chosen]
    datasets = [cached for cached, _ in chosen]
    return stacked(datasets, [row_table(cached) for cached in datasets], rows)


def repeats_in(group: RowGroup) -> tuple[list[Repeats], list[Repeats]]:
    """Return for each dataset of a group the rows that repeat an earlier one of any of them: exactly, and nearly."""
    _, first, which = np.unique(group.digest, return_index=True, return_inverse=True)
    earlier = first[which]
    exact = np.flatnonzero(earlier != np.arange(len(earlier)))
    single = np.sort(first)  # rows that are exact copies are not counted again
    pairs = np.array(similar_pairs(group.sketch[single]), np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 1])]
    near, originals = single[pairs[:, 1]], single[pairs[:, 0]]

    def by_dataset(rows: np.ndarray, others: np.ndarray) -> list[Repeats]:
        owners = group.dataset[rows]
        return [group.repeats(rows[owners == number], others[owners == number]) for number in range(len(group.names))]

    return by_dataset(exact, earlier[exact]), by_dataset(near, originals)


def overlap_of(train: RowGroup, held: RowGroup) -> Overlap:
    left = np.arange(len(held.row))
    found = []
    for learnt, asked in ((train.digest, held.digest), (train.question, held.question)):
        values, first = np.unique(learnt, return_index=True)
        if not len(values):
            break
        places = np.searchsorted(values, asked[left]).clip(max=len(values) - 1)
        known = values[places] == asked[left]
        found.append(held.repeats(left[known], first[places[known]], train))
        left = left[~known]
    rows, others = _near_training(train.sketch, held.sketch[left])
    none = Repeats(0, [])
    same, question = found or (none, none)
    return Overlap(len(held.row), same, question, held.repeats(left[rows], others, train))


def _near_training(train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of held-out sketches and of the training sketches that they are like."""
    like = {later: earlier for earlier, later in similar_pairs(np.concatenate([train, held]))}
    rows, others = [], []
    for row in range(len(train), len(train) + len(held)):
        other = like.get(row)
        # A held-out row may be paired with another held-out row, which is like a training row in turn.
        while other is not None and other >= len(train):
            other = like.get(other)
        if other is not None:
            rows.append(row - len(train))
            others.append(other)
    return np.array(rows, np.int64), np.array(others, np.int64)
