"""What the system lets a run have: memory, cores, shared memory, open files; and who else wants them."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tunewright.findings import Finding, fix, note, ok
from tunewright.space import free_bytes
from tunewright.text import listed, size

GROUP = "limits"
SHARED = Path("/dev/shm")
# Ranks of one machine hand each other data there: NCCL some 10 MB for each pair and channel. A container has 64 MB
# unless it is told otherwise.
SHARED_BYTES = 256 * 2**20
FILES = 4096  # open at once: one for each piece of the token cache, connection and library
LITTLE = 2 * 2**30  # bytes of memory: Python, torch and what it is built on take about one
OTHERS = 0.2  # of the cores, taken by others, which training will feel
SECONDS = 0.6  # that others are watched
CGROUP = Path("/sys/fs/cgroup")


def look(ranks: int, root: Path = CGROUP, own: str | None = None) -> list[Finding]:
    """Look at what one user's processes may have here.

    Args:
        ranks: that the configuration starts on this machine.
        root: where the kernel's control groups are.
        own: this process's groups below it, as /proc/self/cgroup has them.
    """
    groups = _groups(root, _text(Path("/proc/self/cgroup")) if own is None else own)
    return [*_memory(groups), *_cores(groups), *_shared_memory(ranks), *_open_files(), *_locked_memory()]


def _groups(root: Path, own: str) -> list[Path]:
    """Return the groups whose limits hold for this process: its own, and those around them up to the root.

    Lines are `0::/jobs/17` (version 2) and `4:memory:/jobs/17` (version 1, a tree for each kind of limit). In a
    container the root is the container's own group.
    """
    found: list[Path] = []
    for line in own.splitlines():
        _, kinds, path = line.split(":", 2)
        top = root / next((kind for kind in kinds.split(",") if kind in ("memory", "cpu")), "")
        folder = top / path.strip("/")
        found += [folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)]
    return found


def _memory(groups: list[Path]) -> Iterator[Finding]:
    free = psutil.virtual_memory()
    told, room = f"{size(free.available)} of {size(free.total)} memory free", free.available
    for group in groups:
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        if limit is not None and limit < free.total and limit - used < room:
            room = limit - used
            told += f"; this container or job may have {size(limit)}, of which {size(used)} are taken"
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield fix(
            GROUP,
            f"A process may address {size(space)} (ulimit -v), of which libraries alone take tens of gigabytes.",
            "ulimit -v unlimited, or have a container or a job limit memory instead.",
        )
    if room < LITTLE:
        yield fix(GROUP, told, "End what takes it, or give the container more: one rank's libraries need about 1 GiB.")
    else:
        yield ok(GROUP, told)


def _cores(groups: list[Path]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((one for one in map(_quota, groups) if one is not None), default=cores)
    if quota < cores:
        yield note(
            GROUP,
            f"{cores} cores, of which this container or job may use {quota:g} at a time.",
            f"Write cluster.threads_per_process={max(int(quota), 1)} (divided by the ranks): more threads wait for "
            f"each other.",
        )
    others, names = _others()
    told = f"{cores} cores, of which other processes use {others:.1f}"
    if others > OTHERS * cores:
        yield note(GROUP, f"{told}: {listed(names, 3)}", "Training will be as much slower: end them or wait.")
    else:
        yield ok(GROUP, told)


def _others() -> tuple[float, list[str]]:
    """Return how many cores processes use that this one did not start, and which they are, the busiest first."""
    before, begun = _times(), time.perf_counter()
    time.sleep(SECONDS)
    after, took = _times(), time.perf_counter() - begun
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    used = {pid: (after[pid][0] - before[pid][0]) / took for pid in after.keys() & before.keys() if pid not in mine}
    busiest = sorted(used, key=lambda pid: -used[pid])
    names = [f"{after[pid][1]} ({pid}, {used[pid]:.1f})" for pid in busiest if used[pid] > 0.05]
    return sum(used.values()), names


def _times() -> dict[int, tuple[float, str]]:
    """Return {process id: (seconds of a core so far, name)} of all processes that can be seen."""
    found = {}
    for process in psutil.process_iter(["cpu_times", "name"]):
        times = process.info["cpu_times"]
        if times is not None:
            found[process.pid] = (times.user + times.system, process.info["name"])
    return found


def _shared_memory(ranks: int) -> Iterator[Finding]:
    if not SHARED.is_dir():
        return
    free = free_bytes(SHARED)
    told = f"{SHARED}: {size(free)} free"
    if free >= SHARED_BYTES:
        yield ok(GROUP, told)
    elif ranks > 1:
        yield fix(GROUP, told, "Ranks of one machine talk through it: docker run --shm-size=8g, or remount it larger.")
    else:
        yield note(GROUP, told, "Enough for one rank; several need docker run --shm-size=8g, or it remounted larger.")


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{'any number of' if soft == resource.RLIM_INFINITY else f'{soft:,}'} open files (ulimit -n)"
    if soft != resource.RLIM_INFINITY and soft < FILES:
        state = fix if soft < FILES // 4 else note
        raised = "" if hard == resource.RLIM_INFINITY or hard >= FILES else ", which an administrator has to allow"
        yield state(GROUP, told, f"ulimit -n {FILES}{raised}")
    else:
        yield ok(GROUP, told)


def _locked_memory() -> Iterator[Finding]:
    """InfiniBand's driver locks the memory that it sends from."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cards = Path("/sys/class/infiniband")
    if cards.is_dir() and any(cards.iterdir()) and soft != resource.RLIM_INFINITY and soft < 2**30:
        yield fix(
            GROUP,
            f"InfiniBand is here, and a process may lock {size(soft)} of memory (ulimit -l).",
            "ulimit -l unlimited; docker run --ulimit memlock=-1",
        )


def _text(file: Path) -> str:
    with suppress(OSError):  # there is no such limit
        return file.read_text(encoding="utf-8").strip()
    return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None  # not "max", and not -1


def _quota(group: Path) -> float | None:
    """Return how many cores' time a group may use, or None for all."""
    allowed, _, period = _text(group / "cpu.max").partition(" ")
    if not period:
        allowed, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return int(allowed) / int(period) if allowed.isdecimal() and period.isdecimal() else None
