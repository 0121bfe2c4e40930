"""How a global batch is shared out: the same rows per optimiser step for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from omegaconf import DictConfig

from tunewright.config.schema import DataConfig, TrainConfig
from tunewright.errors import ConfigError

MOST_MICRO_BATCHES = 65_536  # of a rank in a step


@dataclass(frozen=True)
class BatchPlan:
    """What a step trains on: `global_batch` units in all, on each rank `accumulation` batches of at most `micro_batch`.

    A unit is a row, or with packing a pack of rows. With `tokens`, a step has about so many tokens instead, and any
    number of rows.
    """

    global_batch: int | None
    world_size: int
    micro_batch: int
    accumulation: int
    tokens: int | None = None
    unit: str = "row"

    def steps_per_epoch(self, units: int, tokens: int = 0) -> int:
        """Optimiser steps of one pass over so many units, which hold so many tokens; the last may have fewer units."""
        if self.global_batch is None:
            return math.ceil(tokens / (self.tokens or 1))
        return math.ceil(units / self.global_batch)

    def describe(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        parts = f"{self.accumulation} micro-batch{'' if self.accumulation == 1 else 'es'}"
        if self.global_batch is None:
            return f"about {self.tokens:,} tokens a step, in any number of rows = {ranks} x {parts}"
        return f"{self.global_batch} {self.unit}s a step = {ranks} x {parts} of at most {self.micro_batch}"

    def share(self, costs: Sequence[int], rank: int) -> list[list[int]]:
        """Return the micro-batches of `rank` for one optimiser step, as positions in `costs`, the tokens of each unit.

        Every rank gets the same number of micro-batches, so that collective operations stay in step, and about the
        same tokens, so that none waits for another. Some micro-batches are empty in an epoch's last step.
        """
        most = len(costs) if self.global_batch is None else self.micro_batch
        mine = deal(costs, self.world_size, most * self.accumulation)[rank]
        parts = deal([costs[position] for position in mine], self.accumulation, most)
        return [[mine[position] for position in part] for part in parts]


def deal(costs: Sequence[int], parts: int, most: int) -> list[list[int]]:
    """Deal positions out into `parts` of like cost, at most `most` in each: the dearest first, to the cheapest part.

    (Graham 1969, "longest processing time first".) `parts` times `most` have to hold all.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    cheapest = [(0, part) for part in range(parts)]  # a heap of (cost so far, part), those with room only
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        cost, part = heappop(cheapest)
        dealt[part].append(position)
        if len(dealt[part]) < most:
            heappush(cheapest, (cost + costs[position], part))
    return [sorted(part) for part in dealt]


def batch_plan(
    train: TrainConfig, world_size: int, *, cutoff_len: int = DataConfig.cutoff_len, packing: bool = False
) -> BatchPlan:
    """Work out micro-batches and accumulation from the settings; `cutoff_len` and `packing` are those of the data.

    Raises:
        ConfigError: a size that is no number from 1, none or several of the ways to say the global batch, or more ranks
            than rows.
    """
    micro, total, accumulation = train.micro_batch_size, train.global_batch_size, train.gradient_accumulation_steps
    if isinstance(micro, (str, bool)):
        raise ConfigError(f"`train.micro_batch_size` is '{micro}': write a whole number from 1, or auto.")
    ways = {
        "global_batch_size": total,
        "gradient_accumulation_steps": accumulation,
        "tokens_per_batch": train.tokens_per_batch,
    }
    for key, value in {"micro_batch_size": micro, **ways}.items():
        if value is not None and value < 1:
            raise ConfigError(f"`train.{key}` is {value}: write a whole number from 1.")
    given = {key: value for key, value in ways.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"`train.{key}` is {value}" for key, value in given.items())
        raise ConfigError(f"{said}: set one and write the other as null.")
    if train.tokens_per_batch is not None:
        return _doable(_token_plan(train.tokens_per_batch, world_size, micro, cutoff_len))
    unit = "pack" if packing else "row"
    if accumulation is not None:
        return _doable(BatchPlan(micro * accumulation * world_size, world_size, micro, accumulation, unit=unit))
    if total is None:
        raise ConfigError(
            "Set `train.global_batch_size`, `train.gradient_accumulation_steps` or `train.tokens_per_batch`: "
            "all are null."
        )
    if total < world_size:
        raise ConfigError(
            f"`train.global_batch_size` is {total}, less than the {world_size} ranks: each rank needs a {unit} at "
            f"least. Write {world_size} or more."
        )
    per_rank = math.ceil(total / world_size)
    return _doable(BatchPlan(total, world_size, min(micro, total), math.ceil(per_rank / micro), unit=unit))


def _doable(plan: BatchPlan) -> BatchPlan:
    if plan.accumulation > MOST_MICRO_BATCHES:
        raise ConfigError(
            f"{plan.describe()}: more than {MOST_MICRO_BATCHES:,} micro-batches, the first step would not end. Lower "
            f"train.global_batch_size, train.gradient_accumulation_steps or train.tokens_per_batch, or raise "
            f"train.micro_batch_size."
        )
    return plan


def _token_plan(tokens: int, world_size: int, micro: int, cutoff_len: int) -> BatchPlan:
    """Micro-batches have to be no larger than the largest that `micro_batch_size` rows could make."""
    least = 2 * cutoff_len * world_size
    if tokens < least:
        raise ConfigError(
            f"`train.tokens_per_batch` is {tokens}: with rows of up to {cutoff_len} tokens (`data.cutoff_len`) and "
            f"{world_size} rank{'' if world_size == 1 else 's'}, a step could be left without a row. Write {least} or "
            f"more, or a smaller data.cutoff_len."
        )
    accumulation = math.ceil(tokens / world_size / (micro * cutoff_len))
    return BatchPlan(None, world_size, micro, accumulation, tokens=tokens)


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


def planned_steps(config: DictConfig, plan: BatchPlan, units: int, tokens: int) -> Steps:
    """Return the optimiser steps that a configuration takes with so many rows or packs, which hold so many tokens."""
    train = config.train
    if config.data.streaming:
        return Steps(int(train.max_steps), None, None, plan.describe())
    per_epoch = plan.steps_per_epoch(units, tokens)
    if train.max_steps:
        epochs = train.max_steps / per_epoch if per_epoch else 0.0
        return Steps(int(train.max_steps), per_epoch, epochs, plan.describe())
    return Steps(math.ceil(per_epoch * train.epochs), per_epoch, float(train.epochs), plan.describe())
