"""A plan as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.errors import StorageError
from tunewright.files import write_text
from tunewright.launch.plan_text import TAKEN, heading, label, memory_table, time_lines, ways_table
from tunewright.launch.planning import Plan
from tunewright.pages import render_page
from tunewright.plan.choose import ranked
from tunewright.plan.held import PARTS
from tunewright.plan.option import Option
from tunewright.plan.reasons import settings
from tunewright.text import size


def write_plan(plan: Plan, file: Path) -> None:
    """Write the page of a plan.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        write_text(file, plan_html(plan))
    except OSError as error:
        raise StorageError(f"Cannot write {file}: {error.strerror}.") from error


def plan_html(plan: Plan) -> str:
    """Return the page of a plan."""
    shown = ranked(plan.ways, plan.best)
    title, machine = heading(plan)
    return render_page(
        "plan.html.jinja",
        title=f"Plan: {plan.config.model.name}, {plan.config.method.name}",
        heading=f"Plan for {plan.config.model.name}",
        summary=title,
        machine=machine,
        remarks=plan.remarks,
        chosen=settings(plan.best) if plan.best else None,
        verdict=plan.verdict,
        ways=ways_table(plan, shown),
        taken=TAKEN,
        refused=[(label(plan, way), way.refusal) for way in shown if way.refusal],
        memory=memory_table(plan, shown),
        bars=_bars(plan, shown),
        names=list(PARTS.values()),
        time=time_lines(plan.best) if plan.best else [],
        further=plan.further,
    )


def _bars(plan: Plan, shown: Sequence[Option]) -> list[dict[str, Any]]:
    """Return a bar for each way, with where the memory of a rank ends, in percent of the longest bar."""
    ways = [way for way in shown if way.memory]
    longest = max((max(way.memory.needed, way.room) for way in ways if way.memory), default=1)
    return [
        {
            "label": label(plan, way),
            "room": 100 * way.room / longest,
            "parts": [
                (number, f"{name}: {size(getattr(way.memory, part))}", 100 * getattr(way.memory, part) / longest)
                for number, (part, name) in enumerate(PARTS.items())
            ],
        }
        for way in ways
    ]
