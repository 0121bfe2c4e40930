"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tunewright.launch.planning import Plan
from tunewright.plan.choose import ranked
from tunewright.plan.held import PARTS
from tunewright.plan.machine import Machine
from tunewright.plan.option import Option
from tunewright.plan.reasons import settings
from tunewright.plan.support import PARTITIONED
from tunewright.terminal import table
from tunewright.text import MISSING, clock, count, size

TAKEN = ">"
HOST = "in host memory beside"


def plan_text(plan: Plan) -> str:
    """Return the whole plan as text."""
    shown = ranked(plan.ways, plan.best)
    refused = [f"{label(plan, way)}: {way.refusal}" for way in shown if way.refusal]
    parts = [
        "\n".join([*heading(plan), *plan.remarks]),
        table(*ways_table(plan, shown), rule=True),
        *(["\n".join(refused)] if refused else []),
        f"Chosen: {settings(plan.best)}\n  {plan.verdict}" if plan.best else f"Nothing fits. {plan.verdict}",
        "Memory a rank, by part\n" + table(*memory_table(plan, shown), rule=True),
        *(["Time\n" + "\n".join(f"  {line}" for line in time_lines(plan.best))] if plan.best else []),
        *(
            ["What more would take\n" + "\n".join(f"  {what}: {told}" for what, told in plan.further)]
            if plan.further
            else []
        ),
    ]
    return "\n\n".join(parts)


def heading(plan: Plan) -> list[str]:
    """Return lines that say what is planned, and for what."""
    config, weights = plan.config, plan.footprint.weights
    total = weights.trained + weights.frozen
    return [
        f"{config.model.name}, method={config.method.name}: {weights.trained:,} of {total:,} weights are trained; "
        f"rows of up to {config.data.cutoff_len:,} tokens (data.cutoff_len)",
        machine_line(plan.machine),
    ]


def machine_line(machine: Machine) -> str:
    """Return what a plan takes a machine for."""
    kind = "CPU rank" if machine.kind == "cpu" else machine.name
    told = [f"{machine.count} x {kind}, {size(machine.memory)} each"]
    if machine.kind == "cpu":
        told[0] += f" ({machine.name})"
    if machine.rate:
        told.append(f"{machine.rate / 1e12:.3g} TFLOP/s")
    if machine.link and machine.count > 1:
        told.append(f"{machine.link / 1e9:.3g} GB/s between ranks")
    if machine.network and machine.count > machine.node:
        told.append(f"{machine.network / 1e9:.3g} GB/s between hosts of {machine.node}")
    return ", ".join(told) + ("" if machine.here else " (not this machine)")


def label(plan: Plan, way: Option) -> str:
    """Return a short name for the best way of a method and strategy."""
    return way.strategy if way.method == plan.config.method.name else f"{way.method}, {way.strategy}"


def ways_table(plan: Plan, shown: Sequence[Option]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of ways."""
    head = ["", "ranks", "rows at once", "recompute", "memory a rank", "fits", "tokens/s", "time"]
    priced = any(way.pace and way.pace.price is not None for way in shown)
    rows = []
    for way in shown:
        row = [f"{TAKEN if way is plan.best else ' '} {label(plan, way)}", str(way.ranks)]
        if way.memory is None:
            row += [MISSING, MISSING, MISSING, "refused", MISSING, MISSING]
        else:
            row += [
                str(way.micro_batch),
                _recomputing(plan, way),
                size(way.memory.needed),
                "yes" if way.fits else "no",
                count(way.pace.tokens_per_second) if way.pace else MISSING,
                duration(way),
            ]
        rows.append([*row, *([cost(way)] if priced else [])])
    return [*head, *(["cost"] if priced else [])], rows


def _recomputing(plan: Plan, way: Option) -> str:
    if way.layers is not None:
        return f"{way.layers} of {len(plan.footprint.weights.layers)} layers"
    return "all layers" if way.recompute else "no"


def duration(way: Option) -> str:
    taken = way.pace.hours if way.pace else None
    return MISSING if taken is None else clock(3600 * taken)


def cost(way: Option) -> str:
    paid = way.pace.cost if way.pace else None
    return MISSING if paid is None else f"{paid:,.2f}"


def memory_table(plan: Plan, shown: Sequence[Option]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of memory by part, a column for each way."""
    ways = [way for way in shown if way.memory]
    unit = "GiB" if max((way.memory.needed for way in ways if way.memory), default=0) >= 2**32 else "MiB"
    scale, digits = (2**30, 2) if unit == "GiB" else (2**20, 1)
    lines = []
    for part, name in {**PARTS, "needed": "all", "host": HOST}.items():
        values = [getattr(way.memory, part) for way in ways]
        if any(values):
            lines.append([name, *(f"{value / scale:.{digits}f}" for value in values)])
    return [unit, *(label(plan, way) for way in ways)], lines


def time_lines(way: Option) -> list[str]:
    """Return lines about how long the chosen way takes."""
    pace = way.pace
    if pace is None:
        return ["How fast these devices are is not known."]
    both = pace.compute_seconds + pace.communication_seconds
    others = "the optimiser" + (" and what DeepSpeed does at each module" if way.strategy in PARTITIONED else "")
    rest = f"; the rest is {others}" if pace.seconds > 1.01 * both else ""
    told = [
        f"a step of about {pace.tokens_per_step:,.0f} tokens, {_rounded(pace.flops_per_step / 1e12)} TFLOP: "
        f"{pace.seconds:.3g} s, of which computing {pace.compute_seconds:.3g} s and communication "
        f"{pace.communication_seconds:.3g} s, which hide each other in part{rest}",
        pace.reason,
    ]
    if pace.hours is not None:
        paid = "" if pace.cost is None else f", which cost {cost(way)}"
        told.append(f"{pace.steps:,} steps: {duration(way)}{paid}")
    return told


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return all of a plan; bytes, seconds, FLOP and tokens as numbers."""
    return {
        "model": plan.config.model.name,
        "method": plan.config.method.name,
        "cutoff_len": plan.config.data.cutoff_len,
        "weights": {"trained": plan.footprint.weights.trained, "frozen": plan.footprint.weights.frozen},
        "machine": asdict(plan.machine),
        "chosen": plan.ways.index(plan.best) if plan.best else None,
        "verdict": plan.verdict,
        "ways": [_way_json(way) for way in plan.ways],
        "further": dict(plan.further),
        "remarks": plan.remarks,
    }


def _way_json(way: Option) -> dict[str, Any]:
    told = {**asdict(way), "fits": way.fits}
    if way.memory:
        told["memory"]["needed"] = way.memory.needed
    if way.pace:
        told["pace"] |= {key: getattr(way.pace, key) for key in ("tokens_per_second", "hours", "cost")}
    return told
