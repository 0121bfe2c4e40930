"""The clock by itself, without a network: whether it is kept in step, and whether files come from its future."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tunewright.findings import Finding, fix, note, ok

GROUP = "clock"
FUTURE = 120.0  # seconds
UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def look(folders: dict[str, Path]) -> list[Finding]:
    """Look at the kernel's word on its clock, and at the newest file of folders that outlive a boot."""
    return [*_future(folders), *_kept()]


def _future(folders: dict[str, Path]) -> Iterator[Finding]:
    for use, folder in folders.items():
        times = [one.stat().st_mtime for one in folder.iterdir()] if folder.is_dir() else []
        ahead = max(times, default=0.0) - time.time()
        if ahead > FUTURE:
            yield fix(
                GROUP,
                f"{use} {folder} holds files that are {ahead:,.0f} s younger than now.",
                "The clock here is behind, or that of the disk's server ahead: have both set by NTP (timedatectl). "
                "What is newest, a checkpoint or a cache, is told by time.",
            )


def _kept() -> Iterator[Finding]:
    if sys.platform != "linux":
        return
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))  # all zeros: it changes nothing
    if state == UNSYNCHRONISED:
        yield note(
            GROUP,
            "Nobody keeps the clock in step, as far as the kernel knows.",
            "timedatectl set-ntp true, or chronyd, on the host: logs of several machines are put side by side by time.",
        )
    elif state >= 0:
        yield ok(GROUP, "kept in step (adjtimex)")
