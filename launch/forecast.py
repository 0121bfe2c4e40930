"""What `tunewright train --dry-run` can tell of a run without training: its parameters, rows and steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig

from tunewright.errors import StorageError
from tunewright.launch.ask_torch import ensure_counts
from tunewright.plan.batch_plan import BatchPlan, planned_steps
from tunewright.trainer.data.build_cache import open_rows
from tunewright.trainer.data.sampling import rows_to_train
from tunewright.trainer.data.token_cache import TokenCache, epoch_size
from tunewright.trainer.prepared import find_prepared


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
    yield from steps(config, plan)


def steps(config: DictConfig, plan: BatchPlan) -> Iterator[str]:
    """Yield lines about rows and optimiser steps.

    Raises:
        DataError: see `find_prepared` and `open_rows`.
    """
    try:
        rows = training_rows(config)
    except StorageError as error:
        yield f"Rows and steps are not known here: {error}"
        yield plan.describe()
        return
    if rows is not None:
        yield f"{rows.examples:,} examples to train on" + ("" if rows.cache else ", if every row can be used")
        if rows.cache is None and (config.data.packing or config.train.tokens_per_batch):
            yield f"{plan.describe()}; how many steps that makes is known once the rows are tokenised"
            return
    if rows is not None and rows.cache is not None:
        yield planned_steps(config, plan, *epoch_size(rows.cache, config)).describe()
    else:
        yield planned_steps(config, plan, rows.examples if rows else 0, tokens=0).describe()


@dataclass(frozen=True)
class TrainingRows:
    """How many examples train, and their tokens where they are known already."""

    examples: int
    cache: TokenCache | None


def training_rows(config: DictConfig) -> TrainingRows | None:
    """Count the examples, or return None for a stream."""
    if config.data.streaming:
        return None
    prepared = find_prepared(config)
    if prepared:
        return TrainingRows(prepared.cache.counts("train")[0], prepared.cache)
    datasets, _ = open_rows(config)
    sizes = [sum(1 for _ in rows) for rows in datasets]
    names, samples = [rows.entry.name for rows in datasets], [rows.entry.num_samples for rows in datasets]
    return TrainingRows(rows_to_train(names, sizes, samples, config.data, config.train.seed), None)
