"""What `tunewright train --dry-run` can tell of a run without training: its parameters, rows and steps."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from launch.batching import BatchPlan, planned_steps
from launch.errors import StorageError
from trainer.architecture import ensure_counts
from trainer.data.cache import open_rows
from trainer.data.select import rows_to_train
from trainer.prepare import find_prepared


def forecast(config: DictConfig, plan: BatchPlan) -> Iterator[str]:
    """Yield lines about a checked configuration; what is wrong with the data is told after the parameters.

    Rows are counted where they lie: what the tokenizer would drop is known only once they are tokenised.

    Raises:
        DataError: see `find_prepared` and `open_rows`.
    """
    trainable, total = ensure_counts(config)
    yield (
        f"{config.model.name}, method={config.method.name}: {trainable:,} of {total:,} parameters are trained "
        f"({trainable / total:.3%})"
    )
    try:
        rows, exact = training_rows(config)
    except StorageError as error:
        yield f"Rows and steps are not known here: {error}"
        yield plan.describe()
        return
    if rows is not None:
        yield f"{rows:,} examples to train on" + ("" if exact else ", if every row can be used")
    yield planned_steps(config, plan, rows or 0).describe()


def training_rows(config: DictConfig) -> tuple[int | None, bool]:
    """Return how many examples train, or None for a stream, and whether that is known from their tokens."""
    if config.data.streaming:
        return None, False
    prepared = find_prepared(config)
    if prepared:
        return prepared.cache.counts("train")[0], True
    datasets, _ = open_rows(config)
    sizes = [sum(1 for _ in rows) for rows in datasets]
    names, samples = [rows.entry.name for rows in datasets], [rows.entry.num_samples for rows in datasets]
    return rows_to_train(names, sizes, samples, config.data, config.train.seed), False
