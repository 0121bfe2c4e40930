"""This checkout as the package `tunewright` where it is not installed: a folder of links for PYTHONPATH.

python bench/rooms.py FOLDER        # makes FOLDER/tunewright
"""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("datagen", "trainer", "launch", "deliver", "configs", "data")


def make_rooms(folder: Path, checkout: Path = CHECKOUT) -> Path:
    """Link the rooms of a checkout into `folder/tunewright`, and return the folder."""
    package = folder / "tunewright"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():  # what was moved since
        if not link.exists():
            link.unlink()
    for target in (*(checkout / "tunewright").iterdir(), *(checkout / room for room in ROOMS)):
        link = package / target.name
        if not link.is_symlink() or link.resolve() != target.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return folder


if __name__ == "__main__":
    make_rooms(Path(sys.argv[1]))
