"""Folders of results: what they may be called, which process writes into one, and where goes what is replaced.

Nothing here deletes: what makes room is moved to `.trash/DATE-NAME` beside the folder it was in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tunewright.errors import ConfigError, StorageError

TRASH = ".trash"
LOCK = ".lock"
LONGEST = 200  # bytes: file systems allow 255, and what is written aside has a longer name
PROBE_SECONDS = 1.0  # whoever only looks whether a lock is held, as each rank does, holds it for a moment


def check_name(name: str, setting: str) -> None:
    """Refuse a folder's name that is not one plain part of a path: joined to its parent, it would lead elsewhere.

    Raises:
        ConfigError: it is empty, `.`, `..`, hidden, too long, or holds a separator or a control character.
    """
    if not name.strip():
        raise ConfigError(f"`{setting}` is empty (an unset variable?): write a folder's name, for example first.")
    if name.startswith(".") or name != name.strip() or not name.isprintable() or any(mark in name for mark in "/\\"):
        raise ConfigError(
            f"`{setting}` is {name!r}: write one plain name, without / and not beginning with a dot. Where the folder "
            f"lies is another setting (`output_root` of a run)."
        )
    if len(os.fsencode(name)) > LONGEST:
        raise ConfigError(
            f"`{setting}` is {name[:40]!r}... of {len(os.fsencode(name))} bytes: write {LONGEST} at most."
        )


def set_aside(paths: Iterable[Path], root: Path, name: str) -> Path | None:
    """Move files and folders to `root/.trash/DATE-NAME`, and return that folder, or None when there is nothing to move.

    Raises:
        StorageError: something cannot be moved; what was moved until then stays in the trash.
    """
    paths = list(paths)
    if not paths:
        return None
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        folder = _new_folder(root / TRASH, f"{date}-{name}")
        for path in paths:
            os.rename(path, folder / path.name)
    except OSError as error:
        raise StorageError(
            f"What is in {paths[0].parent} cannot be moved to {root / TRASH}: {error.strerror}. Move it yourself, or "
            f"choose another name."
        ) from error
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another one in the same second
            number += 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made when there is none.

    The lock is the system's: it ends with this process, however that ends.

    Raises:
        Timeout: another process holds it.
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=PROBE_SECONDS)
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        raise StorageError(f"Cannot write to {folder}: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Tell whether another process holds the lock of a folder; nothing is made where there is none.

    Raises:
        StorageError: the lock cannot be opened.
    """
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=PROBE_SECONDS):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise StorageError(f"Cannot open {folder / LOCK}: {error.strerror}.") from error
