"""What `tunewright train --dry-run` can tell of a run without training: its parameters, rows and steps."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from tunewright.errors import StorageError
from tunewright.launch.ask_torch import ensure_architecture, ensure_footprints
from tunewright.launch.planning import headline
from tunewright.launch.row_counts import TrainingRows, rows_of, training_rows
from tunewright.plan.batch_plan import BatchPlan, planned_steps
from tunewright.plan.devices import Devices
from tunewright.plan.ways import largest_batch
from tunewright.trainer.data.token_cache import epoch_size


def forecast(config: DictConfig, plan: BatchPlan, devices: Devices) -> Iterator[str]:
    """Yield lines about a checked configuration; what is wrong with the data is told after what the model needs.

    Rows are counted where they lie: what the tokenizer would drop is known only once they are tokenised.

    Raises:
        DataError: see `find_prepared` and `open_rows`.
    """
    batch = largest_batch(config, devices, ensure_architecture(config))
    (footprint,) = ensure_footprints([config], devices.kind, [batch])
    trained, total = footprint.weights.trained, footprint.weights.trained + footprint.weights.frozen
    yield (
        f"{config.model.name}, method={config.method.name}: {trained:,} of {total:,} parameters are trained "
        f"({trained / total:.3%})"
    )
    try:
        rows = training_rows(config)
    except StorageError as error:
        yield f"Rows and steps are not known here: {error}"
        yield plan.describe()
        yield from headline(config, devices)
    else:
        yield from steps(config, plan, rows)
        yield from headline(config, devices, rows_of(config, rows))


def steps(config: DictConfig, plan: BatchPlan, rows: TrainingRows | None) -> Iterator[str]:
    """Yield lines about rows, None of a stream, and optimiser steps."""
    if rows is not None:
        yield f"{rows.examples:,} examples to train on" + ("" if rows.cache else ", if every row can be used")
        if rows.cache is None and (config.data.packing or config.train.tokens_per_batch):
            yield f"{plan.describe()}; how many steps that makes is known once the rows are tokenised"
            return
    if rows is not None and rows.cache is not None:
        yield planned_steps(config, plan, *epoch_size(rows.cache, config)).describe()
    else:
        yield planned_steps(config, plan, rows.examples if rows else 0, tokens=0).describe()
