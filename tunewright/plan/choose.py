"""What each way to run a configuration needs on a machine, and which one is taken.

The fastest that fits is taken, of those that the settings leave open; where several are as fast, the simplest. Other
ways, another method among them, are worked out to be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import product

from omegaconf import DictConfig

from tunewright.config.schema import STRATEGIES
from tunewright.plan.architecture import Architecture
from tunewright.plan.auto import AUTO
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import Devices
from tunewright.plan.footprint import Footprint
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine
from tunewright.plan.memory import memory_of
from tunewright.plan.option import Option
from tunewright.plan.pace import pace_of
from tunewright.plan.reached import known_here, way_of, with_ratio
from tunewright.plan.rules import world_size
from tunewright.plan.ways import (
    agrees,
    largest_batch,
    micro_batches,
    recomputations,
    refusal,
    strategies,
    with_strategy,
)

FREE = 0.1  # of a rank's memory, which a run leaves free that finds out itself how few layers have to recompute
SPARE = 0.05  # of a rank's memory, left free where something as good leaves it: a plan is no measurement
AMPLE = 0.8  # of a rank's memory: up to here more rows at once cost nothing
ALIKE = 1.02  # times the seconds of a token of the fastest: what differs by less is as fast


def options(
    configs: Sequence[DictConfig],
    machine: Machine,
    devices: Devices,
    architecture: Architecture,
    footprints: Sequence[Footprint],
    *,
    rows: int | None = None,
    tokens: int | None = None,
    price: float | None = None,
) -> list[Option]:
    """Return the ways to run whose micro-batches the footprints have, the refused ones too.

    Args:
        configs: the configuration, then the same with other methods.
        footprints: of each of them, with passes of its `batches`.
        rows: that train, or packs of them with packing, where that is known; `tokens`: those of all of them.
        price: of a device for an hour.
    """
    found: list[Option] = []
    known = known_here(configs[0], machine)
    for config, footprint in zip(configs, footprints, strict=True):
        passes = {one.batch: one for one in footprint.passes}
        weights = footprint.weights
        whole = weights.trained + weights.frozen
        for strategy, recompute in product(strategies(config, devices), recomputations(config, architecture)):
            one = with_strategy(config, strategy)
            one.train.gradient_checkpointing = recompute
            ranks = world_size(one, devices)
            reason: str | None = ""
            used = machine.of(ranks)
            for micro_batch in micro_batches(config, devices, ranks):
                one.train.micro_batch_size = micro_batch
                batch = largest_batch(one, devices, architecture)
                if batch not in passes:
                    continue
                # Its size decides nothing about what goes together: the first is asked for all.
                reason = refusal(one, devices, architecture) if reason == "" else reason
                way = Option(
                    method=config.method.name,
                    strategy=strategy,
                    ranks=ranks,
                    micro_batch=micro_batch,
                    recompute=recompute,
                    refusal=reason,
                    memory=None,
                    room=used.memory,
                    pace=None,
                    host_room=used.host_memory and used.host_memory / min(ranks, used.node),
                    configured=config is configs[0] and agrees(config, strategy, micro_batch, recompute=recompute),
                )
                if reason is None:
                    data = config.data
                    plan = batch_plan(one.train, ranks, cutoff_len=data.cutoff_len, packing=data.packing)
                    told = one, footprint, passes[batch], plan, used
                    ratio = known.memory_ratio(way_of(one, used, weights.trained, whole, recompute=recompute))
                    way = replace(
                        way,
                        memory=with_ratio(memory_of(*told), ratio),
                        pace=pace_of(*told, rows=rows, tokens=tokens, price=price, known=known),
                    )
                found.append(way)
        if config.train.gradient_checkpointing == AUTO and not config.data.streaming:
            found += _partly([way for way in found if way.method == config.method.name], len(weights.layers))
    return found


def _partly(ways: Sequence[Option], layers: int) -> Iterator[Option]:
    """Yield ways in which as few layers recompute as have to, of so many, where not all can keep their activations.

    What they take lies between what it takes where none and where all recompute, in proportion.
    """
    keeping = {(way.strategy, way.micro_batch): way for way in ways if not way.recompute}
    for every in ways:
        none = keeping.get((every.strategy, every.micro_batch))
        if not every.recompute or none is None or none.fits:
            continue
        if not (none.memory and every.memory and none.pace and every.pace):
            continue
        room, more = (1 - FREE) * every.room - every.memory.needed, none.memory.needed - every.memory.needed
        kept = math.floor(layers * room / more) if more > 0 else 0
        if 0 < kept < layers:
            share = kept / layers
            parts = {
                part.name: (getattr(every.memory, part.name), getattr(none.memory, part.name))
                for part in fields(Memory)
            }
            memory = Memory(**{name: round(some + share * (most - some)) for name, (some, most) in parts.items()})
            faster = {
                name: getattr(every.pace, name) + share * (getattr(none.pace, name) - getattr(every.pace, name))
                for name in ("compute_seconds", "seconds")
            }
            yield replace(every, layers=layers - kept, memory=memory, pace=replace(every.pace, **faster))


def chosen(ways: Iterable[Option]) -> Option | None:
    """Return what is taken of the ways that the settings leave open, or None where none of them fits."""
    return best_of(way for way in ways if way.configured)


def best_of(ways: Iterable[Option]) -> Option | None:
    """Return the simplest of the fastest ways that fit, with some memory to spare where there is one that has it."""
    fitting = [way for way in ways if way.fits]
    fitting = [way for way in fitting if way.share <= 1 - SPARE] or fitting
    fastest = min((way.seconds for way in fitting), default=0.0)
    alike = [way for way in fitting if way.seconds <= ALIKE * fastest]
    return min(alike, key=_simple, default=None)


def ranked(ways: Sequence[Option], best: Option | None) -> list[Option]:
    """Return the best way of each strategy, and of each other method.

    That is what is taken, else the fastest that fits, else what needs the least. The fastest come first, those that do
    not fit behind them, the least first, and the refused last.
    """
    method = ways[0].method if ways else ""
    groups: dict[str, list[Option]] = {}
    for way in ways:
        if way.method == method or way.refusal is None:
            groups.setdefault(way.strategy if way.method == method else way.method, []).append(way)
    shown = [best if best and best in group else best_of(group) or min(group, key=_order) for group in groups.values()]
    found: list[Option] = []
    rest = sorted(shown, key=_order)
    while rest:  # those that are as fast as the first together, the simplest of them first
        alike = [way for way in rest if way.fits and way.seconds <= ALIKE * rest[0].seconds]
        alike = sorted(alike, key=_simple) or rest
        found += alike
        rest = [way for way in rest if way not in alike]
    return found


def _order(way: Option) -> tuple[float, ...]:
    if way.refusal is not None:
        return (2, STRATEGIES.index(way.strategy))
    return (0, way.seconds, way.share) if way.fits else (1, way.share, way.seconds)


def _simple(way: Option) -> tuple[float, ...]:
    """Order ways that are as fast: of micro-batches the largest that leaves much memory free, else the smallest.

    Rows may be much shorter than the longest, which the plan is for, and then few of them leave a GPU waiting.
    """
    ample = way.share <= AMPLE
    return (STRATEGIES.index(way.strategy), way.recompute, not ample, -way.micro_batch if ample else way.micro_batch)
