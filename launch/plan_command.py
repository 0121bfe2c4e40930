"""`tunewright plan`: what a configuration needs, how long it takes and what is best, before a device is booked."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable

from tunewright.config.compose import compose_config
from tunewright.config.schema import Source
from tunewright.errors import ConfigError, MemoryShortage
from tunewright.launch.plan_page import write_plan
from tunewright.launch.plan_text import plan_json, plan_text
from tunewright.launch.planning import Plan, make_plan
from tunewright.launch.trial import measure
from tunewright.pages import check_replaceable
from tunewright.plan.auto import settle
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.machine import machine_here, parse_machine
from tunewright.plan.memory import memory_of
from tunewright.plan.option import Option
from tunewright.plan.rules import check
from tunewright.plan.ways import at, devices_of, largest_batch


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run `tunewright plan`, and return its exit code: that of `MemoryShortage` where nothing fits.

    Raises:
        ConfigError, StorageError: see `check` and `make_plan`; or the page cannot be written, or its file is somebody's
            own.
    """
    if args.html:
        check_replaceable(args.html, args.html, "name another file with --html")
    if args.measure and args.devices is not None:
        raise ConfigError(f"`--measure` trains on the devices here, and `--devices` is {args.devices}: leave one out.")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ConfigError(f"`--price` is {args.price:g}: write what a device costs for an hour, such as 2.5.")
    config = compose_config(args.overrides, args.config_dir, choose=None)
    here = find_devices()
    elsewhere = parse_machine(args.devices) if args.devices is not None else None
    trial = config.copy()
    settle(trial)
    check(trial, devices_of(elsewhere, here.cores) if elsewhere else here)  # what is wrong in every way to run
    machine = elsewhere or machine_here(here, config)
    if machine.kind == "cpu" or config.model.source is Source.embedded:
        settle(config)  # as training does, where there is nothing to choose
    plan = make_plan(config, machine, here.cores, price=args.price)
    if args.measure and plan.best:
        _measure(plan, plan.best)
        plan = make_plan(config, machine, here.cores, price=args.price)
    if args.html:  # before anything is printed: who reads that may go away
        write_plan(plan, args.html)
    say(json.dumps(plan_json(plan), indent=2) if args.json else plan_text(plan))
    if args.html:
        print(f"\nThe same as a page: {args.html}", file=sys.stderr if args.json else sys.stdout)
    return 0 if plan.best else MemoryShortage.exit_code


def _measure(plan: Plan, way: Option) -> None:
    """Train some steps in a way to run here: what is seen counts in the plans that come after.

    Raises:
        ConfigError, TunewrightError: see `measure`.
    """
    settled, rows = at(plan.config, way), plan.rows
    machine = plan.machine.of(way.ranks)
    found = plan.footprint.of(largest_batch(settled, plan.devices, plan.architecture))
    data = settled.data
    batches = batch_plan(settled.train, way.ranks, cutoff_len=data.cutoff_len, packing=data.packing)
    # Not as it stands in the plan, which an earlier measurement may have changed.
    memory = memory_of(settled, plan.footprint, found, batches, machine)
    mean = rows.tokens / rows.units if rows.tokens and rows.units else None
    measure(settled, plan.footprint, found, memory, machine, plan.devices, mean=mean)
