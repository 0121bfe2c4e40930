"""What a configuration needs on devices here or elsewhere, and the best way to run it there.

No weight is read: the model's shapes are worked out from its config.json, in a process of its own that has torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from omegaconf import DictConfig

from tunewright.errors import ConfigError
from tunewright.launch.ask_torch import ensure_architecture, ensure_footprints
from tunewright.launch.row_counts import Rows, count_rows
from tunewright.launch.writable_cache import use_writable_cache
from tunewright.plan.architecture import Architecture
from tunewright.plan.choose import chosen, options
from tunewright.plan.devices import Devices
from tunewright.plan.footprint import Footprint
from tunewright.plan.further import deeper
from tunewright.plan.machine import Machine, machine_here
from tunewright.plan.option import Option
from tunewright.plan.reasons import reason, settings, shortage
from tunewright.plan.ways import batches, devices_of, largest_batch, other_methods
from tunewright.text import clock, size
from tunewright.trainer.footprint.footprints import find_footprint
from tunewright.trainer.model.meta_model import find_architecture


@dataclass(frozen=True)
class Plan:
    """The ways to run a configuration on a machine, and what is to be said of them."""

    config: DictConfig
    machine: Machine
    devices: Devices
    architecture: Architecture
    footprint: Footprint
    rows: Rows
    ways: list[Option]
    best: Option | None
    verdict: str  # why it is the best, or that nothing fits
    further: list[tuple[str, str]]  # a change, and what it would take
    remarks: list[str]


def make_plan(
    config: DictConfig,
    machine: Machine,
    cores: int,
    *,
    whole: bool = True,
    price: float | None = None,
    rows: Rows | None = None,
) -> Plan:
    """Plan a configuration for a machine.

    Args:
        price: of a device for an hour.
        whole: look at other methods too, and at what more would take; else only at what the settings leave open.
        rows: that train; they are counted where they are not given and the plan is to be whole.

    Raises:
        ConfigError: the model is not known, or what is configured cannot run.
        StorageError: the model's config.json cannot be had, or the cache not be written.
    """
    devices = devices_of(machine, cores)
    remarks = use_writable_cache(config)
    architecture = ensure_architecture(config)
    configs, looked_at = [config], batches(config, devices, architecture)
    if whole:
        configs += other_methods(config, devices, architecture)
        beyond = batches(_longer(config), devices, architecture)
        looked_at += [batch for batch in beyond if batch.rows == 1]
    footprints = ensure_footprints(configs, machine.kind, looked_at)
    rows = rows or (count_rows(config) if whole else Rows())
    look = partial(
        options,
        machine=machine,
        devices=devices,
        architecture=architecture,
        rows=rows.units,
        tokens=rows.tokens,
        price=price,
    )
    ways = look(configs, footprints=footprints)
    if ways and all(way.refusal for way in ways if way.configured):
        raise ConfigError(shortage(ways))
    best = chosen(ways)
    alone = "as `auto` is on a CPU and for the embedded model" if config.automatic else "as configured"
    return Plan(
        config=config,
        machine=machine,
        devices=devices,
        architecture=architecture,
        footprint=footprints[0],
        rows=rows,
        ways=ways,
        best=best,
        verdict=reason(ways, best, alone=alone) if best else footprints[0].problem or shortage(ways),
        further=_further(config, footprints[0], look) if whole and best else [],
        remarks=[*remarks, *([rows.remark] if rows.remark else [])],
    )


def _further(config: DictConfig, footprint: Footprint, look: Callable[..., list[Option]]) -> list[tuple[str, str]]:
    """Return what longer rows, a deeper model and a larger global batch would take."""
    longer = _longer(config)
    told = [
        (f"rows of {longer.data.cutoff_len:,} tokens", look([longer], footprints=[footprint])),
        ("a model twice as deep", look([config], footprints=[deeper(footprint, 2)])),
    ]
    if config.train.global_batch_size:
        wider = deepcopy(config)
        wider.train.global_batch_size *= 2
        told.append((f"{wider.train.global_batch_size:,} rows a step", look([wider], footprints=[footprint])))
    return [(change, _takes(ways)) for change, ways in told]


def _longer(config: DictConfig) -> DictConfig:
    """Return the configuration with rows twice as long, one of them at a time."""
    longer = deepcopy(config)
    longer.data.cutoff_len *= 2
    longer.train.micro_batch_size = 1
    return longer


def _takes(ways: Sequence[Option]) -> str:
    """Say what the best of some ways needs, or that none fits."""
    best = chosen(ways)
    if best is None or best.memory is None:
        return shortage(ways)
    pace = f", {best.pace.tokens_per_second:,.0f} tokens/s" if best.pace else ""
    return f"{size(best.memory.needed)} of {size(best.room)} a rank{pace}, with {settings(best)}"


def headline(config: DictConfig, devices: Devices, rows: Rows | None = None) -> list[str]:
    """Return a line about what is planned for a configuration that leaves nothing open.

    Nothing is asked, because no start waits for it: of a model that is not known yet there is no line.
    """
    architecture, machine = find_architecture(config), machine_here(devices, config)
    if architecture is None:
        return []
    footprint = find_footprint(config, machine.kind, [largest_batch(config, devices, architecture)])
    if footprint is None:
        return []
    rows = rows or Rows()
    ways = options([config], machine, devices, architecture, [footprint], rows=rows.units, tokens=rows.tokens)
    return [_in_a_line(way) for way in ways if way.configured and way.memory]


def _in_a_line(way: Option) -> str:
    assert way.memory is not None
    told = f"Planned: {size(way.memory.needed)} of {size(way.room)} a rank ({way.memory.by_part(most=4)})"
    if way.pace is None:
        return told
    hours = way.pace.hours
    taken = "" if hours is None else f", {clock(3600 * hours)} for {way.pace.steps:,} steps"
    return f"{told}; {way.pace.tokens_per_second:,.0f} tokens/s{taken}: {way.pace.reason}"
