"""Rows that are rendered while training, for data that does not fit on a disk or in a day of preparation.

Every rank reads and renders the whole stream and takes its share of each global batch: rendering costs little beside
training, and the rows of a step are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from datasets import IterableDataset as RowStream
from datasets import interleave_datasets
from torch.utils.data import IterableDataset

from tunewright.config.schema import DataConfig, Mix
from tunewright.errors import DataError
from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.data.formats import to_conversation
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.sources import Rows
from tunewright.trainer.data.token_cache import SAMPLE

RENDERED = 64  # rows rendered at once
STOPPING = {
    Mix.interleave_under: "first_exhausted",
    Mix.interleave_over: "all_exhausted",
    Mix.interleave_once: "all_exhausted_without_replacement",
}


class TokenStream(IterableDataset):  # type: ignore[type-arg]
    """Examples {"input_ids": array (length,), "labels": array (length,)} of one epoch, in training order."""

    def __init__(self, datasets: list[Rows], data: DataConfig, renderer: Renderer, seed: int) -> None:
        self.datasets, self.data, self.renderer, self.seed = datasets, data, renderer, seed
        self.epoch = 0
        self.read = self.dropped = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rows = iter(self._mixed().shuffle(seed=self.seed + self.epoch, buffer_size=self.data.shuffle_buffer))
        while part := list(islice(rows, RENDERED)):
            sources = []
            for item in part:
                try:
                    sources.append(to_conversation(item["row"], self.datasets[item["dataset"]].entry))
                except Unusable as reason:
                    self._drop(reason)
            self.read += len(part)
            for examples in self.renderer.render(sources):
                if isinstance(examples, Unusable):
                    self._drop(examples)
                else:
                    yield from ({"input_ids": one.input_ids, "labels": one.labels} for one in examples)

    def _drop(self, reason: Unusable) -> None:
        """Count a row, and stop where the rows after the sample are worse than it was."""
        self.dropped += 1
        if self.read >= SAMPLE and self.dropped > self.data.max_dropped * self.read:
            raise DataError(
                f"{self.dropped:,} of the {self.read:,} rows that were read from the stream cannot be used, more than "
                f"data.max_dropped = {self.data.max_dropped:.0%}. The last one: {reason}."
            )

    def _mixed(self) -> RowStream:
        streams = [
            RowStream.from_generator(_numbered, gen_kwargs={"number": number, "rows": rows})
            for number, rows in enumerate(self.datasets)
        ]
        if len(streams) == 1:
            return streams[0]
        weights = [float(weight) for weight in self.data.weights] or [1.0] * len(streams)
        return interleave_datasets(
            streams,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=self.seed + self.epoch,
            stopping_strategy=STOPPING[self.data.mix],
        )


def _numbered(number: int, rows: Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"dataset": number, "row": row}


class StreamedMicroBatches(IterableDataset):  # type: ignore[type-arg]
    """The micro-batches of one rank, each a list of examples, without an end: the stream begins again in another order.

    A run that goes on passes over those that it has trained on: all of them are read and rendered once more, because
    only that says which rows make examples, and what the shuffling had in store.
    """

    def __init__(self, stream: TokenStream, plan: BatchPlan, rank: int) -> None:
        self.stream, self.plan, self.rank = stream, plan, rank

    def __iter__(self) -> Iterator[list[dict[str, np.ndarray]]]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            examples = iter(self.stream)
            batch = self._next(examples)
            if not batch:
                raise DataError("The stream holds no row to train on.")
            while batch:
                for positions in self.plan.share([len(example["input_ids"]) for example in batch], self.rank):
                    yield [batch[position] for position in positions]
                batch = self._next(examples)

    def _next(self, examples: Iterator[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return list(islice(examples, self.plan.global_batch))
