"""The folders that a run writes to: whether they can be written, how much is free, how fast they are."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tunewright.findings import Finding, fix, note, ok
from tunewright.space import existing, free_bytes, refusal
from tunewright.text import size

GROUP = "disks"
# A LoRA's checkpoints take some hundred megabytes, those of a whole 7B model some hundred gigabytes.
FULL, TIGHT = 2**30, 20 * 2**30  # bytes
SLOW = 50 * 2**20  # bytes/s: a checkpoint of 1 GB takes 20 s, in which nothing is trained
PROBE = 2**20  # bytes, written again and again
PROBES, PROBE_SECONDS = 64, 0.7
NODES = 1000  # files that can still be made
# A folder of these lies on other machines; Linux's locks work on them as far as they are set up to.
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "fuse")


def look(folders: dict[str, Path]) -> list[Finding]:
    """Look at each folder, by what it is for; the speed of each disk is measured once."""
    found: list[Finding] = []
    disks: dict[int, list[tuple[str, Path]]] = {}
    for use, folder in folders.items():
        told = refusal(folder)
        if told is None:
            disks.setdefault(existing(folder).stat().st_dev, []).append((use, folder))
        else:
            found.append(
                fix(
                    GROUP,
                    f"{use} {folder} cannot be written: {told} ({size(free_bytes(folder))} free).",
                    "Make room there, see whose folder it is, or choose another one by that setting.",
                )
            )
    for places in disks.values():
        found += _disk(places)
    return found


def _disk(places: list[tuple[str, Path]]) -> Iterator[Finding]:
    """Tell of one disk; `places` are what lies on it."""
    folder = existing(places[0][1])
    uses = ", ".join(f"{use} {path}" for use, path in places)
    free, kind = free_bytes(folder), _file_system(folder)
    speed = _speed(folder) if free > FULL else None
    told = f"{uses}: {size(free)} free" + (f", {size(speed)}/s" if speed else "") + (f", {kind}" if kind else "")
    nodes = os.statvfs(folder)
    if free < FULL:
        yield fix(GROUP, told, "Make room: a checkpoint that finds none ends the run.")
    elif nodes.f_files and nodes.f_favail < NODES:
        yield fix(GROUP, f"{told}, but only {nodes.f_favail} more files", "Delete files: each needs an inode.")
    elif speed and speed < SLOW:
        yield note(GROUP, told, "Slow: train.save_steps decides how often a checkpoint is written.")
    elif free < TIGHT:
        yield note(GROUP, told, "Enough for adapters; a whole model's checkpoint takes up to 16 bytes a parameter.")
    else:
        yield ok(GROUP, told)
    if kind.startswith(REMOTE):
        yield note(
            GROUP,
            f"{uses} lies on {kind}, on another machine.",
            "Keep data.cache_dir (the variable TUNEWRIGHT_CACHE) on a disk of this machine where it has one.",
        )


def _speed(folder: Path) -> float | None:
    """Return how many bytes a second come to the disk itself; None where it refuses meanwhile."""
    block = os.urandom(PROBE)  # not zeros, which some file systems do not write
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            begun = time.perf_counter()
            for number in range(PROBES):
                probe.write(block)
                if number % 8 == 7:
                    probe.flush()
                    os.fsync(probe.fileno())
                    if time.perf_counter() - begun > PROBE_SECONDS:
                        break
            return (number + 1) * PROBE / (time.perf_counter() - begun)
    except OSError:  # a quota, which `refusal` would have told were it smaller
        return None


def _file_system(folder: Path) -> str:
    """Return the kind of file system that a folder lies on: ext4, overlay, nfs4."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(one)] for one in (folder.resolve(), *folder.resolve().parents) if str(one) in mounts), "")
