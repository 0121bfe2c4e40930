"""What was found out about a machine: each with what to do about it, and whether it must be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

OK, NOTE, FIX = "ok", "note", "fix"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `do` is empty where nothing is to be done."""

    group: str
    state: str  # OK, NOTE: good to know, FIX: training would fail or be much slower
    found: str
    do: str = ""


def ok(group: str, found: str) -> Finding:
    return Finding(group, OK, found)


def note(group: str, found: str, do: str) -> Finding:
    return Finding(group, NOTE, found, do)


def fix(group: str, found: str, do: str) -> Finding:
    return Finding(group, FIX, found, do)


def of_each(found: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Return the findings of several devices with their names before them: the same of several is said once.

    Args:
        found: (name, what was found of it); names are like "GPU 0", the last word telling one from the other.
    """
    named: dict[Finding, list[str]] = {}
    for name, findings in found:
        for one in findings:
            named.setdefault(one, []).append(name)
    return [
        replace(one, found=f"{', '.join([names[0], *(name.split()[-1] for name in names[1:])])}: {one.found}")
        for one, names in named.items()
    ]
