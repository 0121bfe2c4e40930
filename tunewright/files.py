"""The one way to write a file: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a place beside `path` for a file or a folder, which gets the name `path` once the block has ended well."""
    # Not tempfile: its files are private (0600), and would stay so under their new name.
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(staging)  # of a process that was killed and had the same number
    try:
        yield staging
        os.replace(staging, path)
    finally:
        _remove(staging)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file."""
    with written_aside(path) as staging, staging.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the name: a power cut would leave a file of nothing under it


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; half of a surrogate pair, which a broken row may hold, becomes a question mark."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, indented."""
    write_bytes(path, f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def bring_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems have no such thing for folders
            raise
    finally:
        os.close(descriptor)


def make_readable(folder: Path) -> None:
    """Give the files below a folder the mode that this process gives new ones.

    safetensors (0.8) writes private ones (0600), which another user of a shared disk could not read.
    """
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _umask() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    mask = os.umask(0o077)  # not on Linux: it is told only by setting another one, for all threads
    os.umask(mask)
    return mask


def _remove(staging: Path) -> None:
    if staging.is_dir() and not staging.is_symlink():
        shutil.rmtree(staging, ignore_errors=True)
    else:
        staging.unlink(missing_ok=True)
