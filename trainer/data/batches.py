"""Batches: which rows a rank sees when, and how they become tensors.

rows 3, 0, 7, ...  ->  input_ids      (1, T)   all tokens of the micro-batch, end to end
                       position_ids   (1, T)   0, 1, 2, ... anew for each row
                       cu_seq_lens    (B + 1,) where rows begin and end: 0, 12, 30, T
                       labels         (1, T)   IGNORED where nothing is learnt
                       scored         (S,)     positions whose next token carries a label
                       targets        (S,)     those labels
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import get_length_grouped_indices

from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.data.packing import cut, pack
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.data.sampling import epoch_order

Batch = dict[str, Any]
Row = dict[str, np.ndarray]  # "input_ids" and "labels", (length,) each
T = TypeVar("T")


class MicroBatch(list[T]):
    """The numbers of a micro-batch's rows, or the rows, and how many tokens are scored in its step, on all ranks."""

    def __init__(self, items: Iterable[T], step_scored: int | None = None) -> None:
        super().__init__(items)
        self.step_scored = step_scored


class TokenRows:
    """Rows of a token cache."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self) -> np.ndarray:
        """Return the tokens of each row (rows,)."""
        batches = self.dataset.iter(batch_size=10_000)
        return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])

    def __getitems__(self, indices: list[int]) -> MicroBatch[Row]:
        """Return rows in one read: 7 us for each of 64 rows of 100 tokens, which take 128 us one by one."""
        scored = getattr(indices, "step_scored", None)
        if not indices:  # which is legal: it keeps the ranks in step at the end of an epoch
            return MicroBatch([], scored)
        table = self.dataset[indices]
        columns = _arrays(table["input_ids"]), _arrays(table["labels"])
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*columns, strict=True)]
        return MicroBatch(rows, scored)


def _arrays(column: Any) -> list[np.ndarray]:
    """Return the rows of an Arrow column of lists."""
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    return np.split(pc.list_flatten(column).to_numpy(), ends[:-1])


class MicroBatches:
    """The micro-batches of one rank, in order: a batch sampler for `DataLoader`.

    The rows of a step are the same for any number of ranks and any micro-batch size; who of them gets which depends on
    the `lengths` (rows,) of all rows, so that all have about the same work. With `pack_to`, rows share packs of so many
    tokens, the same ones in every epoch. With `group_by_length`, the rows of a step are of like length. `scored`
    (rows,), the tokens of each row that carry a label, lets each rank know those of a step without asking the others.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        plan: BatchPlan,
        rank: int,
        *,
        shuffle: bool,
        seed: int,
        group_by_length: bool = False,
        pack_to: int | None = None,
        scored: np.ndarray | None = None,
    ) -> None:
        self.plan, self.rank, self.scored = plan, rank, scored
        self.shuffle, self.seed, self.epoch, self.group_by_length = shuffle, seed, 0, group_by_length
        self.packs = None if pack_to is None else pack(lengths, pack_to, seed)
        self.lengths = lengths if self.packs is None else np.array([lengths[rows].sum() for rows in self.packs])

    def __len__(self) -> int:
        return self._steps() * self.plan.accumulation

    def _steps(self) -> int:
        return self.plan.steps_per_epoch(len(self.lengths), int(self.lengths.sum()))

    def __iter__(self) -> Iterator[MicroBatch[int]]:
        order = np.arange(len(self.lengths))
        if self.shuffle and self.group_by_length:
            order = self._grouped()
        elif self.shuffle:
            order = epoch_order(len(order), self.seed, self.epoch)
        if self.plan.global_batch is None:
            steps = [order[positions] for positions in cut(self.lengths[order], self._steps())]
        else:
            steps = np.split(order, np.arange(self.plan.global_batch, len(order), self.plan.global_batch))
        for step in steps:
            scored = None if self.scored is None else int(self.scored[self._rows(step)].sum())
            for positions in self.plan.share(self.lengths[step].tolist(), self.rank):
                yield MicroBatch(self._rows(step[positions]), scored)

    def rows_of(self, step: int, number: int) -> list[int]:
        """Return the rows of this rank's micro-batch `number`, from 0, of the run's optimiser step `step`, from 1."""
        epoch, step = divmod(step - 1, self._steps())
        before, self.epoch = self.epoch, epoch
        try:
            return next(islice(self, step * self.plan.accumulation + number, None))
        finally:
            self.epoch = before

    def _rows(self, units: np.ndarray) -> list[int]:
        if self.packs is None:
            return units.tolist()  # type: ignore[no-any-return]
        return [row for unit in units for row in self.packs[unit].tolist()]

    def largest(self) -> list[int]:
        """Return the rows of a micro-batch that has as many tokens as any can have: the longest units together."""
        longest_first = np.argsort(-self.lengths, kind="stable")
        if self.plan.tokens is None:
            return self._rows(longest_first[: self.plan.micro_batch])
        share = self.plan.tokens / self.plan.world_size / self.plan.accumulation
        before = np.cumsum(self.lengths[longest_first]) - self.lengths[longest_first]
        return self._rows(longest_first[before < share])

    def _grouped(self) -> np.ndarray:
        """Return the rows shuffled, those of a step of like length, as transformers' `group_by_length` does."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return np.array(get_length_grouped_indices(self.lengths, self.plan.global_batch, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class EpochDataLoader(DataLoader):  # type: ignore[type-arg]
    """A `DataLoader` that passes the epoch on to its `MicroBatches`, as transformers' Trainer asks for."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class FlatCollator:
    """Rows end to end in one flat row: no padding, and the same examples a padded batch would hold."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> Batch:
        told = _told(rows)
        if not rows:
            rows = [_nothing(self.pad_token_id)]
        lengths = [len(row["input_ids"]) for row in rows]
        input_ids = torch.from_numpy(np.concatenate([row["input_ids"] for row in rows]).astype(np.int64))  # (T,)
        labels = torch.from_numpy(np.concatenate([row["labels"] for row in rows]).astype(np.int64))  # (T,)
        cu_seq_lens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)  # (B + 1,)
        # The first token of a row follows the last token of another row: nothing predicts it.
        labels[cu_seq_lens[:-1].long()] = IGNORED
        scored = torch.nonzero(labels[1:] != IGNORED).squeeze(1)  # (S,)
        return {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "scored": scored,
            "targets": labels[scored + 1],
            **told,
        }


class PaddedCollator:
    """Rows padded on the right to the longest of the micro-batch: input_ids, attention_mask and labels (B, T)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> Batch:
        told = _told(rows)
        if not rows:
            rows = [_nothing(self.pad_token_id)]
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
            **told,
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.from_numpy(row["input_ids"].astype(np.int64))
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, 1:length] = torch.from_numpy(row["labels"][1:].astype(np.int64))
        return batch


def _told(rows: list[Row]) -> Batch:
    """Return what a `MicroBatch` knows of its step."""
    scored = getattr(rows, "step_scored", None)
    return {} if scored is None else {"step_scored": scored}


def _nothing(pad_token_id: int) -> Row:
    """A row that teaches nothing and counts for nothing, for a rank that has no rows in a step.

    Two tokens, so that the model has a position to run on after labels are shifted by one.
    """
    return {"input_ids": np.array([pad_token_id] * 2), "labels": np.array([IGNORED] * 2)}


def token_counts(batch: Batch) -> tuple[int, int]:
    """Return (tokens of rows, without padding; tokens that carry a label) of a batch on the CPU.

    Every row of a dataset has a token to learn (`render`), so where none is, the rank has no row: see `_nothing`.
    """
    real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    scored = int((batch["labels"] != IGNORED).sum())
    return (real, scored) if scored else (0, 0)


def rows_in(batch: Batch) -> int:
    """Return how many rows a micro-batch has, padded or end to end."""
    bounds = batch.get("cu_seq_lens_q")
    return len(batch["input_ids"] if bounds is None else bounds[1:])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose tensors are on their way to a GPU: from pinned memory, nothing waits for it.

    The copies are queued before the work that needs them, and are small (24 bytes a token), so that a stream of their
    own would win nothing.
    """
    if device.type == "cpu":
        return batch
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
