"""What was found out about a machine: each with what to do about it, and whether it must be done."""

from __future__ import annotations

from dataclasses import dataclass

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
