"""Which rows train together where tokens decide it: packs of a fixed capacity, and steps of like size."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int = 0) -> list[np.ndarray]:
    """Put rows into packs of at most `capacity` tokens, each into the fullest pack that still has room for it.

    The longest rows come first ("best fit decreasing": at most 11/9 of the fewest packs there could be, and one more;
    Johnson 1973). Rows of one length meet in an order drawn under `seed`.

    Args:
        lengths: (rows,) tokens of each row, none above `capacity`.

    Returns:
        Row numbers of each pack, (rows in it,).
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a row of {lengths.max()} tokens is longer than a pack of {capacity}")
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens of room -> the packs that have it
    rooms: list[int] = []  # those, ascending
    order = np.random.default_rng(seed).permutation(len(lengths))
    for row in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[number].append(row)
        if room - length not in with_room:
            insort(rooms, room - length)
        with_room.setdefault(room - length, []).append(number)
    return [np.array(rows) for rows in packs]


def cut(lengths: np.ndarray, steps: int) -> list[np.ndarray]:
    """Cut rows, in their order, into `steps` runs of like many tokens; return the positions of each, (rows in it,).

    A row belongs to the run in which its middle lies, so a run is at most a row away from the mean.
    """
    ends = np.cumsum(lengths)
    bounds = np.arange(1, steps) * (ends[-1] / steps) if len(ends) else []
    return np.split(np.arange(len(lengths)), np.searchsorted(ends - lengths / 2, bounds))
