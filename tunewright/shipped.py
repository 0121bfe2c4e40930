"""Where the files lie that come with tunewright: beside the rooms, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def shipped(folder: str) -> Path:
    """Return the folder `configs` or `data` of this installation."""
    room = find_spec("tunewright.launch")  # its folder, and not this one's, has them beside it in a checkout
    assert room is not None
    assert room.origin
    return Path(room.origin).parents[1] / folder
