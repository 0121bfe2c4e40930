"""How many rows a configuration trains on, without making any tokens."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from tunewright.errors import DataError, StorageError
from tunewright.trainer.data.build_cache import open_rows
from tunewright.trainer.data.sampling import rows_to_train
from tunewright.trainer.data.token_cache import TokenCache, epoch_size
from tunewright.trainer.prepared import find_prepared


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


@dataclass(frozen=True)
class Rows:
    """What trains, as far as it is known before anything is tokenised."""

    units: int | None = None  # rows, or packs of them
    tokens: int | None = None
    remark: str | None = None


def count_rows(config: DictConfig) -> Rows:
    """Count what trains, where that can be had."""
    try:
        return rows_of(config, training_rows(config))
    except (DataError, StorageError) as error:
        return Rows(remark=f"Steps and hours are not known here: {error}")


def rows_of(config: DictConfig, found: TrainingRows | None) -> Rows:
    """Return what an epoch's steps are counted in, as far as it is known before anything is tokenised."""
    if found and found.cache:
        return Rows(*epoch_size(found.cache, config))
    if not found or config.data.packing or config.train.tokens_per_batch:
        return Rows()
    remark = (
        f"Each row is taken for {config.data.cutoff_len:,} tokens: there are no tokens yet (`tunewright data check`)."
    )
    return Rows(found.examples, remark=remark)
