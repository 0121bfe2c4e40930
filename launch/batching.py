"""How a global batch is shared out: the same rows per optimiser step for any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from omegaconf import DictConfig

from launch.errors import ConfigError
from launch.schema import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class BatchPlan:
    """Rows of a step: `global_batch` in all, on each rank `accumulation` batches of at most `micro_batch`."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps of one pass over `rows` rows; the last one may hold fewer rows."""
        return math.ceil(rows / self.global_batch)

    def describe(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return (
            f"{self.global_batch} rows a step = {ranks} x {self.accumulation} micro-batches of "
            f"at most {self.micro_batch}"
        )

    def share(self, rows: list[T], rank: int) -> list[list[T]]:
        """Return the micro-batches of `rank` for one optimiser step; some are empty in an epoch's last step.

        Every rank gets the same number of micro-batches, so that collective operations stay in step.
        """
        per_rank = math.ceil(len(rows) / self.world_size)
        mine = rows[rank * per_rank : (rank + 1) * per_rank]
        size = math.ceil(len(mine) / self.accumulation)
        return [mine[index * size : (index + 1) * size] for index in range(self.accumulation)]


def batch_plan(train: TrainConfig, world_size: int) -> BatchPlan:
    """Work out micro-batches and accumulation from the settings.

    Raises:
        ConfigError: a size below 1, both or neither of the two ways to say the global batch, or more ranks than rows.
    """
    micro, total, accumulation = train.micro_batch_size, train.global_batch_size, train.gradient_accumulation_steps
    for key, value in (
        ("micro_batch_size", micro),
        ("global_batch_size", total),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"`train.{key}` is {value}: write a whole number from 1.")
    if accumulation is not None and total is not None:
        raise ConfigError(
            f"`train.global_batch_size` is {total} and `train.gradient_accumulation_steps` is {accumulation}: "
            f"set one and write the other as null."
        )
    if accumulation is not None:
        return BatchPlan(micro * accumulation * world_size, world_size, micro, accumulation)
    if total is None:
        raise ConfigError("Set `train.global_batch_size` or `train.gradient_accumulation_steps`: both are null.")
    if total < world_size:
        raise ConfigError(
            f"`train.global_batch_size` is {total}, less than the {world_size} ranks: each rank needs a row at least. "
            f"Write {world_size} or more."
        )
    per_rank = math.ceil(total / world_size)
    accumulation = math.ceil(per_rank / micro)
    return BatchPlan(total, world_size, math.ceil(per_rank / accumulation), accumulation)


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of a run, and why so many."""

    total: int
    per_epoch: int | None  # None for a stream, whose length nobody knows
    epochs: float | None
    batch: str  # how the rows of a step are shared out

    def describe(self) -> str:
        total = f"{self.total:,} optimiser step{'' if self.total == 1 else 's'}"
        if self.per_epoch is None:
            return f"{total} (train.max_steps); {self.batch}"
        return f"{total}: {self.per_epoch:,} an epoch, {self.epochs:.3g} epochs; {self.batch}"


def planned_steps(config: DictConfig, plan: BatchPlan, examples: int) -> Steps:
    """Return the optimiser steps that a configuration takes with this many training examples."""
    train = config.train
    if config.data.streaming:
        return Steps(int(train.max_steps), None, None, plan.describe())
    per_epoch = plan.steps_per_epoch(examples)
    if train.max_steps:
        epochs = train.max_steps / per_epoch if per_epoch else 0.0
        return Steps(int(train.max_steps), per_epoch, epochs, plan.describe())
    return Steps(math.ceil(per_epoch * train.epochs), per_epoch, float(train.epochs), plan.describe())
