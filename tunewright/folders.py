"""Folders of results: what they may be called, and where goes what is replaced.

Nothing here deletes: what makes room is moved to `.trash/DATE-NAME` beside the folder it was in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from tunewright.errors import ConfigError, StorageError

TRASH = ".trash"
LONGEST = 200  # bytes: file systems allow 255, and what is written aside has a longer name


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
