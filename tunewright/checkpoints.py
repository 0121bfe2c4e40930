"""A checkpoint as it lies on disk, and whether it is whole.

checkpoints/checkpoint-40/checkpoint.json   the record: what wrote it, and size and SHA-256 of each file
                         /...               what transformers and DeepSpeed write
checkpoints/.part/                          one that is being written

A checkpoint is written aside, and its folder renamed when every rank has written and the record holds every file: a
folder without a record that fits has been interrupted, damaged, or is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.files import bring_to_disk, write_json
from tunewright.trees import digest

RECORD = "checkpoint.json"
PART = ".part"
PREFIX = "checkpoint-"
FORMAT = 1
BLOCK = 1 << 20
HASHING_THREADS = 8


@dataclass(frozen=True)
class Damage:
    """A checkpoint that cannot be used, and what is wrong with it."""

    path: Path
    problems: tuple[str, ...]

    def __str__(self) -> str:
        shown = "; ".join(self.problems[:3])
        more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        return f"{self.path.name} is damaged: {shown}{more}"


def step_of(path: Path) -> int | None:
    """Return N of `checkpoint-N`, or None for any other name."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if path.name.startswith(PREFIX) and number.isdecimal() else None


def listed(folder: Path) -> list[Path]:
    """Return everything in a folder that is called like a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(folder: Path, *, hashed: bool) -> tuple[Path | None, list[Damage]]:
    """Return the newest checkpoint that is whole, or None, and what is wrong with newer ones.

    Args:
        hashed: look at every byte, and not at sizes alone.
    """
    damaged: list[Damage] = []
    for path in listed(folder):
        problems = problems_of(path, hashed=hashed)
        if not problems:
            return path, damaged
        damaged.append(Damage(path, tuple(problems)))
    return None, damaged


def read_record(path: Path) -> dict[str, Any]:
    """Return a checkpoint's record.

    Raises:
        ValueError: there is none, or it is not as it was written.
    """
    try:
        return parse_record((path / RECORD).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"it has no {RECORD}, which is written last") from None
    except OSError as error:
        raise ValueError(f"{RECORD} cannot be read ({error})") from error


def parse_record(written: bytes) -> dict[str, Any]:
    """Return what a record holds.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        found = json.loads(written)
    except ValueError as error:
        raise ValueError(f"{RECORD} cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("digest") != digest(_without_digest(found)):
        raise ValueError(f"{RECORD} is not as it was written")
    return found


def _without_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "digest"}


def bytes_of(path: Path) -> int:
    """Return the bytes of a checkpoint's files, as its record tells.

    Raises:
        ValueError: see `read_record`.
    """
    return sum(told["size"] for told in read_record(path)["files"].values())


def problems_of(path: Path, *, hashed: bool) -> list[str]:
    """Return what makes a checkpoint unusable, nothing for a whole one.

    Args:
        hashed: look at every byte, and not at sizes alone.
    """
    try:
        record = read_record(path)
    except ValueError as error:
        return [str(error)]
    if record["step"] != step_of(path):
        return [f"it was written at step {record['step']}"]
    problems = []
    for name, told in record["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
            continue
        if size != told["size"]:
            problems.append(f"{name} has {size:,} bytes, {told['size']:,} were written")
    if hashed and not problems:
        names = list(record["files"])
        for name, found in zip(names, _hashes(path / name for name in names), strict=True):
            if isinstance(found, OSError):
                problems.append(f"{name} cannot be read ({found.strerror})")
            elif found != record["files"][name]["sha256"]:
                problems.append(f"{name} has other content than was written")
    return problems


def _hashes(files: Iterable[Path]) -> Iterator[str | OSError]:
    def one(file: Path) -> str | OSError:
        try:
            return hash_of(file)
        except OSError as error:
            return error

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        yield from threads.map(one, files)


def hash_of(file: Path) -> str:
    """Return a file's SHA-256."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def seal(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bring files to the disk, and return size and SHA-256 of each.

    Raises:
        OSError: one cannot be read or brought there.
    """
    sealed = {}
    for name in names:
        file = folder / name
        bring_to_disk(file)
        sealed[name] = {"size": file.stat().st_size, "sha256": hash_of(file)}
    return sealed


def commit(staging: Path, record: Mapping[str, Any]) -> Path:
    """Write the record of what lies in `checkpoints/.part/checkpoint-N`, and give it its place in `checkpoints`.

    Raises:
        OSError: the disk does not take it.
    """
    whole = {"format": FORMAT, **record}
    # As JSON gives it back, which knows no tuples.
    whole = json.loads(json.dumps(whole))
    write_json(staging / RECORD, {**whole, "digest": digest(whole)})
    bring_to_disk(staging / RECORD)
    for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
        bring_to_disk(folder)
    place = staging.parent.parent / staging.name
    if place.exists():  # of the same run, which came here again: by way of the same name nobody sees half of either
        discard(place)
    os.rename(staging, place)
    _remove_if_empty(staging.parent)
    bring_to_disk(place.parent)
    return place


def discard(path: Path) -> None:
    """Remove a checkpoint; what is left of it when this is interrupted is not called a checkpoint any more."""
    aside = path.parent / PART / f"old-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # of an interrupted attempt
    os.rename(path, aside)
    shutil.rmtree(aside)
    _remove_if_empty(aside.parent)


def discard_part(folder: Path) -> None:
    """Remove what a save that was interrupted has written so far: its room may be what is needed."""
    shutil.rmtree(folder / PART, ignore_errors=True)


def rotate(folder: Path, keep: int, spared: Iterable[str] = ()) -> None:
    """Remove all but the newest `keep` checkpoints with a record, and `spared` ones; nothing else in the folder."""
    whole = [path for path in listed(folder) if (path / RECORD).is_file()]
    for path in whole[max(keep, LEAST_KEPT) :]:
        if path.name not in spared:
            discard(path)


LEAST_KEPT = 2  # the newest one may turn out to be damaged


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()
