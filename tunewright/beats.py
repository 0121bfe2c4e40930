"""Signs of life of ranks: what each says of itself, and who has not been heard for too long.

Ranks say it to the launcher of their machine, through a socket in a folder of its own, and to the first rank, through
the store where they meet. Each listener goes by its own clock.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from tunewright.ranks import rank

SOCKET = "beats"  # in the folder that `ranks.SPARE_ERRORS` names
LEAST_PATIENCE = 15.0  # seconds: loading a large library keeps a rank's threads from running for some
# Shares of `train.timeout_minutes`. The launcher is first, because it can name the rank and end it; then the ranks,
# where there is no launcher of ours; then the collective, which knows neither who nor where.
PATIENCE_OF_LAUNCHER, PATIENCE_OF_RANKS = 0.8, 0.9


def interval_of(timeout_minutes: float) -> float:
    """Return the seconds between two beats."""
    return min(max(timeout_minutes * 60 / 40, 0.5), 5.0)


def patience_of(timeout_minutes: float, share: float) -> float:
    """Return the seconds after which a rank that is not heard counts as frozen or unreachable."""
    return max(timeout_minutes * 60 * share, LEAST_PATIENCE)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    time: float  # of the rank's clock, since the epoch
    step: int
    doing: str  # one of `pulse.PHASES`
    collective: str  # in which it is, for example all_reduce
    verdict: str = ""  # why this rank ends, which is why all others do
    ended: bool = False  # it has come to its end, and will not be heard again

    @classmethod
    def mine(cls, step: int, doing: str, collective: str, verdict: str = "", *, ended: bool = False) -> Beat:
        return cls(rank(), socket.gethostname(), os.getpid(), time.time(), step, doing, collective, verdict, ended)

    def where(self) -> str:
        """Return for example `step 12 (backward, all_reduce)`."""
        details = ", ".join(filter(None, (self.doing, self.collective)))
        if self.step:
            return f"step {self.step}{f' ({details})' if details else ''}"
        return details or "its start"

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.time).strftime("%H:%M:%S")
        return f"rank {self.rank} on {self.host} (process {self.pid}) at {since} in {self.where()}"

    def silent(self) -> str:
        """Return what is said of a rank of which this was the last beat."""
        since = datetime.fromtimestamp(self.time).strftime("%H:%M:%S")
        return f"rank {self.rank} on {self.host} (process {self.pid}) has been silent since {since}, in {self.where()}"


class Listener:
    """Who was heard when, by this process's clock. One thread may take beats while another judges.

    Args:
        interval: seconds between two beats.
        patience: seconds after which a rank counts as silent.
        expected: ranks that have to be heard from now on, also when they have said nothing yet.
    """

    def __init__(self, interval: float, patience: float, expected: Iterable[int] = ()) -> None:
        self.interval, self.patience = interval, patience
        self.beats: dict[int, Beat] = {}
        self.looked = time.monotonic()
        self.heard = dict.fromkeys(expected, self.looked)

    def take(self, beat: Beat) -> None:
        """Note a beat; one that was seen before is no new sign of life."""
        if beat.ended:
            self.forget(beat.rank)
        elif self.beats.get(beat.rank) != beat:
            self.heard[beat.rank] = time.monotonic()
        self.beats[beat.rank] = beat

    def forget(self, number: int) -> None:
        """Expect nothing of a rank any more."""
        self.heard.pop(number, None)

    def silent(self) -> int | None:
        """Return the rank that has been silent longest, if that is too long; call it at every interval."""
        now = time.monotonic()
        if now - self.looked > 3 * self.interval:  # this process was asleep itself, so it cannot tell who was
            self.heard = dict.fromkeys(self.heard, now)
        self.looked = now
        number, last = min(list(self.heard.items()), key=lambda item: item[1], default=(0, now))
        return number if now - last > self.patience else None

    def told(self) -> str:
        """Return where ranks were when they were last heard, a line for each."""
        beats = list(self.beats.values())
        return "\n".join(f"  {beat}" for beat in sorted(beats, key=lambda beat: beat.rank) if not beat.ended)
